"""Regions made of attention: the formula against NumPy and eager attentions, cells as boxes, files, training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, PACKED, two, without, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from process_scenarios import launch, succeeded
from safetensors.torch import load_file, save_file
from small_run import rows_of, run

import evaluate
from sayo.examples.load import load_examples
from sayo.extensions import attention_regions as regions
from sayo.extensions import relative_attention as relative
from sayo.extensions.attention_regions import WithRegions, attention_regions
from sayo.model.loading import load_policy, load_processor
from sayo.model.prompts import encode_prompt, prompt_text, region_coverage
from sayo.settings import ConfigError, read_config
from tools.attention_regions import AttentionRegionsConfig, agreement, main, measure_regions
from train_rl import Config, example_index

TILED = ("internvl", "smolvlm", "smolvlm_2b")
LAYERS = {"qwen3_vl": [0, 1, 2, 3], "qwen3_5": [3]}


def eager_attention(model, processor, example, question) -> np.ndarray:
    """(L, N) of transformers' own output_attentions, averaged over heads by NumPy, in float64."""
    text = prompt_text(processor, example | {"question": question}, "Look.")
    inputs = processor(text=[text], images=[example["image"]], return_tensors="pt")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    is_image = (inputs["input_ids"][0] == processor.image_token_id).numpy()
    rows = [layer[0, :, -1].double().numpy() for layer in attentions if layer is not None]  # (H, S) each
    return np.stack([row.mean(0)[is_image] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_relative_attention_is_that_of_eager_output_attentions(model_folders, examples, family):
    probed, processor = load_policy(model_folders[family], lora_rank=0, dtype="float32")
    probed.requires_grad_(False)
    eager, _ = load_policy(model_folders[family], lora_rank=0, dtype="float32", attn="eager")
    example, layers = examples[2], LAYERS.get(family, [0, 1, 2])
    found = relative.question_and_generic_attention(probed, processor, example, "Look.", layers)
    texts = example["question"], relative.GENERIC_QUESTION
    expected = [eager_attention(eager, processor, example, text) for text in texts]
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(part.numpy(), other, rtol=1e-4, atol=1e-7)
    assert abs(found[0] - found[1]).max() > 1e-5  # the question matters
    (one,) = relative.per_picture(processor, [example["image"]], *found)
    if family not in TILED:  # no thumbnail: one cell for each token
        np.testing.assert_allclose(one.relative().numpy(), expected[0] / expected[1], rtol=3e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm"])
def test_attention_on_a_thumbnail_is_spread_over_what_it_shows(policies, family):
    processor, picture = policies[family][1], Image.new("RGB", (252, 168))
    count = len(region_coverage(processor, [picture], []))
    attention = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    (one,) = relative.per_picture(processor, [picture], attention, torch.zeros_like(attention))
    areas = (one.cells[:, 2:] - one.cells[:, :2]).prod(-1).float()
    assert areas.sum().item() == pytest.approx(252 * 168, rel=0.01)
    torch.testing.assert_close((one.asked * areas).sum(-1), attention.sum(-1), rtol=0.02, atol=0)
    assert int(one.is_tile.sum()) == len(one.cells) == (count if family == "qwen3_vl" else len(areas))
    assert (one.is_tile.all() == (family == "qwen3_vl")).item()
    last = torch.zeros(1, count)
    last[0, -1] = 1
    (one,) = relative.per_picture(processor, [picture], last, last)
    reached = one.cells[one.asked[0] > one.asked.max() / 2]
    assert reached[:, 0].min() > 126 and reached[:, 1].min() > 84


def boxes_of_some(processor, picture, share):
    """(cells of a picture, which of them are chosen by chance, the boxes of those)."""
    count = len(region_coverage(processor, [picture], []))
    (one,) = relative.per_picture(processor, [picture], torch.zeros(0, count), torch.zeros(0, count))
    chosen = torch.rand(len(one.cells), generator=torch.Generator().manual_seed(1)) < share
    return one, chosen, relative.merge_cells(one.cells[chosen])


@pytest.mark.parametrize("size", [(64, 96), (333, 222), (50, 400), (1300, 700)], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "smolvlm_2b"])
def test_the_coverage_of_the_boxes_of_cells_is_those_cells(policies, family, size):
    processor, picture = policies[family][1], Image.new("RGB", size)
    one, chosen, boxes = boxes_of_some(processor, picture, 0.35)
    assert len(boxes) <= chosen.sum()
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    coverage = region_coverage(processor, [picture], boxes)[one.is_tile]
    # Painted edges are whole pixels: half of one is a lot where a token sees less than three.
    most = 0.2 if (one.cells[:, 2:] - one.cells[:, :2]).min() > 8 else 0.4
    assert coverage[chosen].min() > 1 - most and coverage[~chosen].max() < most
    assert torch.equal(coverage > 0.5, chosen)


def test_cells_of_a_large_picture_are_as_exact_as_those_of_others(model_folders):
    _, processor = load_processor(model_folders["qwen3_vl"], max_pixels=1_500_000)
    one, chosen, boxes = boxes_of_some(processor, picture := Image.new("RGB", (8500, 1000)), 0.5)
    coverage = region_coverage(processor, [picture], boxes)
    assert len(chosen) > 1000 and coverage[chosen].min() > 0.9 and coverage[~chosen].max() < 0.1
    assert len(relative.merge_cells(one.cells)) == 1


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_merged_cells_are_the_same_region_without_overlap(rows, columns, data):
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    chosen = chosen.reshape(rows, columns)
    cells = [[5 * x, 7 * y, 5 * x + 5, 7 * y + 7] for y, x in np.argwhere(chosen)]
    boxes = relative.merge_cells(torch.tensor(cells, dtype=torch.float).view(-1, 4))
    painted = np.zeros((7 * rows, 5 * columns), dtype=int)
    for x1, y1, x2, y2 in np.array(boxes, dtype=int).reshape(-1, 4):
        painted[y1:y2, x1:x2] += 1
    assert (painted == chosen.repeat(7, 0).repeat(5, 1)).all()
    assert len(boxes) <= chosen.sum() and (len(boxes) == 1 or not chosen.all())  # a block is one box


def test_the_highest_cells_are_chosen_and_compared_by_their_overlap():
    # At least one; 2.5 of 4 rounds to 2, 2.52 to 3.
    for share, chosen in ((0.5, [1, 2]), (1.0, [0, 1, 2, 3]), (0.01, [1]), (0.63, [0, 1, 2])):
        assert relative.choose_cells(torch.tensor([0.2, 0.9, 0.4, 0.1]), share).nonzero().flatten().tolist() == chosen
    found = agreement(
        torch.tensor([0.5, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1, 4, 3, 2.0])
    )
    expected = {"IoU": 0.5 / 3, "precision": 0.5 / 2, "recall": 0.5 / 1.5, "area": 0.5, "inside": 3.5 / 10, "hit": 0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_regions_of_several_pictures(policies, examples, family):
    model, processor = policies[family]
    pictures = [examples[0]["image"], Image.new("RGB", (150, 90), "gray")]
    example = {"images": pictures, "question": "Which is larger?", "id": "two"}
    layers = LAYERS.get(family, [0, 1, 2])
    boxes = relative.attention_boxes(model, processor, example, None, layers=layers, share=0.5)
    found = relative.question_and_generic_attention(model, processor, example, None, layers)
    maps = relative.per_picture(processor, pictures, *found)
    values = np.concatenate([one.relative().mean(0).numpy() for one in maps])
    expected = values >= np.sort(values)[::-1][max(1, round(0.5 * len(values))) - 1]
    coverage = region_coverage(processor, pictures, boxes)[torch.cat([one.is_tile for one in maps])]
    assert ((coverage > 0.5).numpy() == expected).all()
    # One of them alone has all of the region.
    example = {"image": pictures[1], "question": "?"}
    ((box,),) = relative.attention_boxes(model, processor, example, None, layers=layers, share=1.0)
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
    given = processor, examples[0], None, [0, 1, 2]
    asked, other = (relative.question_and_generic_attention(policy, *given)[0] for policy in (model, plain))
    assert abs(asked - other).max() > 1e-5  # the adapter would have made a difference
    assert len({len(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*/*.jsonl")}) == 1


def bare_rows(folder: Path, count: int = 6, **more) -> str:
    """A data set without boxes: rows of a.png and b.png."""
    rows = [without("boxes") | {"id": str(number), "question": f"What is {number}?"} | more for number in range(count)]
    Image.effect_noise((150, 90), 60).convert("RGB").save(folder / "a.png")
    return write_jsonl(folder, *rows)


def keep(folder: Path, data: str, **settings) -> None:
    """Run the command on the data: regions in folder/kept, a data set in folder/out.jsonl."""
    options = {"data": data, "out": str(folder / "out.jsonl"), "regions_folder": str(folder / "kept")}
    main(AttentionRegionsConfig(**(options | settings)))


def kept_file(folder: Path) -> Path:
    (path,) = (folder / "kept").glob("*.jsonl")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count_calls(monkeypatch, stop_after: int | None = None) -> list:
    """The ids of the examples whose regions are computed from now on."""
    asked = []

    def counted(model, processor, example, *arguments, **options):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(example["id"])
        return relative.attention_boxes(model, processor, example, *arguments, **options)

    monkeypatch.setattr(regions, "attention_boxes", counted)
    return asked


def test_a_stopped_computation_goes_on_and_leaves_the_same_files(folder, monkeypatch, tmp_path):
    data = bare_rows(folder)
    keep(folder, data)
    expected = kept_file(folder).read_bytes(), (folder / "out.jsonl").read_bytes()
    shutil.rmtree(folder / "kept")
    (folder / "out.jsonl").unlink()
    monkeypatch.setattr(regions, "AT_A_TIME", 2)
    count_calls(monkeypatch, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        keep(folder, data)
    path = kept_file(folder)
    assert path.read_bytes() == b"".join(expected[0].splitlines(True)[:4]) and not (folder / "out.jsonl").exists()
    path.write_bytes(path.read_bytes()[:-9])  # as if it had been killed while it wrote the fourth
    asked = count_calls(monkeypatch)
    keep(folder, data)
    assert asked == ["3", "4", "5"]
    assert (path.read_bytes(), (folder / "out.jsonl").read_bytes()) == expected
    keep(folder, data)
    assert asked == ["3", "4", "5"]  # nothing is computed twice


def test_what_is_kept_names_the_model_and_its_settings(folder):
    keep(folder, bare_rows(folder))
    rows = lines(kept_file(folder))
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    settings = json.loads(kept_file(folder).with_suffix(".settings.json").read_text(encoding="utf-8"))
    assert settings["generic_question"] == relative.GENERIC_QUESTION and settings["region_layers"] == [0, 1, 2, 3]
    assert {row["settings"] for row in rows} == {regions.short_hash(settings)}
    assert {row["model"] for row in rows} == {settings["model"]} == {"data/tiny_policy"}
    assert all(len(box) == 4 for row in rows for box in row["boxes"][0])


CHANGED = {"region_share": 0.4, "region_layers": [-1], "system_prompt": "Look there.", "max_pixels": 4096}


@pytest.mark.parametrize(("name", "value"), (CHANGED | {"dtype": "bfloat16"}).items())
def test_other_settings_are_other_regions(folder, monkeypatch, name, value):
    data, asked = bare_rows(folder, 2), count_calls(monkeypatch)
    for settings in ({}, {name: value}) * 2:
        keep(folder, data, **settings)
    assert asked == ["0", "1"] * 2
    assert len(list((folder / "kept").glob("*.jsonl"))) == 2


def test_other_weights_under_the_same_name_are_noticed(folder, monkeypatch, model_folders, tmp_path):
    model = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "model")
    data, asked = bare_rows(folder, 2), count_calls(monkeypatch)
    keep(folder, data, model=str(model))
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] * 1.5}, model / "model.safetensors", {"format": "pt"})
    keep(folder, data, model=str(model))
    assert asked == ["0", "1"] * 2


def test_changed_examples_are_computed_again_and_said(folder, monkeypatch, capsys):
    data, asked = bare_rows(folder, 3), count_calls(monkeypatch)
    keep(folder, data)
    text = Path(data).read_text(encoding="utf-8")
    Path(data).write_text(text.replace("What is 1?", "Where is 1?"))
    keep(folder, data)
    assert asked == ["0", "1", "2", "1"] and "1 examples changed, the first is '1'" in capsys.readouterr().out
    Image.effect_noise((150, 90), 60).convert("RGB").save(folder / "a.png")  # another picture of the same name
    keep(folder, data)
    assert asked == ["0", "1", "2", "1", "0", "1", "2"]
    assert "3 examples changed" in capsys.readouterr().out


def test_a_file_of_other_settings_is_refused(folder):
    data = bare_rows(folder, 2)
    keep(folder, data)
    path = kept_file(folder)
    path.write_text(path.read_text(encoding="utf-8").replace('"settings": "', '"settings": "x'))
    with pytest.raises(ConfigError, match="2 of 2 lines were made with other settings, the first is '0'"):
        keep(folder, data)


def test_settings_that_cannot_be_are_named(folder):
    for flags, words in (
        (f"--region_share 0 --adapter x --regions_folder {__file__}", "(?s)share=0.0.*folder=.*out: .*adapter='x'"),
        (f"--data {folder}/a.jsonl --out {folder}/a.jsonl", "out='.*' is the data itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_config(AttentionRegionsConfig, flags.split())
    for name, value, words in (
        ("region_layers", [9], r"region_layers=\[9\].*layers 0 to 3"),
        ("regions_folder", f"{__file__}/below", r"regions_folder='.*\.py/below' cannot be written to"),
        ("measure", True, "has no regions to compare with"),
    ):
        with pytest.raises(ConfigError, match=words):
            keep(folder, bare_rows(folder, 1), **{name: value})


def test_what_is_written_is_a_data_set(folder, tmp_path, capsys):
    first = without("boxes") | {"id": "one", "choices": ["red", "blue"], "note": "gone"}
    data = write_jsonl(folder, first, two([], id="two", answer_type="text"))
    keep(folder, data)
    loaded = load_examples(str(folder / "out.jsonl"))  # requires boxes, and finds them
    assert [row["id"] for row in loaded] == ["one", "two"] and loaded[0]["choices"] == ["red", "blue"]
    kept = {row["id"]: row["boxes"] for row in lines(kept_file(folder))}
    assert loaded[0]["boxes"] == kept["one"][0] and loaded[1]["boxes"] == kept["two"]
    assert loaded[0]["regions"]["model"] == "data/tiny_policy"
    assert "against the data's own regions" not in capsys.readouterr().out
    away = str(tmp_path / "away" / "out.jsonl")
    keep(folder, data, out=away)
    assert f"--allowed_folders {folder}" in capsys.readouterr().out
    assert load_examples(away, allowed_folders=[str(folder)])[1]["boxes"] == kept["two"]


def test_scenes_are_written_with_their_pictures_and_measured(folder, capsys):
    keep(folder, "scenes", limit=5, measure=True)
    printed = capsys.readouterr().out
    for name in ("layer 3, plain", "mean of layers, relative", "random cells", "centre", "whole picture"):
        assert name in printed
    drawn, loaded = load_examples("scenes", limit=5), load_examples(str(folder / "out.jsonl"))
    assert [row["id"] for row in loaded] == [row["id"] for row in drawn]
    for row, other in zip(loaded, drawn, strict=True):
        assert row["image"].tobytes() == other["image"].tobytes() and row["kind"] == other["kind"]
    assert "5 examples of scenes" in printed and "against the data's own regions" in printed


def test_true_regions_agree_with_themselves(policy):
    data = load_examples("scenes", limit=6)
    own = WithRegions(data, {row["id"]: [row["boxes"]] for row in data})
    sums, count = measure_regions(policy[1], own, data, 0.2)
    found = {key: value / count for key, value in sums["relative attention"].items()}
    assert found == pytest.approx({"IoU": 1, "precision": 1, "recall": 1, "area": found["area"]})
    shares = []
    for row in data:
        painted = np.zeros(row["image"].size[::-1])
        for x1, y1, x2, y2 in row["boxes"]:
            painted[y1:y2, x1:x2] = 1
        shares.append(painted.mean())
    assert sums["whole picture"]["precision"] / 6 == pytest.approx(np.mean(shares), abs=0.003)
    assert found["area"] == pytest.approx(np.mean(shares), abs=0.003)


TRAINED = {"regions": "attention", "limit": None, "eval_data": None, "max_steps": 2, "groups_per_step": 2}


def test_training_without_any_boxes_and_again_from_what_is_kept(folder, monkeypatch, tmp_path):
    data, asked = bare_rows(folder, 9), count_calls(monkeypatch)
    settings = TRAINED | {"data": data, "regions_folder": str(folder / "kept")}
    rows = run(tmp_path / "one", **settings)
    assert sorted(asked) == sorted(str(example_index(0, position, 9)) for position in range(4))  # not the other five
    assert all(row["reward/tas"] is not None and row["reward_std/attention"] > 0 for row in rows)
    assert run(tmp_path / "two", **settings) == rows and len(asked) == 4
    resumed = run(tmp_path / "two", **settings | {"resume": True, "max_steps": 4})
    assert resumed[:2] == rows and len(resumed) == 4
    assert len(asked) == len({example_index(0, position, 9) for position in range(8)})
    # Boxes that the data has change nothing.
    boxed = write_jsonl(folder, *(row | {"boxes": [[0, 0, 9, 9]]} for row in lines(Path(data))))
    assert run(tmp_path / "three", **settings | {"data": boxed}) == rows
    assert run(tmp_path / "four", **settings | {"data": boxed, "regions": "boxes"}) != rows


def test_held_out_data_keeps_its_own_boxes(monkeypatch, tmp_path):
    seen, shared = [], evaluate.evaluate_shared
    monkeypatch.setattr(evaluate, "evaluate_shared", lambda *given: seen.append(given[2][:3]) or shared(*given))
    settings = TRAINED | {"limit": 3, "eval_limit": 3, "max_steps": 1, "regions_folder": str(tmp_path / "kept")}
    run(tmp_path / "run", **settings)
    expected = [row["boxes"] for row in load_examples("scenes:heldout", limit=3)]
    assert seen and all([row["boxes"] for row in rows] == expected for rows in seen)


def test_two_processes_share_the_work_and_keep_the_same_regions(folder, tmp_path):
    settings = TRAINED | {"data": bare_rows(folder, 9), "limit": 9, "eval_data": "none", "groups_per_step": 4}
    settings |= {"warmup_steps": 0, "try_biggest": False}
    rows = run(tmp_path / "one", **settings, regions_folder=str(tmp_path / "kept_one"))
    succeeded(launch("plain", tmp_path / "two", **settings, regions_folder=tmp_path / "kept_two"))
    kept = [next((tmp_path / name).glob("*.jsonl")).read_text().splitlines() for name in ("kept_one", "kept_two")]
    assert sorted(kept[0]) == sorted(kept[1]) and len(kept[1]) >= 6
    for row, other in zip(rows, rows_of(tmp_path / "two"), strict=True):
        assert other["reward/attention"] == pytest.approx(row["reward/attention"], rel=1e-4, abs=1e-5)


def test_a_prompt_of_an_example_has_its_region(policy, tmp_path):
    data = load_examples("scenes", limit=2)
    found = attention_regions(*policy, data, [1], Config(regions_folder=str(tmp_path / "kept")))
    assert len(found) == 2 and found.name == "scenes" and found[0]["boxes"] == [] and found[:2][1]["boxes"]
    assert found.raw(1)["boxes"] == found.regions[data[1]["id"]]
    coverage = encode_prompt(policy[1], found[1]).coverage
    assert torch.equal(coverage, region_coverage(policy[1], data[1]["images"], found[1]["boxes"]))
    assert coverage.mean().item() == pytest.approx(0.2, abs=0.05)
