"""Benchmarks through the whole command with a tiny policy: rows, tables, and an evaluation that was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_folders import BUILDERS, build_vstar
from conftest import randomize_adapter
from PIL import Image

import evaluate
from config import ConfigError, read_config
from evaluate import EvaluateConfig
from families import PolicyError
from vlm import load_policy

FAST = {"max_new_tokens": 8, "system_prompt": ""}
COUNT = 40  # examples of the long benchmark: three times EXAMPLES_AT_A_TIME, the last one not full


@pytest.fixture
def benchmark_root(tmp_path) -> Path:
    for name in ("vstar", "chartqa", "mathvision"):
        BUILDERS[name](tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture(scope="module")
def adapter(model_folders, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_policy(model_folders["qwen3_vl"], lora_rank=2)
    randomize_adapter(model, scale=0.3).save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def counted(monkeypatch):
    """The ids of the examples that sample_groups is asked for, one list for each call."""
    calls, sample_groups = [], evaluate.sample_groups

    def counting(model, processor, examples, **options):
        calls.append([example["id"] for example in examples])
        return sample_groups(model, processor, examples, **options)

    monkeypatch.setattr(evaluate, "sample_groups", counting)
    return calls


def test_three_benchmarks_with_an_adapter(benchmark_root, tmp_path, adapter, capsys):
    config = read_config(
        EvaluateConfig,
        [
            "--benchmarks",
            "vstar",
            "chartqa",
            "mathvision",
            "--benchmark_root",
            str(benchmark_root),
            "--adapter",
            adapter,
        ]
        + ["--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "all.json"), "--max_new_tokens", "8"],
    )
    evaluate.main(config)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["benchmarks"]) == ["vstar", "chartqa", "mathvision"] and result["adapter"] == adapter
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


def test_a_second_run_asks_nothing_and_needs_no_model(benchmark_root, tmp_path, counted, monkeypatch, capsys):
    config = EvaluateConfig(
        benchmarks=["vstar"], benchmark_root=[str(benchmark_root)], output_dir=str(tmp_path / "out"), **FAST
    )
    evaluate.main(config)
    first = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "load_policy", None)
    evaluate.main(config)
    assert capsys.readouterr().out == first and len(counted) == 1


def long_config(tmp_path: Path, out: str, **more) -> EvaluateConfig:
    if not (tmp_path / "vstar").exists():
        build_vstar(tmp_path / "vstar", COUNT)
    settings = {"benchmarks": ["vstar"], "benchmark_root": [f"vstar={tmp_path / 'vstar'}"]}
    return EvaluateConfig(**settings, output_dir=str(tmp_path / out), **FAST | more)


@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_evaluation_that_was_stopped_goes_on(stop_at, tmp_path, counted, monkeypatch):
    evaluate.main(long_config(tmp_path, "undisturbed"))
    undisturbed = [identifier for call in counted for identifier in call]
    counted.clear()

    stopped, counting = [], evaluate.sample_groups

    def stopping(*arguments, **options):
        if len(stopped) == stop_at:
            raise KeyboardInterrupt
        stopped.append(True)
        return counting(*arguments, **options)

    monkeypatch.setattr(evaluate, "sample_groups", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(long_config(tmp_path, "stopped"))
    # A line that was being written when the power went is not there.
    with (tmp_path / "stopped" / "vstar" / "base.jsonl").open("a") as file:
        file.write('{"id": "39", "te')
    monkeypatch.setattr(evaluate, "sample_groups", counting)
    evaluate.main(long_config(tmp_path, "stopped"))
    assert [identifier for call in counted for identifier in call] == undisturbed == [str(n) for n in range(COUNT)]
    for name in ("vstar/base.jsonl", "results.json", "table.txt", "vstar/base.settings.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_rows_of_another_commit_or_number_format_are_not_mixed(tmp_path, counted):
    """A Hub model whose main had moved, or "auto" on another card, went on in the same file."""
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
    """SIGKILL of a real process: what it wrote stays, is not asked again, and the result is that of one run."""
    config = long_config(tmp_path, "killed")
    command = [sys.executable, "evaluate.py", "--benchmarks", "vstar", "--benchmark_root", *config.benchmark_root]
    command += ["--output_dir", config.output_dir, "--max_new_tokens", "8", "--system_prompt="]
    path = tmp_path / "killed" / "vstar" / "base.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = [row["id"] for row in lines(path)]
    assert 0 < len(before) < COUNT
    evaluate.main(config)
    asked_again = [identifier for call in counted for identifier in call]
    assert before + asked_again == [str(n) for n in range(COUNT)]

    evaluate.main(long_config(tmp_path, "undisturbed"))
    for name in ("vstar/base.jsonl", "results.json", "table.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_changed_settings_are_refused_by_name(benchmark_root, tmp_path, adapter):
    common = {"benchmarks": ["vstar"], "benchmark_root": [str(benchmark_root)], "output_dir": str(tmp_path / "out")}
    evaluate.main(EvaluateConfig(**common, **FAST))
    for name, value in {"max_new_tokens": 9, "system_prompt": "Look.", "top_fraction": 0.5, "max_pixels": 4096}.items():
        with pytest.raises(ConfigError, match=f"other settings: {name} was .*, is .*write elsewhere"):
            evaluate.main(EvaluateConfig(**common | FAST | {name: value}))
    # What an answer does not depend on may change, and the base's rows serve beside an adapter.
    evaluate.main(EvaluateConfig(**common, **FAST, limit=1, sampling_tokens=1000, adapter=adapter))
    assert len(lines(tmp_path / "out" / "vstar" / "adapter.jsonl")) == 1
    # An adapter that was trained on under the same name is another one.
    weights = Path(adapter) / "adapter_config.json"
    before = weights.read_text()
    try:
        weights.write_text(before + " ")
        with pytest.raises(ConfigError, match="files of adapter was"):
            evaluate.main(EvaluateConfig(**common, **FAST, adapter=adapter))
    finally:
        weights.write_text(before)


def test_a_changed_question_is_refused(benchmark_root, tmp_path):
    common = {"benchmarks": ["vstar"], "benchmark_root": [str(benchmark_root)], "output_dir": str(tmp_path / "out")}
    evaluate.main(EvaluateConfig(**common, **FAST))
    path = benchmark_root / "vstar" / "test_questions.jsonl"
    path.write_text(path.read_text().replace("material of glove 1", "color of glove 1"))
    with pytest.raises(ConfigError, match="1 examples are not what they were, the first is '1'"):
        evaluate.main(EvaluateConfig(**common, **FAST))


def test_changed_boxes_and_pictures_are_refused(tmp_path):
    """Rows with the TAS of former boxes were kept."""
    rows = [
        {"id": name, "image": f"{name}.png", "question": "?", "answer": "1", "boxes": [[0, 0, 40, 40]]} for name in "ab"
    ]
    for name in "ab":
        Image.new("RGB", (96, 96), "red").save(tmp_path / f"{name}.png")
    config = EvaluateConfig(data=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"), **FAST)

    def write():
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    evaluate.main(config)
    rows[1]["boxes"] = [[0, 0, 80, 80]]
    write()
    with pytest.raises(ConfigError, match="1 examples are not what they were, the first is 'b'"):
        evaluate.main(config)
    rows[1]["boxes"] = [[0, 0, 40, 40]]
    write()
    evaluate.main(config)
    Image.new("RGB", (96, 128), "red").save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="1 examples are not what they were, the first is 'a'"):
        evaluate.main(config)


def test_a_start_that_failed_before_its_first_row_binds_nobody(tmp_path, monkeypatch):
    """A mistyped model had its settings noted, and the corrected command was refused."""
    config = EvaluateConfig(limit=1, output_dir=str(tmp_path / "out"), **FAST)
    with pytest.raises(PolicyError):
        evaluate.main(replace(config, model="no/such-model"))
    evaluate.main(config)
    with pytest.raises(ConfigError, match="model was .*, is 'no/such-model'"):
        evaluate.main(replace(config, model="no/such-model"))


def test_data_goes_on_too_in_a_folder(tmp_path, counted):
    config = EvaluateConfig(limit=3, output_dir=str(tmp_path / "out"), **FAST)
    evaluate.main(config)
    evaluate.main(EvaluateConfig(limit=5, output_dir=str(tmp_path / "out"), **FAST))
    assert [len(call) for call in counted] == [3, 2]
    assert len(lines(tmp_path / "out" / "data" / "base.jsonl")) == 5
    with pytest.raises(ConfigError, match="data was 'scenes:heldout', is 'scenes:validation'"):
        evaluate.main(EvaluateConfig(data="scenes:validation", output_dir=str(tmp_path / "out"), **FAST))


def test_problems_are_said_before_anything_starts(tmp_path):
    def problems(**settings) -> str:
        return "\n".join(EvaluateConfig(**settings).problems())

    assert "benchmarks='vsstar': did you mean vstar?" in problems(benchmarks=["vsstar"])
    assert "valid: all, mme_realworld_lite, m3cot" in problems(benchmarks=["docvqa2"])
    assert "add --benchmarks all" in problems(benchmark_root=[str(tmp_path)])
    assert "no mmstar or MMStar in" in problems(benchmarks=["mmstar"], benchmark_root=[str(tmp_path)])
    assert "beside benchmarks" in problems(benchmarks=["vstar"], data="mine.jsonl")
    both = problems(benchmarks=["vsstar", "mmstar"], benchmark_root=["/gone"])
    assert "did you mean vstar?" in both and "benchmark_root='/gone': give a folder" in both
    (tmp_path / "file").write_text("")
    assert "is no folder that can be written to" in problems(output_dir=str(tmp_path / "file"))


def test_all_are_the_papers_nine_and_a_folder_is_named_after_the_model():
    config = EvaluateConfig(model="Qwen/Qwen3-VL-4B-Instruct", adapter="runs/a b/adapter", benchmarks=["all", "vstar"])
    assert len(config.benchmark_names()) == 9 and "mme_realworld" not in config.benchmark_names()
    assert str(config.folder()) == "evaluations/Qwen-Qwen3-VL-4B-Instruct+runs-a-b-adapter"
    assert EvaluateConfig().folder() is None


def test_the_papers_figures_stand_beside_ours_for_a_model_of_that_name(benchmark_root, tmp_path, monkeypatch, capsys):
    load = evaluate.load_policy
    monkeypatch.setattr(evaluate, "load_policy", lambda model, **options: load("data/tiny_policy", **options))
    evaluate.main(
        EvaluateConfig(
            model="Qwen/Qwen3-VL-8B-Instruct",
            benchmarks=["vstar", "chartqa"],
            benchmark_root=[str(benchmark_root)],
            output_dir=str(tmp_path / "out"),
            **FAST,
        )
    )
    shown = capsys.readouterr().out
    assert "paper, base" in shown and "81.15          82.20" in shown and "78.96          81.84" in shown
    assert "80.06" in shown or "80.05" in shown  # the mean of the two
    paper = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["vstar"]["paper"]
    assert paper == {"base": 81.15, "SAYO": 82.2}


def test_many_cut_off_completions_are_said(benchmark_root, tmp_path, capsys):
    settings = {"benchmarks": ["vstar"], "benchmark_root": [str(benchmark_root)], "output_dir": str(tmp_path / "out")}
    evaluate.main(EvaluateConfig(**settings, max_new_tokens=1, system_prompt=""))
    assert "100% of the completions were cut off at max_new_tokens=1: give more" in capsys.readouterr().out
