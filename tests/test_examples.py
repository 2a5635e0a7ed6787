"""The example loader: every way in gives the same examples, and every bad row is found before anything else runs."""

import io
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.examples import DataError, _fit_box, load_examples, load_picture
from data.scenes import load_scenes

WIDTH, HEIGHT = 40, 30
GOOD = {"image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]]}
BOX_LISTS = [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies of Parquet files in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a red a.png, a blue b.png, a truncated cut.jpg and a text called fake.png."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(folder / "a.png")
    Image.new("RGB", (20, 50), "blue").save(folder / "b.png")
    Image.effect_noise((WIDTH, HEIGHT), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    (folder / "fake.png").write_text("not a picture")
    return folder


def write_jsonl(folder: Path, *rows, name: str = "train.jsonl") -> str:
    """A .jsonl file of the rows (dicts, or str and bytes for a line as it is)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def without(key: str) -> dict:
    return {other: value for other, value in GOOD.items() if other != key}


def two(boxes, **more) -> dict:
    """A row with two images, a.png and b.png."""
    return without("image") | {"images": ["a.png", "b.png"], "boxes": boxes} | more


# ---------------------------------------------------------------------------------------------------- bad rows

BAD_ROWS = [
    # what is wrong, the row, words that the message must hold
    ("missing picture", GOOD | {"image": "gone.png"}, ["gone.png", "no such file", "correct the path"]),
    ("picture is text", GOOD | {"image": "fake.png"}, ["fake.png", "cannot be read", "replace"]),
    ("picture is cut off", GOOD | {"image": "cut.jpg"}, ["cut.jpg", "truncated", "replace"]),
    ("picture is a folder", GOOD | {"image": "."}, ["cannot be read", "directory"]),
    ("picture is a number", GOOD | {"image": 7}, ["picture 7", "path"]),
    ("picture as text bytes", GOOD | {"image": {"bytes": "iVBO" * 900}}, ["iVBO", "cannot be read"]),
    ("no picture", without("image"), ["no picture", "keys are: question, answer, boxes;", "image or images"]),
    ("picture null", GOOD | {"image": None}, ["no picture", "image or images"]),
    ("image and images", GOOD | {"images": ["b.png"]}, ["image and images", "give either"]),
    ("images is empty", without("image") | {"images": []}, ["no picture", "image or images"]),
    ("images is a path", without("image") | {"images": "a.png"}, ["images is 'a.png'", "list"]),
    ("images holds null", two(BOX_LISTS, images=["a.png", None]), ["picture None"]),
    ("no question", without("question"), ["question is None", "image, answer, boxes", "not empty"]),
    ("blank question", GOOD | {"question": " "}, ["question is ' '", "not empty"]),
    ("question is a number", GOOD | {"question": 3}, ["question is 3", "text"]),
    ("no answer", without("answer"), ["answer is None", "not empty", "number"]),
    ("blank answer", GOOD | {"answer": ""}, ["answer is ''", "not empty"]),
    ("answer is true", GOOD | {"answer": True}, ["answer is True", "text"]),
    ("answer is not a number", GOOD | {"answer": float("nan")}, ["answer is nan"]),
    ("answer is a list", GOOD | {"answer": ["red"]}, ["answer is ['red']", "text"]),
    ("boxes missing", without("boxes"), ["boxes is empty or missing", "at least one"]),
    ("boxes empty", GOOD | {"boxes": []}, ["boxes is empty or missing"]),
    ("boxes of two images empty", two([[], []]), ["boxes is empty or missing"]),
    ("boxes is a number", GOOD | {"boxes": 5}, ["boxes is 5", "[[x1, y1, x2, y2], ...]"]),
    ("boxes is text", GOOD | {"boxes": "1 2 3 4"}, ["boxes is '1 2 3 4'", "list of boxes"]),
    ("boxes is one box", GOOD | {"boxes": [1, 2, 3, 4]}, ["box 1 ", "four", "[[x1, y1, x2, y2], ...]"]),
    ("three numbers", GOOD | {"boxes": [[1, 2, 3]]}, ["box [1, 2, 3]", "four"]),
    ("five numbers", GOOD | {"boxes": [[1, 2, 3, 4, 5]]}, ["box [1, 2, 3, 4, 5]", "four"]),
    ("number as text", GOOD | {"boxes": [[1, 2, 3, "4"]]}, ["box [1, 2, 3, '4']", "numbers"]),
    ("number is true", GOOD | {"boxes": [[0, 0, 9, True]]}, ["True", "numbers"]),
    ("number is null", GOOD | {"boxes": [[1, 2, None, 4]]}, ["None", "numbers"]),
    ("number is NaN", GOOD | {"boxes": [[1, 2, float("nan"), 4]]}, ["nan", "finite"]),
    ("number is infinite", GOOD | {"boxes": [[1, 2, float("inf"), 4]]}, ["inf", "finite"]),
    ("second box is bad", GOOD | {"boxes": [[1, 2, 3, 4], [1, 2]]}, ["box [1, 2]", "four"]),
    ("x2 = x1", GOOD | {"boxes": [[5, 2, 5, 9]]}, ["box [5, 2, 5, 9]", "x1 < x2"]),
    ("y2 < y1", GOOD | {"boxes": [[5, 9, 8, 2]]}, ["box [5, 9, 8, 2]", "y1 < y2"]),
    ("x, y, w, h", GOOD | {"boxes": [[20, 15, 8, 8]]}, ["[20, 15, 8, 8]", "not [x, y, w, h]"]),
    ("fractions", GOOD | {"boxes": [[0.1, 0.2, 0.5, 1]]}, ["fractions", "multiply", "40 x 30"]),
    ("right of the picture", GOOD | {"boxes": [[5, 5, 42, 9]]}, ["outside", "[5, 5, 42, 9]", "40 x 30", "original"]),
    ("below the picture", GOOD | {"boxes": [[5, 5, 9, 31.5]]}, ["outside", "40 x 30"]),
    ("left of the picture", GOOD | {"boxes": [[-1.5, 5, 9, 9]]}, ["outside", "40 x 30"]),
    ("above the picture", GOOD | {"boxes": [[5, -2, 9, 9]]}, ["outside", "40 x 30"]),
    ("left of and above the picture", GOOD | {"boxes": [[-9, -9, -1, -1]]}, ["outside", "40 x 30"]),
    ("only in the tolerance, right", GOOD | {"boxes": [[40, 5, 41, 9]]}, ["outside", "40 x 30"]),
    ("only in the tolerance, below", GOOD | {"boxes": [[5, 30, 9, 31]]}, ["outside", "40 x 30"]),
    ("outside of its own image", two([[[1, 2, 3, 4]], [[1, 2, 30, 4]]]), ["[1, 2, 30, 4]", "20 x 50"]),
    ("one list for two images", two(BOX_LISTS[:1]), ["1 lists", "2 images"]),
    ("two lists for one image", GOOD | {"boxes": BOX_LISTS}, ["2 lists", "1 images"]),
    ("flat list for two images", two([[1, 2, 3, 4], [5, 6, 7, 8]]), ["boxes is [[1, 2, 3, 4]", "for each image"]),
    ("choices is text", GOOD | {"choices": "red"}, ["choices is 'red'", "list of texts"]),
    ("choices are numbers", GOOD | {"answer": 1, "choices": [1, 2]}, ["choices is [1, 2]", "list of texts"]),
    ("choices empty", GOOD | {"choices": []}, ["choices is []", "leave it out"]),
    ("answer not a choice", GOOD | {"choices": ["blue", "green"]}, ["'red'", "['blue', 'green']", "letter"]),
    ("letter past the choices", GOOD | {"answer": "C", "choices": ["blue", "green"]}, ["'C'", "letter"]),
    ("not JSON", '{"image": "a.png",', ["not JSON", '{"image": "a.png",', "one JSON object per line"]),
    ("a list", "[1, 2]", ["not a JSON object", "[1, 2]"]),
]


@pytest.mark.parametrize(("row", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_ROWS])
def test_bad_row_is_named_and_can_be_skipped(folder, row, words):
    bad = row | {"id": "odd one"} if isinstance(row, dict) else row
    data = write_jsonl(folder, GOOD | {"id": "first"}, "", bad, GOOD)
    with pytest.raises(DataError) as raised:
        load_examples(data)
    message = str(raised.value)
    line = next(line for line in message.splitlines() if "train.jsonl:3" in line)
    assert [word for word in words if word not in line] == []
    assert len(line) < 600
    assert "1 bad and 2 good rows" in message and "--bad_rows skip" in message
    if isinstance(row, dict):
        assert "(id 'odd one')" in line

    examples = load_examples(data, bad_rows="skip")
    assert [example["id"] for example in examples] == ["first", "train.jsonl:4"]
    assert len(examples.skipped) == 1 and examples.skipped[0] == line.strip()


def test_line_that_is_not_utf8(folder):
    (folder / "x.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"image": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON.*utf-8"):
        load_examples(str(folder / "x.jsonl"))


def test_duplicate_id_names_both_rows(folder):
    data = write_jsonl(folder, GOOD | {"id": 7}, GOOD, GOOD | {"id": "7"})
    with pytest.raises(DataError, match=r"train\.jsonl:3 \(id '7'\): train\.jsonl:1 \(id '7'\) has the same id"):
        load_examples(data)
    examples = load_examples(data, bad_rows="skip")
    assert [example["id"] for example in examples] == ["7", "train.jsonl:2"]


def test_message_lists_twenty_rows_and_counts_the_rest(folder):
    data = write_jsonl(folder, GOOD, *[without("answer")] * 23)
    with pytest.raises(DataError) as raised:
        load_examples(data)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("23 bad and 1 good rows")
    assert sum("answer is None" in line for line in lines) == 20
    assert lines[-2].strip() == "and 3 more"
    assert "--bad_rows skip" in lines[-1]
    assert len(load_examples(data, bad_rows="skip").skipped) == 23


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_no_good_row_left(folder, bad_rows):
    with pytest.raises(DataError, match="answer is None") as raised:
        load_examples(write_jsonl(folder, without("answer")), bad_rows=bad_rows)
    assert "no good row" in str(raised.value) and "--bad_rows" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{folder}/gone.jsonl", ["gone.jsonl", "no such file", "valid: scenes"]),
        ("{folder}/gone", ["gone", "no such file"]),
        ("gone.parquet", ["'gone.parquet'", "no such file"]),
        ("./gone", ["'./gone'", "no such file"]),
        ("nobody/nothing", ["'nobody/nothing'", "no file or folder here", "Hub id", "valid: scenes"]),
        ("{folder}/a.png", ["a.png", "another type", ".jsonl or .parquet"]),
        ("{folder}/broken.parquet", ["broken.parquet", "cannot be loaded"]),
        ("{folder}/hollow", ["hollow", "cannot be loaded"]),
        ("{folder}/empty.jsonl", ["empty.jsonl", "no rows"]),
        ("{folder}/empty.parquet", ["empty.parquet", "no data"]),
        ("scenes:nowhere", ["'scenes:nowhere'", "scenes:heldout"]),
    ],
)
def test_data_that_cannot_be_opened(folder, data, words, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (folder / "hollow").mkdir()
    (folder / "broken.parquet").write_text("no Parquet")
    (folder / "empty.jsonl").write_text("\n\n")
    datasets.Dataset.from_dict({"image": [], "question": []}).to_parquet(folder / "empty.parquet")
    with pytest.raises(ValueError) as raised:
        load_examples(data.format(folder=folder))
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bad_rows": "ignore"}, "bad_rows is 'ignore'; valid ones: error, skip"),
        ({"limit": 0}, "limit is 0; give a positive number"),
        ({"limit": -1}, "limit is -1; give a positive number"),
    ],
)
def test_invalid_arguments(folder, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_examples(write_jsonl(folder, GOOD), **arguments)


# -------------------------------------------------------------------------------------------------- round trips

ROWS = [
    {"id": "one", "image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]], "kind": "c"},
    {
        "id": "two",
        "image": "b.png",
        "question": "¿Qué color?",
        "answer": "blue",
        "boxes": [[0, 0, 9.5, 50], [1, 2, 3, 4]],
    },
]


def as_jsonl(folder: Path) -> str:
    return write_jsonl(folder, *ROWS)


def as_dataset(folder: Path) -> datasets.Dataset:
    """The rows with the pictures as `datasets` images, encoded in the table."""
    rows = [
        row | {"kind": row.get("kind"), "image": {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}}
        for row in ROWS
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_parquet(folder: Path) -> str:
    as_dataset(folder).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def as_parquet_of_paths(folder: Path) -> str:
    datasets.Dataset.from_list([row | {"kind": row.get("kind")} for row in ROWS]).to_parquet(folder / "paths.parquet")
    return str(folder / "paths.parquet")


def as_parquet_of_empty_images(folder: Path) -> str:
    """Images without bytes, their paths relative to the Parquet file."""
    rows = [row | {"kind": row.get("kind"), "image": {"bytes": None, "path": row["image"]}} for row in ROWS]
    features = as_dataset(folder).features | {
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    }
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
    rows = [{"file_name": row["image"], **{key: row[key] for key in row if key != "image"}} for row in ROWS]
    write_jsonl(images, *rows, name="metadata.jsonl")
    return str(images)


FORMATS = [
    as_jsonl,
    as_parquet,
    as_parquet_of_paths,
    as_parquet_of_empty_images,
    as_saved_dataset,
    as_saved_splits,
    as_hub_folder,
    as_image_folder,
]


@pytest.mark.parametrize("write", FORMATS)
def test_round_trip(folder, write, monkeypatch):
    data = write(folder)
    monkeypatch.chdir(folder.parent)  # nothing may count from the working directory
    examples = load_examples(data)
    assert examples.name == data and examples.skipped == [] and len(examples) == 2
    for example, row, size, color in zip(examples, ROWS, [(40, 30), (20, 50)], [(255, 0, 0), (0, 0, 255)], strict=True):
        assert {key: example.get(key) for key in row if key != "image"} == {k: row[k] for k in row if k != "image"}
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


def test_truncated_picture_inside_parquet(folder):
    pictures = [(folder / name).read_bytes() for name in ("whole.jpg", "cut.jpg")]
    rows = [GOOD | {"image": {"bytes": picture, "path": None}} for picture in pictures]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet:1: .*truncated"):
        load_examples(str(folder / "train.parquet"))


def test_changed_parquet_is_read_anew(folder):
    data = as_parquet(folder)
    assert len(load_examples(data)) == 2
    as_dataset(folder).select([0]).to_parquet(data)
    assert len(load_examples(data)) == 1


def test_absolute_picture_path(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = write_jsonl(elsewhere, GOOD | {"image": str(folder / "a.png")})
    assert load_examples(data)[0]["image"].size == (WIDTH, HEIGHT)


# ------------------------------------------------------------------------------------------------ good examples


def test_two_images_in_jsonl_and_parquet(folder):
    boxes = [[[1, 2, 3, 4], [0, 0, 40, 30]], []]
    data = write_jsonl(folder, two(boxes))
    encoded = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    rows = datasets.Dataset.from_list([two(boxes, images=encoded)])
    rows.cast_column("images", datasets.List(datasets.Image())).to_parquet(folder / "two.parquet")
    for source in (data, str(folder / "two.parquet")):
        example = load_examples(source)[0]
        assert [image.size for image in example["images"]] == [(40, 30), (20, 50)]
        assert example["boxes"] == boxes
        assert "image" not in example


@pytest.mark.parametrize("boxes", [[[1, 2, 3, 4]], [[[1, 2, 3, 4]]]], ids=["flat", "nested"])
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
    assert example["answer"] == expected
    assert ("choices" in example) == (choices is not None)
    assert example.get("choices") == choices


def test_id_zero_is_an_id(folder):
    data = write_jsonl(folder, GOOD | {"id": 0}, GOOD | {"id": ""})
    assert [example["id"] for example in load_examples(data)] == ["0", "train.jsonl:2"]


def test_box_that_rounding_pushed_out_is_clipped(folder):
    data = write_jsonl(folder, GOOD | {"boxes": [[-1, -0.5, 41, 30.7], [3, 4, 40, 30]]})
    assert load_examples(data)[0]["boxes"] == [[0, 0, 40, 30], [3, 4, 40, 30]]


@given(
    st.lists(st.one_of(st.integers(-20, 60), st.floats(), st.just(10**400)), min_size=4, max_size=4),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_a_box_is_refused_or_lies_in_its_picture(box, width, height):
    try:
        x1, y1, x2, y2 = _fit_box(box, width, height)
    except DataError:
        inside = 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        assert not inside or max(box) <= 1
    else:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert max(abs(before - after) for before, after in zip(box, (x1, y1, x2, y2), strict=True)) <= 1


# ----------------------------------------------------------------------------------- limit, laziness, sequence


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


def test_sequence(folder):
    examples = load_examples(write_jsonl(folder, *[GOOD | {"id": str(i)} for i in range(5)]))
    assert examples[-1]["id"] == "4"
    assert [example["id"] for example in examples[3:0:-2]] == ["3", "1"]
    assert [example["id"] for example in examples] == list("01234")
    for index in (5, -6):
        with pytest.raises(IndexError):
            examples[index]


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_pictures_are_decoded_when_asked_for(folder, write, monkeypatch):
    examples = load_examples(write(folder))
    decoded = []
    monkeypatch.setattr("data.examples.load_picture", lambda image: decoded.append(image) or load_picture(image))
    assert len(examples) == 2 and decoded == []
    first = examples[0]
    assert len(decoded) == 1
    first["image"].putpixel((0, 0), (9, 9, 9))
    assert examples[0]["image"].getpixel((0, 0)) == (255, 0, 0)  # not the picture that was handed out before
    assert not any(isinstance(value, Image.Image) for value in vars(examples).values())


@pytest.mark.parametrize("encoded", [False, True], ids=["paths", "bytes"])
def test_each_distinct_picture_is_decoded_once(folder, encoded, monkeypatch):
    decoded = []
    monkeypatch.setattr("data.examples.load_picture", lambda image: decoded.append(image) or load_picture(image))
    if encoded:
        pictures = [{"bytes": (folder / name).read_bytes(), "path": name} for name in ("a.png", "whole.jpg", "a.png")]
        data = str(folder / "train.parquet")
        datasets.Dataset.from_list([GOOD | {"image": picture} for picture in pictures]).to_parquet(data)
    else:
        data = write_jsonl(folder, *[GOOD | {"image": name} for name in ("a.png", "whole.jpg", "a.png")])
    assert len(load_examples(data)) == 3
    assert len(decoded) == 2


# ------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("data", ["scenes", "scenes:train", "scenes:validation", "scenes:heldout", "scenes:newtype"])
def test_scenes(data):
    scenes, examples = load_scenes(data), load_examples(data)
    assert len(examples) == len(scenes) and examples.name == data and examples.skipped == []
    example, scene = examples[3], scenes[3]
    assert example["image"].tobytes() == scene["image"].tobytes()
    assert example["images"] == [example["image"]]
    assert {key: example[key] for key in scene if key != "image"} == {k: scene[k] for k in scene if k != "image"}
    assert [example["id"] for example in load_examples(data, limit=2)] == [scene["id"] for scene in scenes[:2]]


def test_scenes_take_the_split():
    assert load_examples("scenes", split="heldout")[0]["id"] == load_scenes("scenes:heldout")[0]["id"]
    assert load_examples("scenes:heldout")[0]["id"] == load_scenes("scenes:heldout")[0]["id"]


# ----------------------------------------------------------------------------------------------------- pictures


def corner_picture(size=(WIDTH, HEIGHT)) -> Image.Image:
    """Black with a white square at the top left."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    return picture


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_exif_rotation_decides_size_and_boxes(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left; a viewer turns it right, so the stored top left is shown at the top right
    (folder / "turned.jpg").write_bytes(encode(corner_picture(), "JPEG", exif=exif))
    row = GOOD | {"image": "turned.jpg", "boxes": [[20, 0, 30, 10], [0, 0, 30, 40]]}
    example = load_examples(write_jsonl(folder, row))[0]
    assert example["image"].size == (HEIGHT, WIDTH)
    assert min(example["image"].getpixel((25, 4))) > 200
    assert max(example["image"].getpixel((4, 4))) < 50
    with pytest.raises(DataError, match="30 x 40"):
        load_examples(write_jsonl(folder, row | {"boxes": [[0, 0, 40, 30]]}))


def palette_with_transparency() -> bytes:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    return encode(picture, "PNG", transparency=0)


def half_transparent() -> bytes:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 255))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    return encode(picture, "PNG")


def gray_with_alpha() -> bytes:
    picture = Image.new("LA", (4, 4), (0, 0))
    picture.putpixel((1, 0), (90, 255))
    return encode(picture, "PNG")


def gray_16_bit(kind: str) -> bytes:
    picture = Image.new("I;16", (4, 4), 0)
    picture.putpixel((1, 0), 65535)
    picture.putpixel((2, 0), 128 * 257)
    return encode(picture, kind)


PICTURES = [
    # kind, encoded picture, RGB of the pixels (0, 0), (1, 0), (2, 0) and how far off they may be
    ("palette", palette_with_transparency(), [(255, 255, 255), (200, 0, 0), (255, 255, 255)], 0),
    ("RGBA", half_transparent(), [(255, 255, 255), (200, 0, 0), (127, 127, 127)], 1),
    ("gray and alpha", gray_with_alpha(), [(255, 255, 255), (90, 90, 90), (255, 255, 255)], 0),
    ("16-bit PNG", gray_16_bit("PNG"), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("16-bit TIFF", gray_16_bit("TIFF"), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("gray", encode(Image.new("L", (4, 4), 77), "PNG"), [(77, 77, 77)] * 3, 0),
    ("1 bit", encode(Image.new("1", (4, 4), 1), "PNG"), [(255, 255, 255)] * 3, 0),
    ("CMYK", encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 3, 4),
    ("GIF", encode(Image.new("RGB", (4, 4), "lime"), "GIF"), [(0, 255, 0)] * 3, 0),
]


@pytest.mark.parametrize(("encoded", "colors", "tolerance"), [pytest.param(*case[1:], id=case[0]) for case in PICTURES])
def test_every_kind_of_picture_becomes_rgb(tmp_path, encoded, colors, tolerance):
    (tmp_path / "picture").write_bytes(encoded)
    path = tmp_path / "picture"
    for source in (path, str(path), encoded, {"bytes": encoded, "path": None}, {"bytes": None, "path": str(path)}):
        picture = load_picture(source)
        assert picture.mode == "RGB"
        seen = [picture.getpixel((x, 0)) for x in range(3)]
        off = [abs(a - b) for pixel, color in zip(seen, colors, strict=True) for a, b in zip(pixel, color, strict=True)]
        assert max(off) <= tolerance, seen


def test_decoded_picture_is_copied_not_changed():
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert load_picture(picture).getpixel((0, 0)) == (255, 255, 255)
    assert picture.mode == "RGBA"
    original = Image.new("RGB", (4, 4))
    load_picture(original).putpixel((0, 0), (9, 9, 9))
    assert original.getpixel((0, 0)) == (0, 0, 0)


def test_opened_picture_stays_open(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "two.gif") as picture:
        assert load_picture(picture).getpixel((0, 0)) == (255, 0, 0)
        picture.seek(1)
        assert load_picture(picture).getpixel((0, 0)) == (0, 0, 255)


def test_relative_path_counts_from_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_picture("a.png").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("gone.png", ["gone.png", "no such file"]),
        ({"bytes": b"nonsense", "path": None}, ["in memory", "cannot be read", "cannot identify"]),
        ({"bytes": None, "path": None}, ["picture {'bytes': None", "path"]),
        ("", ["picture ''", "path"]),
        (None, ["picture None", "path"]),
        (Image.new("F", (4, 4)), ["floating-point", "8 or 16 bits"]),
    ],
)
def test_picture_that_cannot_be_loaded(image, words):
    with pytest.raises(DataError) as raised:
        load_picture(image)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_picture_that_no_processor_takes_is_named(tmp_path):
    """Qwen's processors refuse sides of more than 200 to 1, and said so in the middle of a run."""
    Image.new("RGB", (1000, 3)).save(tmp_path / "long.png")
    row = {"image": "long.png", "question": "Where?", "answer": "there", "boxes": [[0, 0, 5, 2]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="1000 x 3 pixels.*200"):
        load_examples(str(tmp_path / "rows.jsonl"))
