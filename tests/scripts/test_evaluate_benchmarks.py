"""Benchmarks through the whole command with a tiny policy: rows, tables, and an evaluation that was stopped."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_folders import BUILDERS, build_vstar
from conftest import write_jsonl
from PIL import Image
from resumed_runs import Killed, die, on_call

import evaluate
from evaluate import EvaluateConfig
from sayo.model.families import PolicyError
from sayo.settings import ConfigError, read_config

FAST = {"max_new_tokens": 8, "system_prompt": ""}
COUNT = 40  # examples of the long benchmark: three times EXAMPLES_AT_A_TIME, the last one not full


@pytest.fixture
def benchmark_root(tmp_path) -> Path:
    for name in ("vstar", "chartqa", "mathvision"):
        BUILDERS[name](tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture
def vstar(benchmark_root, tmp_path) -> EvaluateConfig:
    """Of two examples; its output folder is tmp_path / "out"."""
    root = [str(benchmark_root)]
    return EvaluateConfig(benchmarks=["vstar"], benchmark_root=root, output_dir=str(tmp_path / "out"), **FAST)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def counted(monkeypatch):
    """The ids of the examples that sample_groups is asked for."""
    ids, sample_groups = [], evaluate.sample_groups

    def counting(model, processor, examples, **options):
        ids.extend(example["id"] for example in examples)
        return sample_groups(model, processor, examples, **options)

    monkeypatch.setattr(evaluate, "sample_groups", counting)
    return ids


def test_three_benchmarks_with_an_adapter(benchmark_root, tmp_path, saved_adapter, capsys):
    flags = f"--benchmarks vstar chartqa mathvision --benchmark_root {benchmark_root} --adapter {saved_adapter}"
    flags += f" --output_dir {tmp_path / 'out'} --json {tmp_path / 'all.json'} --max_new_tokens 8"
    evaluate.main(read_config(EvaluateConfig, flags.split()))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["benchmarks"]) == ["vstar", "chartqa", "mathvision"] and result["adapter"] == saved_adapter
    everything = json.loads((tmp_path / "all.json").read_text())
    for name, found in result["benchmarks"].items():
        assert set(found["summary"]) == {"base", "adapter", "difference"} and "paper" not in found
        for policy in ("base", "adapter"):
            rows = lines(tmp_path / "out" / name / f"{policy}.jsonl")
            assert rows == everything["rows"][name][policy] and len(rows) == found["examples"]
            accuracy = sum(row["accuracy"] for row in rows) / len(rows)
            assert found["summary"][policy]["accuracy"][0] == pytest.approx(accuracy)
            assert all(row["text"] is not None and "answer" in row and "said" in row for row in rows)
    # Of V*'s two examples the first has a region, ChartQA's have none.
    tas = [row["tas"] for row in lines(tmp_path / "out" / "vstar" / "base.jsonl")]
    assert 0 < tas[0] < 1 and tas[1] is None
    assert all(row["tas"] is None for row in lines(tmp_path / "out" / "chartqa" / "base.jsonl"))
    shown = capsys.readouterr().out
    assert "mean of 3" in shown and "difference" in shown and "paper" not in shown
    assert (tmp_path / "out" / "table.txt").read_text().strip() in shown


def test_a_second_run_asks_nothing_and_needs_no_model(vstar, counted, monkeypatch, capsys):
    evaluate.main(replace(vstar, max_new_tokens=1))
    first = capsys.readouterr().out
    assert "100% of the completions were cut off at max_new_tokens=1: give more" in first
    monkeypatch.setattr(evaluate, "load_policy", None)
    evaluate.main(replace(vstar, max_new_tokens=1))
    assert capsys.readouterr().out == first and len(counted) == 2


def long_config(tmp_path: Path, out: str, **more) -> EvaluateConfig:
    if not (tmp_path / "vstar").exists():
        build_vstar(tmp_path / "vstar", COUNT)
    settings = {"benchmarks": ["vstar"], "benchmark_root": [f"vstar={tmp_path / 'vstar'}"]}
    return EvaluateConfig(**settings, output_dir=str(tmp_path / out), **FAST | more)


@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_evaluation_that_was_stopped_goes_on(stop_at, tmp_path, counted, monkeypatch):
    evaluate.main(long_config(tmp_path, "undisturbed"))
    assert counted == [str(n) for n in range(COUNT)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, evaluate, "sample_groups", stop_at + 1, die)
        evaluate.main(long_config(tmp_path, "stopped"))
    with (tmp_path / "stopped/vstar/base.jsonl").open("ab") as file:  # as the power went: zeros, other rows, half a row
        file.write(b"\0" * 600 + b'\n\xe7\xba\n{"id": "39"}\n[39]\n{"id": "39", "te')
    evaluate.main(long_config(tmp_path, "stopped"))
    assert counted == 2 * [str(n) for n in range(COUNT)]
    assert_same_files(tmp_path / "stopped", tmp_path / "undisturbed", "vstar/base.settings.json")


@pytest.mark.parametrize("name", ["results.json", "table.txt", "vstar/base.jsonl"])
def test_files_of_others_in_the_output_folder_are_named_and_left_alone(tmp_path, counted, name):
    (tmp_path / "out/vstar").mkdir(parents=True)
    (tmp_path / "out" / name).write_text('{"id": "mine"}\n')
    with pytest.raises(ConfigError, match=f"{Path(name).name}.*give another (--output_dir|place)"):
        evaluate.main(long_config(tmp_path, "out"))
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert found == [tmp_path / "out" / name] and found[0].read_text() == '{"id": "mine"}\n' and counted == []


def assert_same_files(first: Path, second: Path, *more: str) -> None:
    for name in ("vstar/base.jsonl", "results.json", "table.txt", *more):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_rows_of_another_commit_or_number_format_are_not_mixed(tmp_path, counted):
    evaluate.main(long_config(tmp_path, "out"))
    path, note = tmp_path / "out/vstar/base.jsonl", tmp_path / "out/vstar/base.settings.json"
    first, whole = path.read_text().splitlines(keepends=True)[0], note.read_text()
    assert json.loads(whole)["loaded"].keys() == {"model", "adapter", "number_format"}
    path.write_text(first)
    note.write_text(whole.replace("torch.float32", "torch.float16"))
    with pytest.raises(ConfigError, match="loaded was .*float16'}, is .*float32'}. Give those again"):
        evaluate.main(long_config(tmp_path, "out"))
    assert path.read_text() == first
    note.write_text(json.dumps({name: value for name, value in json.loads(whole).items() if name != "loaded"}))
    evaluate.main(long_config(tmp_path, "out"))  # of a version that did not note it
    assert note.read_text() == whole


def test_an_evaluation_that_was_killed_goes_on(tmp_path, counted):
    config = long_config(tmp_path, "killed")
    flags = f"--benchmarks vstar --benchmark_root {config.benchmark_root[0]} --output_dir {config.output_dir}"
    command = [sys.executable, "evaluate.py", *flags.split(), "--max_new_tokens=8", "--system_prompt="]
    path, deadline = tmp_path / "killed" / "vstar" / "base.jsonl", time.monotonic() + 240
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = [row["id"] for row in lines(path)]
    assert 0 < len(before) < COUNT
    evaluate.main(config)
    assert before + counted == [str(n) for n in range(COUNT)]
    evaluate.main(long_config(tmp_path, "undisturbed"))
    assert_same_files(tmp_path / "killed", tmp_path / "undisturbed")


def test_changed_settings_are_refused_by_name(vstar, tmp_path, saved_adapter):
    evaluate.main(vstar)
    for name, value in {"max_new_tokens": 9, "system_prompt": "Look.", "top_fraction": 0.5, "max_pixels": 4096}.items():
        with pytest.raises(ConfigError, match=f"other settings: {name} was .*, is .*write elsewhere"):
            evaluate.main(replace(vstar, **{name: value}))
    # What an answer does not depend on may change, and the base's rows serve beside an adapter.
    own = replace(vstar, adapter=str(shutil.copytree(saved_adapter, tmp_path / "adapter")))
    evaluate.main(replace(own, limit=1, sampling_tokens=1000))
    assert len(lines(tmp_path / "out" / "vstar" / "adapter.jsonl")) == 1
    # An adapter that was trained on under the same name is another one.
    (tmp_path / "adapter" / "adapter_config.json").open("a").write(" ")
    with pytest.raises(ConfigError, match="files of adapter was"):
        evaluate.main(own)


def test_changed_questions_boxes_and_pictures_are_refused(tmp_path):
    config = EvaluateConfig(data=str(tmp_path / "train.jsonl"), output_dir=str(tmp_path / "out"), **FAST)

    def write(box=(0, 0, 40, 40), size=(96, 96), question="?"):
        rows = {"a": {"question": "?", "boxes": [[0, 0, 40, 40]]}, "b": {"question": question, "boxes": [box]}}
        write_jsonl(tmp_path, *(row | {"answer": "1", "id": key, "image": f"{key}.png"} for key, row in rows.items()))
        for name, shape in {"a": size, "b": (96, 96)}.items():
            Image.new("RGB", shape, "red").save(tmp_path / f"{name}.png")

    write()
    evaluate.main(config)
    for harm, first in (({"box": (0, 0, 80, 80)}, "b"), ({"question": "!"}, "b"), ({"size": (96, 128)}, "a")):
        write(**harm)
        with pytest.raises(ConfigError, match=f"1 examples are not what they were, the first is '{first}'"):
            evaluate.main(config)
    write()
    evaluate.main(config)  # as before


def test_data_goes_on_too_and_a_start_that_failed_before_its_first_row_binds_nobody(tmp_path, counted):
    config = EvaluateConfig(limit=3, output_dir=str(tmp_path / "out"), **FAST)
    with pytest.raises(PolicyError):
        evaluate.main(replace(config, model="no/such-model"))
    evaluate.main(config)
    evaluate.main(replace(config, limit=5))
    assert len(counted) == len(lines(tmp_path / "out" / "data" / "base.jsonl")) == 5
    for name, value in {"data": "scenes:validation", "model": "no/such-model"}.items():
        with pytest.raises(ConfigError, match=f"{name} was .*, is '{value}'"):
            evaluate.main(replace(config, **{name: value}))


def test_all_are_the_papers_nine_and_a_folder_is_named_after_the_model():
    config = EvaluateConfig(model="Qwen/Qwen3-VL-4B-Instruct", adapter="runs/a b/adapter", benchmarks=["all", "vstar"])
    assert len(config.benchmark_names()) == 9 and "mme_realworld" not in config.benchmark_names()
    assert str(config.folder()) == "evaluations/Qwen-Qwen3-VL-4B-Instruct+runs-a-b-adapter"
    assert EvaluateConfig().folder() is None


def test_the_papers_figures_stand_beside_ours_for_a_model_of_that_name(vstar, tmp_path, monkeypatch, capsys):
    load = evaluate.load_policy
    monkeypatch.setattr(evaluate, "load_policy", lambda model, **options: load("data/tiny_policy", **options))
    evaluate.main(replace(vstar, model="Qwen/Qwen3-VL-8B-Instruct", benchmarks=["vstar", "chartqa"]))
    shown = capsys.readouterr().out
    assert "paper, base" in shown and "81.15          82.20" in shown and "78.96          81.84" in shown
    assert "80.06" in shown or "80.05" in shown  # the mean of the two
    paper = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["vstar"]["paper"]
    assert paper == {"base": 81.15, "SAYO": 82.2}
