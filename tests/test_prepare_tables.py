"""ReFocus_Data and saliency-r1-8k, in the Hub's own format: which rows, boxes and pictures come out."""

import json
from pathlib import Path

import datasets
import pytest
from prepare_folders import build_refocus, contents, encoded, push_to_folder, read_lines

from config import ConfigError, read_config
from data import prepare, prepare_refocus, prepare_saliency_r1
from data.examples import DataError, load_examples
from data.prepare_refocus import RefocusConfig
from data.prepare_rows import Dropped, Picture
from data.prepare_saliency_r1 import SaliencyConfig


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_ROWS", 5)


# --- ReFocus_Data ------------------------------------------------------------------------------------------------


@pytest.fixture
def refocus(tmp_path):
    return build_refocus(tmp_path / "refocus")


def refocus_config(refocus, out: Path, **more) -> RefocusConfig:
    return RefocusConfig(data=refocus[0], out=str(out), **{"num_processes": 1} | more)


def test_refocus(refocus, tmp_path):
    _, boxes, pictures, reasons = refocus
    report = prepare_refocus.main(refocus_config(refocus, tmp_path / "out", num_processes=2))
    rows = read_lines(tmp_path / "out")
    assert {row["id"] for row in rows} == set(boxes) and report["kept"] == len(boxes)
    assert report["dropped"] == {reason: len(keys) for reason, keys in reasons.items()}
    for row in rows:
        if row["question"] == "Another question?":  # of the two rows with one id, the seed says which is kept
            continue
        assert row["boxes"] == boxes[row["id"]] and row["question"] == f"How many for {row['id']}?"
        assert (row["answer"], row["source"]) == ("7", "refocus")
        assert (tmp_path / "out" / row["image"]).read_bytes() == pictures[row["id"]]
    files = {f"images/{path.name}" for path in (tmp_path / "out" / "images").iterdir()}
    assert files == {row["image"] for row in rows}
    by_id = {row["id"]: row["image"] for row in rows}
    assert by_id["plain 0"] == by_id["same picture"] and by_id["jpeg"].endswith(".jpg")
    examples = load_examples(str(tmp_path / "out" / "train.jsonl"))
    assert len(examples) == len(boxes) and not examples.skipped


def test_areas_as_a_list_of_structs():
    row = {"question": "Q?", "answer": "1", "focus_areas_bbox": [{"x1": 1, "y1": 2, "x2": 3, "y2": 4}]}
    assert prepare_refocus.convert(row, Picture(9, 9))["boxes"] == [[1, 2, 3, 4]]
    for areas, reason in [(None, "no focus area"), ([{"x1": 1}], "another form"), ({"x1": 3, "y1": 1}, "another form")]:
        with pytest.raises(Dropped, match=reason):
            prepare_refocus.convert(row | {"focus_areas_bbox": areas}, Picture(9, 9))


def test_refocus_goes_on_after_a_stop(refocus, tmp_path, monkeypatch):
    prepare_refocus.main(refocus_config(refocus, tmp_path / "whole", limit=20))
    whole, convert = contents(tmp_path / "whole"), prepare_refocus.convert
    for after in (1, 9, 17):
        out, calls = tmp_path / str(after), iter(range(after))

        def failing(row, picture, calls=calls):
            if next(calls, None) is None:
                raise OSError("stop")
            return convert(row, picture)

        monkeypatch.setattr(prepare_refocus, "convert", failing)
        with pytest.raises(DataError, match="stop"):
            prepare_refocus.main(refocus_config(refocus, out, limit=20))
        monkeypatch.setattr(prepare_refocus, "convert", convert)
        prepare_refocus.main(refocus_config(refocus, out, limit=20, num_processes=2))
        assert contents(out) == whole


def test_a_wrong_column_does_not_claim_the_folder(tmp_path):
    table = datasets.Dataset.from_list([{"id": "1", "query": "?", "image": {"bytes": encoded(), "path": None}}])
    data = push_to_folder(table.cast_column("image", datasets.Image()), tmp_path / "other", num_shards=1)
    with pytest.raises(ConfigError, match="no column question, answer, focus_areas_bbox; columns present: id, query"):
        prepare_refocus.main(RefocusConfig(data=data, out=str(tmp_path / "out")))
    out = tmp_path / "out"
    prepare_refocus.main(RefocusConfig(data=build_refocus(tmp_path / "right")[0], out=str(out), num_processes=1))
    assert (out / "train.jsonl").exists()


def test_settings_of_the_tables(tmp_path):
    with pytest.raises(ConfigError, match="(?s)out is missing.*data is missing.*split is missing"):
        read_config(RefocusConfig, ["--data=", "--split="])
    assert read_config(RefocusConfig, ["--out", "x"]).data == "ReFocus/ReFocus_Data"
    assert read_config(SaliencyConfig, ["--out", "x"]).data == "peterant330/saliency-r1-8k"
    with pytest.raises(ConfigError, match="no Hub dataset that can be loaded"):
        prepare_refocus.main(read_config(RefocusConfig, ["--out", str(tmp_path / "out")]))


def test_settings_do_not_depend_on_the_working_directory(refocus, tmp_path, monkeypatch):
    """A folder ./train is not the split train."""
    config = refocus_config(refocus, tmp_path / "out", revision="main")
    before = config.settings()
    for name in ("train", "main"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.settings() == before and before["split"] == "train"
    monkeypatch.chdir(tmp_path)
    assert refocus_config(["refocus"], tmp_path / "out").settings()["data"] == str(tmp_path / "refocus")


# --- saliency-r1-8k ----------------------------------------------------------------------------------------------

SALIENCY = [  # box as it is written, boxes of the 200 x 100 picture or a reason
    ("[0.1, 0.2, 0.5, 0.9]", [[20, 20, 100, 90]]),
    ("[0.094, 0.312, 0.44, 0.795]", [[18.8, 31.2, 88, 79.5]]),
    ("[-0.004, 0.5, 1.002, 1.01]", [[0, 50, 200, 100]]),  # clipped
    ("[0.0, 0.0, 1.0, 1.0]", [[0, 0, 200, 100]]),
    ("[0.5, 0.5, 1.3, 0.9]", "box outside of its picture"),
    ("[0.5, 0.5, 0.5, 0.9]", "box without area"),
    ("[0.5, 0.5, 0.9]", "box is not four numbers"),
    ("somewhere", "box is not four numbers"),
    ("", "no box"),
    (None, "no box"),
]


def build_saliency(folder: Path, box_type=str, **names) -> str:
    rows = []
    for number, (box, _) in enumerate(SALIENCY):
        row = {
            "dataset": "CUB" if number % 2 else "DocVQA",
            "split": "train",
            "question_id": number % 2,  # repeats
            "problem": f"Question {number}?",
            "solution": "Yes",
            "bbox": box if box_type is str else json.loads(box) if box and box.startswith("[") else None,
            "image": {"bytes": encoded(f"hsl({number * 30}, 80%, 50%)", (200, 100)), "path": f"{number}.png"},
        }
        rows.append({names.get(name, name): value for name, value in row.items()})
    image = names.get("image", "image")
    return push_to_folder(datasets.Dataset.from_list(rows).cast_column(image, datasets.Image()), folder)


def test_saliency(tmp_path):
    out = tmp_path / "out"
    report = prepare_saliency_r1.main(SaliencyConfig(data=build_saliency(tmp_path / "hub"), out=str(out)))
    rows = {row["id"]: row for row in read_lines(out)}
    expected = {str(number): boxes for number, (_, boxes) in enumerate(SALIENCY) if isinstance(boxes, list)}
    assert {key: row["boxes"] for key, row in rows.items()} == expected
    reasons = [reason for _, reason in SALIENCY if isinstance(reason, str)]
    assert report["dropped"] == {reason: reasons.count(reason) for reason in reasons}
    for key, row in rows.items():
        assert (row["question"], row["answer"], row["source"]) == (f"Question {key}?", "Yes", "saliency_r1")
        assert (out / row["image"]).read_bytes() == encoded(f"hsl({int(key) * 30}, 80%, 50%)", (200, 100))
    examples = load_examples(str(out / "train.jsonl"))
    assert {example["id"]: example["boxes"] for example in examples} == expected


@pytest.mark.parametrize("box", ["[" * 3000, "[" * 900 + "]" * 900], ids=["not JSON", "JSON"])
def test_saliency_box_that_is_nested_deeply_is_dropped(box):
    with pytest.raises(Dropped) as caught:
        prepare_saliency_r1.convert({"problem": "Q?", "solution": "Yes", "bbox": box}, Picture(200, 100))
    assert caught.value.reason == "box is not four numbers"


def test_saliency_with_lists_and_other_names(tmp_path):
    names = {"problem": "query", "solution": "label", "bbox": "region", "image": "photo"}
    data, out = build_saliency(tmp_path / "hub", list, **names), tmp_path / "out"
    with pytest.raises(ConfigError, match="no column problem, solution, bbox, image; columns present: dataset, split"):
        prepare_saliency_r1.main(SaliencyConfig(data=data, out=str(out)))
    columns = {"question_column": "query", "answer_column": "label", "box_column": "region", "image_column": "photo"}
    report = prepare_saliency_r1.main(SaliencyConfig(data=data, out=str(out), num_processes=2, **columns))
    assert report["kept"] == 4 and read_lines(out)[0]["answer"] == "Yes"
