"""The example loader: every way in gives the same examples."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from benchmark_folders import hub_folder
from conftest import GOOD, two, without, write_jsonl
from PIL import Image

from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError, load_picture, measure_picture
from sayo.examples.scenes.scenes import load_scenes

ROWS = [
    {"id": "one", "image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]], "kind": "c"},
    {"id": "two", "image": "b.png", "question": "¿Qué?", "answer": "blue", "boxes": [[0, 0, 9.5, 50], [1, 2, 3, 4]]},
]
WHOLE = [{"kind": None} | row for row in ROWS]  # a table has every column in every row
FORMATS = ["train.jsonl", "train.json", "images.parquet", "paths.parquet", "no_bytes.parquet"]
FORMATS += ["saved", "saved_splits", "hub", "imagefolder"]


def encoded_rows(folder: Path) -> list[dict]:
    return [row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}} for row in WHOLE]


def as_dataset(folder: Path) -> datasets.Dataset:
    """The rows with the pictures as `datasets` images, encoded in the table."""
    return datasets.Dataset.from_list(encoded_rows(folder)).cast_column("image", datasets.Image())


def write(folder: Path, kind: str) -> str:
    """The rows in one of FORMATS."""
    table, path = as_dataset(folder), folder / kind
    match kind:
        case "train.jsonl":
            write_jsonl(folder, *ROWS)
        case "train.json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case "images.parquet":
            table.to_parquet(path)
        case "paths.parquet":
            datasets.Dataset.from_list(WHOLE).to_parquet(path)
        case "no_bytes.parquet":  # images without bytes, their paths relative to the Parquet file
            features = datasets.Dataset.from_list(encoded_rows(folder)).features
            rows = [row | {"image": {"bytes": None, "path": row["image"]}} for row in WHOLE]
            datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        case "saved":
            table.save_to_disk(path)
        case "saved_splits":
            datasets.DatasetDict({"test": table.select([1]), "train": table}).save_to_disk(path)
        case "hub":  # Parquet files and the README that push_to_hub writes
            rows = encoded_rows(folder)
            hub_folder(path, {"test": ("data/test.parquet", rows[1:]), "train": ("data/train.parquet", rows)})
        case "imagefolder":  # pictures and a metadata.jsonl
            path.mkdir()
            for row in ROWS:
                shutil.copy(folder / row["image"], path)
            write_jsonl(path, *({"file_name": row["image"]} | row for row in ROWS), name="metadata.jsonl")
    return str(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(folder, kind, monkeypatch):
    data = write(folder, kind)
    monkeypatch.chdir(folder.parent)  # nothing may count from the working directory
    examples = load_examples(data)
    assert examples.name == data and examples.skipped == [] and len(examples) == 2
    for example, row, size, color in zip(examples, ROWS, [(40, 30), (20, 50)], [(255, 0, 0), (0, 0, 255)], strict=True):
        assert {key: example.get(key) for key in row if key != "image"} | {"image": row["image"]} == row
        assert example["images"] == [example["image"]]
        assert example["image"].mode == "RGB" and example["image"].size == size
        assert example["image"].getpixel((3, 3)) == color


@pytest.mark.parametrize("kind", ["saved_splits", "hub"])
def test_split(folder, kind):
    data = write(folder, kind)
    assert [example["id"] for example in load_examples(data, split="test")] == ["two"]
    with pytest.raises(DataError, match="(?s)'?holiday'?.*train.*test|'?holiday'?.*test.*train"):
        load_examples(data, split="holiday")


def test_rows_of_a_table_are_numbered_from_zero(folder):
    as_dataset(folder).remove_columns("id").to_parquet(folder / "train.parquet")
    examples = load_examples(str(folder / "train.parquet"))
    assert [example["id"] for example in examples] == ["train.parquet:0", "train.parquet:1"]


def test_folder_of_several_parquet_files(folder):
    dataset = as_dataset(folder)
    (folder / "shards").mkdir()
    for number in range(2):
        dataset.select([number]).to_parquet(folder / "shards" / f"part-{number}.parquet")
    found = [(example["id"], example["image"].size) for example in load_examples(str(folder / "shards"))]
    assert found == [("one", (40, 30)), ("two", (20, 50))]


def test_changed_parquet_is_read_anew(folder):
    data = write(folder, "images.parquet")
    assert len(load_examples(data)) == 2
    as_dataset(folder).select([0]).to_parquet(data)
    assert len(load_examples(data)) == 1


def test_two_images_in_jsonl_and_parquet(folder):
    boxes = [[[1, 2, 3, 4], [0, 0, 40, 30]], []]
    data = write_jsonl(folder, two(boxes))
    encoded = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    rows = datasets.Dataset.from_list([two(boxes, images=encoded)])
    rows.cast_column("images", datasets.List(datasets.Image())).to_parquet(folder / "two.parquet")
    for source in (data, str(folder / "two.parquet")):
        example = load_examples(source)[0]
        assert [image.size for image in example["images"]] == [(40, 30), (20, 50)]
        assert example["boxes"] == boxes and "image" not in example


def test_images_with_one_picture_is_an_image(folder):
    rows = [two(boxes, images=["a.png"]) for boxes in ([1, 2, 3, 4], [[1, 2, 3, 4]], [[[1, 2, 3, 4]]])]
    for example in load_examples(write_jsonl(folder, *rows)):
        assert example["image"].size == (40, 30) and len(example["images"]) == 1
        assert example["boxes"] == [[1, 2, 3, 4]]


def test_rows_where_no_boxes_are_needed(folder):
    data = write_jsonl(folder, without("boxes"), GOOD | {"boxes": []}, two(None))
    assert [example["boxes"] for example in load_examples(data, require_boxes=False)] == [[], [], [[], []]]
    with pytest.raises(DataError, match="outside"):
        load_examples(write_jsonl(folder, GOOD | {"boxes": [[0, 0, 99, 9]]}), require_boxes=False)


def test_good_answers(folder):
    cases = [(answer, None) for answer in (3, 2.5, 0)] + [(answer, ["blue", "red"]) for answer in ("red", "B", "Red ")]
    cases.append((10, ["9", "10"]))
    rows = [GOOD | {"answer": answer, "choices": choices} for answer, choices in cases]
    for (answer, choices), example in zip(cases, load_examples(write_jsonl(folder, *rows)), strict=True):
        assert example["answer"] == str(answer) and example.get("choices") == choices
        assert ("choices" in example) == (choices is not None)


def test_id_zero_is_an_id(folder):
    data = write_jsonl(folder, GOOD | {"id": 0}, GOOD | {"id": ""})
    assert [example["id"] for example in load_examples(data)] == ["0", "train.jsonl:2"]


def test_limit_takes_the_first_good_rows_and_checks_no_further(folder):
    rows = [without("answer"), GOOD | {"id": "a"}, GOOD | {"id": "b"}, without("question"), GOOD | {"id": "c"}]
    data = write_jsonl(folder, *rows)
    examples = load_examples(data, limit=2, bad_rows="skip")
    assert [example["id"] for example in examples] == ["a", "b"]
    assert len(examples.skipped) == 1
    with pytest.raises(DataError, match="1 bad and 2 good rows"):
        load_examples(data, limit=2)
    assert len(load_examples(write_jsonl(folder, *rows[1:]), limit=2)) == 2
    assert len(load_examples(data, limit=99, bad_rows="skip")) == 3


def test_limit_is_not_troubled_by_pictures_further_on(folder):
    """Pictures of further rows are decoded meanwhile; what is wrong with them is nobody's business."""
    rows = [GOOD, *[GOOD | {"image": name} for name in ("cut.jpg", "gone.png", "fake.png")] * 20]
    assert load_examples(write_jsonl(folder, *rows), limit=1).skipped == []


def test_bad_rows_are_listed_in_their_order(folder):
    """Whatever order threads finish in: large pictures in front, what costs nothing behind them."""
    Image.effect_noise((1500, 1500), 90).save(folder / "large.png")
    (folder / "cut.png").write_bytes((folder / "large.png").read_bytes()[:-200])
    cut, gone = GOOD | {"image": "cut.png"}, GOOD | {"image": "gone.png"}
    rows = [cut, without("answer"), gone, GOOD, GOOD | {"boxes": []}] * 9
    examples = load_examples(write_jsonl(folder, *rows), bad_rows="skip")
    words = ["cut.png", "answer is None", "gone.png", "boxes is empty"] * 9
    assert [word in message for word, message in zip(words, examples.skipped, strict=True)] == [True] * 36
    assert [example["id"] for example in examples] == [f"train.jsonl:{number}" for number in range(4, 46, 5)]


def test_sequence(folder):
    examples = load_examples(write_jsonl(folder, *[GOOD | {"id": str(i)} for i in range(5)]))
    assert [example["id"] for example in [*examples, *examples[3:0:-2], examples[-1]]] == list("01234314")
    for index in (5, -6):
        with pytest.raises(IndexError):
            examples[index]


@pytest.mark.parametrize("kind", ["train.jsonl", "images.parquet"])
def test_pictures_are_decoded_when_asked_for(folder, kind, monkeypatch):
    examples, decoded = load_examples(write(folder, kind)), []
    monkeypatch.setattr("sayo.examples.load.load_picture", lambda image: decoded.append(image) or load_picture(image))
    assert len(examples) == 2 and decoded == []
    first = examples[0]
    assert len(decoded) == 1
    first["image"].putpixel((0, 0), (9, 9, 9))
    assert examples[0]["image"].getpixel((0, 0)) == (255, 0, 0)  # not the picture that was handed out before
    assert not any(isinstance(value, Image.Image) for value in vars(examples).values())


@pytest.mark.parametrize("encoded", [False, True], ids=["paths", "bytes"])
def test_each_distinct_picture_is_decoded_once(folder, encoded, monkeypatch):
    decoded, measure = [], "sayo.examples.checks.measure_picture"
    monkeypatch.setattr(measure, lambda image: decoded.append(image) or measure_picture(image))
    names = ("a.png", "whole.jpg", "a.png", "cut.jpg", "cut.jpg")
    if encoded:
        pictures = [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]
        data = str(folder / "train.parquet")
        datasets.Dataset.from_list([GOOD | {"image": picture} for picture in pictures]).to_parquet(data)
    else:
        data = write_jsonl(folder, *[GOOD | {"image": name} for name in names])
    examples = load_examples(data, bad_rows="skip")
    assert len(examples) == 3 and len(decoded) == 3
    labels = ("train.parquet:3: ", "train.parquet:4: ") if encoded else ("train.jsonl:4: ", "train.jsonl:5: ")
    for message, label in zip(examples.skipped, labels, strict=True):
        assert message.startswith(label) and "truncated" in message


@pytest.mark.parametrize("data", ["scenes", "scenes:train", "scenes:validation", "scenes:heldout", "scenes:newtype"])
def test_scenes(data):
    scenes, examples = load_scenes(data), load_examples(data)
    assert len(examples) == len(scenes) and examples.name == data and examples.skipped == []
    example, scene = examples[3], scenes[3]
    assert example["images"] == [example["image"]]
    assert example["image"].tobytes() == scene.pop("image").tobytes()
    assert {key: example[key] for key in scene} == scene
    few = load_examples("scenes", split=data.partition(":")[2] or "train", limit=2)
    assert [example["id"] for example in few] == [scene["id"] for scene in scenes[:2]]
