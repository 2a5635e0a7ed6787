"""The example loader: every way in gives the same examples."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import GOOD, HEIGHT, WIDTH, two, without, write_jsonl
from PIL import Image

from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError, load_picture, measure_picture
from sayo.examples.scenes.scenes import load_scenes

ROWS = [
    {"id": "one", "image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]], "kind": "c"},
    {"id": "two", "image": "b.png", "question": "¿Qué?", "answer": "blue", "boxes": [[0, 0, 9.5, 50], [1, 2, 3, 4]]},
]
KEPT = [{key: value for key, value in row.items() if key != "image"} for row in ROWS]
WHOLE = [{"kind": None} | row for row in ROWS]  # a table has every column in every row


def as_jsonl(folder: Path) -> str:
    return write_jsonl(folder, *ROWS)


def as_json(folder: Path) -> str:
    (folder / "train.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return str(folder / "train.json")


def as_dataset(folder: Path) -> datasets.Dataset:
    """The rows with the pictures as `datasets` images, encoded in the table."""
    pictures = [{"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} for row in ROWS]
    rows = [row | {"image": picture} for row, picture in zip(WHOLE, pictures, strict=True)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_parquet(folder: Path) -> str:
    as_dataset(folder).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def as_parquet_of_paths(folder: Path) -> str:
    datasets.Dataset.from_list(WHOLE).to_parquet(folder / "paths.parquet")
    return str(folder / "paths.parquet")


def as_parquet_of_empty_images(folder: Path) -> str:
    """Images without bytes, their paths relative to the Parquet file."""
    rows = [row | {"image": {"bytes": None, "path": row["image"]}} for row in WHOLE]
    picture = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = as_dataset(folder).features | {"image": picture}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / "empty.parquet")
    return str(folder / "empty.parquet")


def as_saved_dataset(folder: Path) -> str:
    as_dataset(folder).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    dataset = as_dataset(folder)
    datasets.DatasetDict({"test": dataset.select([1]), "train": dataset}).save_to_disk(folder / "splits")
    return str(folder / "splits")


def as_hub_folder(folder: Path) -> str:
    """Parquet files and the README that push_to_hub writes."""
    hub = folder / "hub"
    dataset = as_dataset(folder)
    (hub / "data").mkdir(parents=True)
    dataset.to_parquet(hub / "data" / "train-00000-of-00001.parquet")
    dataset.select([1]).to_parquet(hub / "data" / "test-00000-of-00001.parquet")
    paths = "".join(f"\n  - split: {split}\n    path: data/{split}-*" for split in ("train", "test"))
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{paths}\n---\n")
    return str(hub)


def as_image_folder(folder: Path) -> str:
    """Pictures and a metadata.jsonl, the `imagefolder` format."""
    images = folder / "imagefolder"
    images.mkdir()
    for row in ROWS:
        shutil.copy(folder / row["image"], images)
    rows = [{"file_name": row["image"]} | kept for row, kept in zip(ROWS, KEPT, strict=True)]
    write_jsonl(images, *rows, name="metadata.jsonl")
    return str(images)


FORMATS = [as_jsonl, as_json, as_parquet, as_parquet_of_paths, as_parquet_of_empty_images]
FORMATS += [as_saved_dataset, as_saved_splits, as_hub_folder, as_image_folder]


@pytest.mark.parametrize("write", FORMATS)
def test_round_trip(folder, write, monkeypatch):
    data = write(folder)
    monkeypatch.chdir(folder.parent)  # nothing may count from the working directory
    examples = load_examples(data)
    assert examples.name == data and examples.skipped == [] and len(examples) == 2
    for example, row, size, color in zip(examples, KEPT, [(40, 30), (20, 50)], [(255, 0, 0), (0, 0, 255)], strict=True):
        assert {key: example.get(key) for key in row} == row
        assert example["images"] == [example["image"]]
        assert example["image"].mode == "RGB" and example["image"].size == size
        assert example["image"].getpixel((3, 3)) == color


@pytest.mark.parametrize("write", [as_saved_splits, as_hub_folder])
def test_split(folder, write):
    data = write(folder)
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
    data = as_parquet(folder)
    assert len(load_examples(data)) == 2
    as_dataset(folder).select([0]).to_parquet(data)
    assert len(load_examples(data)) == 1


def test_absolute_picture_path_in_an_allowed_folder(folder, tmp_path):
    data = write_jsonl(tmp_path, GOOD | {"image": str(folder / "a.png")})
    assert load_examples(data, allowed_folders=[str(folder)])[0]["image"].size == (WIDTH, HEIGHT)


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


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3, 4]], [[[1, 2, 3, 4]]]], ids=["one", "flat", "nested"])
def test_images_with_one_picture_is_an_image(folder, boxes):
    example = load_examples(write_jsonl(folder, two(boxes, images=["a.png"])))[0]
    assert example["image"].size == (40, 30) and len(example["images"]) == 1
    assert example["boxes"] == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("row", "boxes"), [(without("boxes"), []), (GOOD | {"boxes": []}, []), (two(None), [[], []])])
def test_rows_without_boxes_where_none_are_needed(folder, row, boxes):
    assert load_examples(write_jsonl(folder, row), require_boxes=False)[0]["boxes"] == boxes


def test_boxes_are_checked_even_where_none_are_needed(folder):
    with pytest.raises(DataError, match="outside"):
        load_examples(write_jsonl(folder, GOOD | {"boxes": [[0, 0, 99, 9]]}), require_boxes=False)


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        (3, None, "3"),
        (2.5, None, "2.5"),
        (0, None, "0"),
        ("red", ["blue", "red"], "red"),
        ("B", ["blue", "red"], "B"),
        ("Red ", ["blue", "red"], "Red "),
        (10, ["9", "10"], "10"),
    ],
)
def test_good_answers(folder, answer, choices, expected):
    example = load_examples(write_jsonl(folder, GOOD | {"answer": answer, "choices": choices}))[0]
    assert example["answer"] == expected and example.get("choices") == choices
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


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_pictures_are_decoded_when_asked_for(folder, write, monkeypatch):
    examples, decoded = load_examples(write(folder)), []
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
    assert [example["id"] for example in load_examples(data, limit=2)] == [scene["id"] for scene in scenes[:2]]


def test_scenes_take_the_split():
    assert load_examples("scenes", split="heldout")[0]["id"] == load_scenes("scenes:heldout")[0]["id"]
    assert load_examples("scenes:heldout")[0]["id"] == load_scenes("scenes:heldout")[0]["id"]
