"""Regions made of attention: the formula against eager attentions, cells against coverage, files, training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, PACKED, two, without, write_jsonl
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train_rl import run

import train_rl
from config import ConfigError, read_config
from data import attention_regions as regions
from data.attention_regions import AttentionRegionsConfig, WithRegions, attention_regions, measure_regions
from data.examples import load_examples
from loading import load_processor
from prompts import encode_prompt, region_coverage
from relative_attention import (
    GENERIC_QUESTION,
    attention_boxes,
    merge_cells,
    per_picture,
    question_and_generic_attention,
)
from train_rl import Config, example_index
from vlm import load_policy

TILED = ("internvl", "smolvlm", "smolvlm_2b")
LAYERS = {"qwen3_vl": [0, 1, 2, 3], "qwen3_5": [3]}


# --- regions of examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_regions_of_several_pictures(policies, examples, family):
    """Cells compete over all pictures; each picture gets the boxes of its own."""
    model, processor = policies[family]
    pictures = [examples[0]["image"], Image.new("RGB", (150, 90), "gray")]
    example = {"images": pictures, "question": "Which is larger?", "id": "two"}
    layers = LAYERS.get(family, [0, 1, 2])
    boxes = attention_boxes(model, processor, example, None, layers=layers, share=0.5)
    found = question_and_generic_attention(model, processor, example, None, layers)
    maps = per_picture(processor, pictures, *found)
    values = np.concatenate([one.relative().mean(0).numpy() for one in maps])
    expected = values >= np.sort(values)[::-1][max(1, round(0.5 * len(values))) - 1]
    coverage = region_coverage(processor, pictures, boxes)[torch.cat([one.is_tile for one in maps])]
    assert ((coverage > 0.5).numpy() == expected).all()
    # One of them alone has all of the region.
    alone = attention_boxes(model, processor, {"image": pictures[1], "question": "?"}, None, layers=layers, share=1.0)
    ((box,),) = alone
    assert box == pytest.approx([0, 0, 150, 90], abs=0.3)


@pytest.mark.parametrize("family", PACKED)
def test_the_adapter_is_off_and_own_boxes_are_not_looked_at(policies, model_folders, tmp_path, examples, family):
    model, processor = policies[family]
    plain, _ = load_policy(model_folders[family], lora_rank=0, dtype="float32")
    data = load_examples("scenes", limit=4)
    config = Config(model=model_folders[family], regions_folder=str(tmp_path / "a"), dtype="float32")
    found = attention_regions(model, processor, data, range(4), config)
    config.regions_folder = str(tmp_path / "b")
    expected = attention_regions(plain, processor, data, range(4), config)
    assert found.regions == expected.regions
    assert [found[i]["boxes"] for i in range(4)] == [expected.regions[row["id"]][0] for row in data]
    trained = [question_and_generic_attention(m, processor, examples[0], None, [0, 1, 2]) for m in (model, plain)]
    assert abs(trained[0][0] - trained[1][0]).max() > 1e-5  # the adapter would have made a difference
    assert len({len(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*/*.jsonl")}) == 1


def bare_rows(folder: Path, count: int = 6, **more) -> str:
    """A data set without boxes: rows of a.png and b.png."""
    rows = [without("boxes") | {"id": str(number), "question": f"What is {number}?"} | more for number in range(count)]
    Image.effect_noise((150, 90), 60).convert("RGB").save(folder / "a.png")
    return write_jsonl(folder, *rows)


def small_config(folder: Path, data: str, **settings) -> AttentionRegionsConfig:
    options = {"data": data, "out": str(folder / "out.jsonl"), "regions_folder": str(folder / "kept")}
    return AttentionRegionsConfig(**(options | settings))


def kept_file(folder: Path) -> Path:
    (path,) = (folder / "kept").glob("*.jsonl")
    return path


def count_calls(monkeypatch, stop_after: int | None = None) -> list:
    """The ids of the examples whose regions are computed from now on."""
    asked = []

    def counted(model, processor, example, *arguments, **options):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(example["id"])
        return attention_boxes(model, processor, example, *arguments, **options)

    monkeypatch.setattr(regions, "attention_boxes", counted)
    return asked


def test_a_stopped_computation_goes_on_and_leaves_the_same_files(folder, monkeypatch, tmp_path):
    data = bare_rows(folder)
    regions.main(small_config(folder, data))
    expected = kept_file(folder).read_bytes(), (folder / "out.jsonl").read_bytes()
    shutil.rmtree(folder / "kept")
    (folder / "out.jsonl").unlink()
    monkeypatch.setattr(regions, "AT_A_TIME", 2)
    count_calls(monkeypatch, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        regions.main(small_config(folder, data))
    path = kept_file(folder)
    assert path.read_bytes() == b"".join(expected[0].splitlines(True)[:4]) and not (folder / "out.jsonl").exists()
    path.write_bytes(path.read_bytes()[:-9])  # as if it had been killed while it wrote the fourth
    asked = count_calls(monkeypatch)
    regions.main(small_config(folder, data))
    assert asked == ["3", "4", "5"]
    assert (path.read_bytes(), (folder / "out.jsonl").read_bytes()) == expected
    regions.main(small_config(folder, data))
    assert asked == ["3", "4", "5"]  # nothing is computed twice


def test_what_is_kept_names_the_model_and_its_settings(folder):
    regions.main(small_config(folder, bare_rows(folder)))
    rows = [json.loads(line) for line in kept_file(folder).read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    settings = json.loads(kept_file(folder).with_suffix(".settings.json").read_text(encoding="utf-8"))
    assert settings["generic_question"] == GENERIC_QUESTION and settings["region_layers"] == [0, 1, 2, 3]
    assert {row["settings"] for row in rows} == {regions.short_hash(settings)}
    assert {row["model"] for row in rows} == {settings["model"]} == {"data/tiny_policy"}
    assert all(len(box) == 4 for row in rows for box in row["boxes"][0])


@pytest.mark.parametrize(
    "changed",
    [
        {"region_share": 0.4},
        {"region_layers": [-1]},
        {"system_prompt": "Look there."},
        {"max_pixels": 4096},
        {"dtype": "bfloat16"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_other_regions(folder, monkeypatch, changed):
    data = bare_rows(folder, 2)
    asked = count_calls(monkeypatch)
    for settings in ({}, changed, {}, changed):
        regions.main(small_config(folder, data, **settings))
    assert asked == ["0", "1"] * 2
    assert len(list((folder / "kept").glob("*.jsonl"))) == 2


def test_other_weights_under_the_same_name_are_noticed(folder, monkeypatch, model_folders, tmp_path):
    model = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "model")
    data, asked = bare_rows(folder, 2), count_calls(monkeypatch)
    regions.main(small_config(folder, data, model=str(model)))
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] * 1.5}, model / "model.safetensors", {"format": "pt"})
    regions.main(small_config(folder, data, model=str(model)))
    assert asked == ["0", "1"] * 2


def test_changed_examples_are_computed_again_and_said(folder, monkeypatch, capsys):
    data, asked = bare_rows(folder, 3), count_calls(monkeypatch)
    regions.main(small_config(folder, data))
    text = Path(data).read_text(encoding="utf-8")
    Path(data).write_text(text.replace("What is 1?", "Where is 1?"))
    regions.main(small_config(folder, data))
    assert asked == ["0", "1", "2", "1"] and "1 examples changed, the first is '1'" in capsys.readouterr().out
    Image.effect_noise((150, 90), 60).convert("RGB").save(folder / "a.png")  # another picture of the same name
    regions.main(small_config(folder, data))
    assert asked == ["0", "1", "2", "1", "0", "1", "2"]
    assert "3 examples changed" in capsys.readouterr().out


def test_a_file_of_other_settings_is_refused(folder):
    data = bare_rows(folder, 2)
    regions.main(small_config(folder, data))
    path = kept_file(folder)
    path.write_text(path.read_text(encoding="utf-8").replace('"settings": "', '"settings": "x'))
    with pytest.raises(ConfigError, match="2 of 2 lines were made with other settings, the first is '0'"):
        regions.main(small_config(folder, data))


def test_settings_that_cannot_be_are_named(folder):
    with pytest.raises(ConfigError) as error:
        read_config(AttentionRegionsConfig, ["--region_share", "0", "--adapter", "x", "--regions_folder", __file__])
    for part in ("region_share=0.0", "adapter='x'", "regions_folder=", "out: give"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"region_layers=\[9\].*layers 0 to 3"):
        regions.main(small_config(folder, bare_rows(folder, 1), region_layers=[9]))
    with pytest.raises(ConfigError, match=r"out='.*' is the data itself"):
        read_config(AttentionRegionsConfig, ["--data", str(folder / "a.jsonl"), "--out", str(folder / "a.jsonl")])
    (folder / "file").touch()
    with pytest.raises(ConfigError, match=r"regions_folder='.*/file/below' cannot be written to"):
        regions.main(small_config(folder, bare_rows(folder, 1), regions_folder=str(folder / "file" / "below")))
    with pytest.raises(ConfigError, match="has no regions to compare with"):
        regions.main(small_config(folder, bare_rows(folder, 1), measure=True))


# --- the data set that is written --------------------------------------------------------------------------------


def test_what_is_written_is_a_data_set(folder, tmp_path, capsys):
    rows = [
        without("boxes") | {"id": "one", "choices": ["red", "blue"], "note": "gone"},
        two([], id="two", answer_type="text"),
    ]
    data = write_jsonl(folder, *rows)
    regions.main(small_config(folder, data))
    loaded = load_examples(str(folder / "out.jsonl"))  # requires boxes, and finds them
    assert [row["id"] for row in loaded] == ["one", "two"] and loaded[0]["choices"] == ["red", "blue"]
    kept = {
        row["id"]: row["boxes"] for row in map(json.loads, kept_file(folder).read_text(encoding="utf-8").splitlines())
    }
    assert loaded[0]["boxes"] == kept["one"][0] and loaded[1]["boxes"] == kept["two"]
    assert loaded[0]["regions"]["model"] == "data/tiny_policy"
    assert "against the data's own regions" not in capsys.readouterr().out
    away = small_config(folder, data, out=str(tmp_path / "away" / "out.jsonl"))
    regions.main(away)
    assert f"--allowed_folders {folder}" in capsys.readouterr().out
    assert load_examples(away.out, allowed_folders=[str(folder)])[1]["boxes"] == kept["two"]


def test_scenes_are_written_with_their_pictures_and_measured(folder, capsys):
    config = small_config(folder, "scenes", limit=5, measure=True)
    regions.main(config)
    printed = capsys.readouterr().out
    for name in ("layer 3, plain", "mean of layers, relative", "random cells", "centre", "whole picture"):
        assert name in printed
    drawn, loaded = load_examples("scenes", limit=5), load_examples(config.out)
    assert [row["id"] for row in loaded] == [row["id"] for row in drawn]
    for row, other in zip(loaded, drawn, strict=True):
        assert row["image"].tobytes() == other["image"].tobytes() and row["kind"] == other["kind"]
    assert "5 examples of scenes" in printed and "against the data's own regions" in printed


def test_true_regions_agree_with_themselves(policy):
    """And the whole picture's precision is the true share of the picture: an independent sum of areas."""
    data = load_examples("scenes", limit=6)
    own = WithRegions(data, {row["id"]: [row["boxes"]] for row in data})
    means = measure_regions(policy[1], own, data, range(6), 0.2)
    found = {key: value / means.count for key, value in means.sums["relative attention"].items()}
    assert found == pytest.approx({"IoU": 1, "precision": 1, "recall": 1, "area": found["area"]})
    shares = []
    for row in data:
        painted = np.zeros(row["image"].size[::-1])
        for x1, y1, x2, y2 in row["boxes"]:
            painted[y1:y2, x1:x2] = 1
        shares.append(painted.mean())
    assert means.sums["whole picture"]["precision"] / 6 == pytest.approx(np.mean(shares), abs=0.003)
    assert found["area"] == pytest.approx(np.mean(shares), abs=0.003)


# --- training ----------------------------------------------------------------------------------------------------

TRAINED = {"regions": "attention", "limit": None, "eval_data": None, "max_steps": 2, "groups_per_step": 2}


def test_training_without_any_boxes_and_again_from_what_is_kept(folder, monkeypatch, tmp_path):
    data, asked = bare_rows(folder, 9), count_calls(monkeypatch)
    settings = TRAINED | {"data": data, "regions_folder": str(folder / "kept")}
    rows = run(tmp_path / "one", **settings)
    used = {str(example_index(0, position, 9)) for position in range(4)}
    assert set(asked) == used and len(asked) == 4  # not the other five
    assert all(row["reward/tas"] is not None and row["reward_std/attention"] > 0 for row in rows)
    assert run(tmp_path / "two", **settings) == rows and len(asked) == 4
    resumed = run(tmp_path / "two", **settings | {"resume": True, "max_steps": 4})
    assert resumed[:2] == rows and len(resumed) == 4
    assert len(asked) == len({example_index(0, position, 9) for position in range(8)})
    # Boxes that the data has change nothing.
    boxed = write_jsonl(
        folder, *(json.loads(line) | {"boxes": [[0, 0, 9, 9]]} for line in Path(data).open(encoding="utf-8"))
    )
    assert run(tmp_path / "three", **settings | {"data": boxed}) == rows
    assert run(tmp_path / "four", **settings | {"data": boxed, "regions": "boxes"}) != rows


def test_held_out_data_keeps_its_own_boxes(monkeypatch, tmp_path):
    seen = {}
    evaluate = train_rl.evaluate_shared

    def look(model, processor, held_out, *arguments):
        seen["boxes"] = [row["boxes"] for row in held_out[:3]]
        return evaluate(model, processor, held_out, *arguments)

    monkeypatch.setattr(train_rl, "evaluate_shared", look)
    settings = TRAINED | {"limit": 3, "eval_limit": 3, "max_steps": 1, "regions_folder": str(tmp_path / "kept")}
    run(tmp_path / "run", **settings)
    assert seen["boxes"] == [row["boxes"] for row in load_examples("scenes:heldout", limit=3)]


def test_two_processes_share_the_work_and_keep_the_same_regions(folder, tmp_path):
    settings = TRAINED | {"data": bare_rows(folder, 9), "max_steps": 2, "groups_per_step": 4}
    rows = run(tmp_path / "one", **settings, regions_folder=str(tmp_path / "kept_one"))
    settings |= {"output_dir": tmp_path / "two", "regions_folder": tmp_path / "kept_two", "save_steps": 2}
    settings |= {"num_generations": 3, "max_new_tokens": 24, "lora_rank": 2, "learning_rate": 1e-3}
    arguments = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_rl.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    arguments.append("--report_to=none")
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    kept = [
        next((tmp_path / name).glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
        for name in ("kept_one", "kept_two")
    ]
    assert sorted(kept[0]) == sorted(kept[1]) and len(kept[1]) >= 6
    found = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, other in zip(rows, found, strict=True):
        assert other["reward/attention"] == pytest.approx(row["reward/attention"], rel=1e-4, abs=1e-5)


def test_a_prompt_of_an_example_has_its_region(policy, tmp_path):
    """What the reward sees: the coverage of the prompt is that of the kept boxes, polygons and masks are gone."""
    data = load_examples("scenes", limit=2)
    found = attention_regions(*policy, data, [1], Config(regions_folder=str(tmp_path / "kept")))
    assert len(found) == 2 and found.name == "scenes" and found[0]["boxes"] == [] and found[:2][1]["boxes"]
    assert found.peek(1)["boxes"] == found.regions[data[1]["id"]]
    coverage = encode_prompt(policy[1], found[1]).coverage
    assert torch.equal(coverage, region_coverage(policy[1], data[1]["images"], found[1]["boxes"]))
    assert coverage.mean().item() == pytest.approx(0.2, abs=0.05)


def test_cells_of_a_large_picture_are_as_exact_as_those_of_others(model_folders):
    """Their places came in 256 steps: boxes of cells missed up to two thirds of them, and were never merged."""
    _, processor = load_processor(model_folders["qwen3_vl"], max_pixels=1_500_000)
    picture = Image.new("RGB", (8500, 1000))
    count = len(region_coverage(processor, [picture], []))
    (one,) = per_picture(processor, [picture], torch.zeros(0, count), torch.zeros(0, count))
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
    boxes = merge_cells(one.cells[chosen])
    coverage = region_coverage(processor, [picture], boxes)
    assert count > 1000 and coverage[chosen].min() > 0.9 and coverage[~chosen].max() < 0.1
    assert len(merge_cells(one.cells)) == 1
