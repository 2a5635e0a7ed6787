"""Every bad row of a data file is found before anything else runs, with its reason, what is valid and the fix."""

import json
import re

import datasets
import pytest
from conftest import BOX_LISTS, GOOD, two, without, write_jsonl

from data.examples import DataError, load_examples

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
