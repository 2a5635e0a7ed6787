"""Every bad row of a data file is found before anything else runs, with its reason, what is valid and the fix."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import BOX_LISTS, GOOD, HEIGHT, WIDTH, two, without, write_jsonl
from PIL import Image
from test_pictures import png
from test_regions import written

import train_rl
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.examples.regions import BOX_FORMATS
from train_rl import Config

FLAT = [1, 2, 9, 2, 9, 9]  # a good polygon
RLE = {"counts": "a0", "size": [30, 40]}
DEEP = '{"image": "a.png", "question": "Q?", "answer": "red", "boxes": [[1, 2, 3, 4]], '
NESTED = [f'"{name}": {"[" * 800}1{"]" * 800}}}' for name in ("polygons", "choices")]
NESTED.append('"kind": ' + '{"a": ' * 800 + "1" + "}" * 801)
NO_JSON = [str(GOOD), '{"image": "a.png"} {}', "[" * 100_000, '{"image": ' + "9" * 9000 + "}", '{"image": "a.png",']
NO_REGION = [without("boxes"), GOOD | {"boxes": []}, two([[], []]), without("boxes") | {"polygons": [[]], "mask": ""}]
NO_REGION.append(two([None, []], polygons=[None, []], masks=[None, []]))
NO_BOXES = [[[1, 2, 3]], [[1, 2, 3, 4, 5]], [[1, 2, 3, "4"]], [[0, 0, 9, True]]]
NO_BOXES += [[[1, 2, number, 4]] for number in (None, float("nan"), float("inf"))]
OUTSIDE = [[[5, 5, 42, 9]], [[5, 5, 9, 31.5]], [[-1.5, 5, 9, 9]], [[5, -2, 9, 9]], [[-9, -9, -1, -1]]]
OUTSIDE += [[[40, 5, 41, 9]], [[5, 30, 9, 31]]]  # only in the tolerance


def each(key: str, values: list, *words: str) -> list[tuple]:
    """A case for each value of a key; words may hold the value."""
    return [(f"{key} {value}", GOOD | {key: value}, [word.format(value) for word in words]) for value in values]


BAD_ROWS = [  # what is wrong, the row, words in the message
    ("missing picture", GOOD | {"image": "gone.png"}, ["gone.png", "no such file", "correct the path"]),
    *each("image", ["zero.png", "fake.png", "page.jpg", "drawing.svg"], "{}' cannot be read: cannot identify"),
    *each("image", ["cut.png", "cut.gif", "damaged.png", "cut.jpg"], "{}' cannot be read", "replace the file"),
    ("picture is a folder", GOOD | {"image": "."}, ["cannot be read", "directory"]),
    ("picture is a number", GOOD | {"image": 7}, ["picture 7", "path"]),
    ("picture as text bytes", GOOD | {"image": {"bytes": "iVBO" * 900}}, ["iVBO", "cannot be read"]),
    ("no picture", without("image"), ["no picture", "keys are: question, answer, boxes;", "image or images"]),
    ("picture null", GOOD | {"image": None}, ["no picture", "image or images"]),
    ("image and images", GOOD | {"images": ["b.png"]}, ["image and images", "give either"]),
    ("images is empty", without("image") | {"images": []}, ["no picture", "image or images"]),
    ("images is a path", without("image") | {"images": "a.png"}, ["images is 'a.png'", "list"]),
    ("images holds null", two(BOX_LISTS, images=["a.png", None]), ["picture None"]),
    *each("question", [None, " ", 3], "question is {!r}, keys are: image, ", "boxes; write a text that is not empty"),
    *each(
        "answer",
        [None, "", [], [["red"]], ["red", None], {"a": 1}, float("nan")],
        "answer is {!r}",
        "is not empty, or a",
    ),
    *each(
        "answer", ["<answer>red", "red</think>", "<answer></answer>"], "answer {!r} would not be right", "without tags"
    ),
    *[(f"no region in {row}", row, ["boxes is empty or missing", "at least one box,"]) for row in NO_REGION],
    ("boxes is a number", GOOD | {"boxes": 5}, ["boxes is 5", "[[x1, y1, x2, y2], ...]"]),
    ("boxes is text", GOOD | {"boxes": "1 2 3 4"}, ["boxes is '1 2 3 4'", "list of boxes"]),
    ("boxes is three numbers", GOOD | {"boxes": [1, 2, 3]}, ["box 1 ", "four", "[[x1, y1, x2, y2], ...]"]),
    ("boxes is eight numbers", GOOD | {"boxes": [1, 2, 3, 4, 5, 6, 7, 8]}, ["box 1 ", "four"]),
    ("boxes is one bad box", GOOD | {"boxes": [9, 2, 3, 4]}, ["box [9, 2, 3, 4]", "x1 < x2"]),
    ("boxes are dicts", GOOD | {"boxes": [{"x": 1, "y": 2, "w": 3, "h": 4}]}, ["box {'x': 1", "four finite numbers"]),
    ("one box for two images", two([1, 2, 3, 4]), ["boxes is [1, 2, 3, 4]", "for each image"]),
    ("number beyond floats", GOOD | {"boxes": [[0, 0, 10**400, 9]]}, ["box [0, 0, 1000", "outside", "40 x 30"]),
    *each("boxes", NO_BOXES, "box {0[0]} is not four finite numbers", "[[x1, y1, x2, y2], ...]"),
    ("second box is bad", GOOD | {"boxes": [[1, 2, 3, 4], [1, 2]]}, ["box [1, 2]", "four"]),
    ("x2 = x1", GOOD | {"boxes": [[5, 2, 5, 9]]}, ["box [5, 2, 5, 9]", "x1 < x2"]),
    ("y2 < y1", GOOD | {"boxes": [[5, 9, 8, 2]]}, ["box [5, 9, 8, 2]", "y1 < y2"]),
    ("x, y, w, h", GOOD | {"boxes": [[20, 15, 8, 8]]}, ["[20, 15, 8, 8]", "not [x, y, w, h]", "--box_format xywh"]),
    ("x, y, w, h beyond", GOOD | {"boxes": [[9, 5, 31, 25], [9, 25, 31, 35]]}, ["[9, 25, 31, 35]", "outside"]),
    ("of 0 to 1000", GOOD | {"boxes": [[200, 99, 900, 500]]}, ["outside", "in --box_format xyxy_1000 it would be"]),
    ("fractions", GOOD | {"boxes": [[0.1, 0.2, 0.5, 1]]}, ["fractions", "40 x 30", "--box_format xyxy_normalized"]),
    *each("boxes", OUTSIDE, "box {0[0]} is outside of its picture of 40 x 30", "pixels of the original"),
    ("outside of its own image", two([[[1, 2, 3, 4]], [[1, 2, 30, 4]]]), ["[1, 2, 30, 4]", "20 x 50"]),
    ("one list for two images", two(BOX_LISTS[:1]), ["1 lists", "2 images"]),
    ("two lists for one image", GOOD | {"boxes": BOX_LISTS}, ["2 lists", "1 images"]),
    ("flat list for two images", two([[1, 2, 3, 4], [5, 6, 7, 8]]), ["boxes is [[1, 2, 3, 4]", "for each image"]),
    ("choices is text", GOOD | {"choices": "red"}, ["choices is 'red'", "list of texts"]),
    ("choices hold null", GOOD | {"choices": ["red", None]}, ["choices is ['red', None]", "list of texts"]),
    ("choices without a label", GOOD | {"choices": {"label": ["A"], "text": ["red", "b"]}}, ["choices is {'label'"]),
    ("index past the choices", GOOD | {"answer": 2, "choices": ["x", "y"]}, ["'2'", "its index from 0"]),
    ("index beside numbered choices", GOOD | {"answer": 1, "choices": ["D", "B", "A", "C"]}, ["'1'", "use one,"]),
    ("letter and another text", GOOD | {"answer": "A. y", "choices": ["x", "y"]}, ["'A. y'", "['x', 'y']"]),
    ("several choices", GOOD | {"answer": ["A", "B"], "choices": ["x", "y"]}, ["['A', 'B']", "the one that is right"]),
    ("a comma in a list", GOOD | {"answer": ["a, b"], "answer_type": "list"}, ["'a, b'", "items without , and ;"]),
    ("answer not a choice", GOOD | {"choices": ["blue", "green"]}, ["'red'", "['blue', 'green']", "letter"]),
    ("letter past the choices", GOOD | {"answer": "C", "choices": ["blue", "green"]}, ["'C'", "letter"]),
    ("too many choices", GOOD | {"choices": ["red"] * 27}, ["choices has 27", "at most 26"]),
    ("half a character", GOOD | {"question": "\ud83d?"}, ["\\ud83d", "half of a character"]),
    ("half a character in the id", GOOD | {"id": "\ud83d"}, ["\\ud83d", "half of a character"]),
    ("picture is a bomb", GOOD | {"image": "bomb.png"}, ["bomb.png", "400000000 pixels", "178956970", "shrink"]),
    ("picture is too long for Qwen", GOOD | {"image": "long.png"}, ["500 x 2 pixels", "200 times", "crop"]),
    ("picture has floats", GOOD | {"image": "float.tif"}, ["float.tif", "floating-point", "8 or 16 bits"]),
    ("picture is an address", GOOD | {"image": "https://a.org/b.png"}, ["https://a.org/b.png", "save it as"]),
    *each("image", [f"{start}iVBORw0KGgo{'A' * 9000}" for start in ("", "data:image/png;base64,")], "in memory cannot"),
    *each("image", [f"data:image/png;base64,{text}" for text in ("iVB", "%89PNG" * 20)], "data:image", "save it as"),
    (
        "picture is a page in the row",
        GOOD | {"image": "data:text/html;base64,iVBORw0KGgoAAAA"},
        ["data:text", "save it"],
    ),
    ("picture is nearly base64", GOOD | {"image": "iVBORw0KGgo*" + "A" * 9000}, ["iVBORw0KGgo", "cannot be read"]),
    *each("image", [["a.png", "b.png"], [["a.png"]]], "image is a list of", "call it images"),
    ("path with a zero", GOOD | {"image": "a.png\0"}, ["a.png", "cannot be read"]),
    ("path of Windows", GOOD | {"image": "images\\a.png"}, ["images", "no such file"]),
    ("second picture is missing", two(BOX_LISTS, images=["a.png", "gone.png"]), ["gone.png", "no such file"]),
    ("polygons is text", GOOD | {"polygons": "1 2 3"}, ["polygons is '1 2 3'", "list of polygons"]),
    ("polygons is a run-length code", GOOD | {"polygons": {"size": [30, 40], "counts": "a0"}}, ["run-length", "mask"]),
    ("polygon is a number", GOOD | {"polygons": [5, [1, 2, 3, 4, 5, 6]]}, ["polygon 5", "[x, y]"]),
    ("polygon is a run-length code", GOOD | {"polygons": [{"counts": "a0"}]}, ["polygon", "counts", "[x, y]"]),
    ("polygon of two points", GOOD | {"polygons": [[[1, 2], [3, 4]]]}, ["[[1, 2], [3, 4]]", "2 points", "three or"]),
    ("polygon is a box", GOOD | {"polygons": [[1, 2, 30, 20]]}, ["2 points", "a box goes to boxes"]),
    ("polygon of seven numbers", GOOD | {"polygons": [[1, 2, 3, 4, 5, 6, 7]]}, ["7 numbers", "pairs"]),
    ("point of three numbers", GOOD | {"polygons": [[[1, 2, 0], [9, 2, 0], [9, 9, 0]], FLAT]}, ["[1, 2, 0]", "pairs"]),
    ("point with text", GOOD | {"polygons": [[[1, 2], [9, "2"], [9, 9]]]}, ["'2'", "finite numbers"]),
    ("point with NaN", GOOD | {"polygons": [[1, 2, 9, 2, 9, float("nan")]]}, ["nan", "finite numbers"]),
    ("point is null", GOOD | {"polygons": [[[1, 2], None, [9, 9], [5, 5]]]}, ["None", "pairs"]),
    ("point outside", GOOD | {"polygons": [FLAT, [[1, 2], [50, 2], [9, 9]]]}, ["[50, 2]", "outside", "40 x 30"]),
    ("point beyond floats", GOOD | {"polygons": [[1, 2, 9, 2, 9, 10**400]]}, ["outside", "40 x 30"]),
    ("polygon of fractions", GOOD | {"polygons": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.9]]}, ["fractions", "xyxy_normalized"]),
    ("polygon without area", GOOD | {"polygons": [[1, 1, 5, 5, 9, 9, 3, 3]]}, ["no area", "around the region"]),
    ("polygon in the tolerance", GOOD | {"polygons": [[40, 5, 41, 5, 41, 9]]}, ["no area", "40 x 30"]),
    ("polygons for one of two", two(BOX_LISTS, polygons=[[FLAT]]), ["polygons has 1 lists", "2 images"]),
    ("polygons of an image is text", two(BOX_LISTS, polygons=[[FLAT], "x"]), ["'x'", "list of polygons"]),
    ("mask is missing", GOOD | {"mask": "gone.png"}, ["mask", "gone.png", "no such file", "correct the path"]),
    ("mask is text", GOOD | {"mask": "fake.png"}, ["mask", "fake.png", "cannot be read"]),
    ("mask is cut off", GOOD | {"mask": "cut.png"}, ["mask", "cut.png", "cannot be read"]),
    ("mask of another size", GOOD | {"mask": "b.png"}, ["mask", "b.png", "20 x 50", "40 x 30", "as a viewer shows it"]),
    ("mask is black", GOOD | {"mask": "black.png"}, ["mask", "black.png", "black all over", "white"]),
    ("mask is its black picture", GOOD | {"image": "black.png", "mask": "black.png"}, ["mask", "black all over"]),
    ("mask is a JPEG", GOOD | {"mask": "whole.jpg"}, ["mask", "whole.jpg", "JPEG", "PNG"]),
    ("mask is a number", GOOD | {"mask": 7}, ["mask 7", "path"]),
    ("mask is a list", GOOD | {"mask": ["black.png"]}, ["mask ['black.png']", "path"]),
    ("mask is a run-length code", without("boxes") | {"mask": RLE}, ["mask {'counts'", "run-length", "as a picture"]),
    ("masks are run-length codes", GOOD | {"masks": [RLE]}, ["mask {'counts'", "neither a path", "run-length"]),
    *each("mask", [{"bytes": None, "path": None}, {"x": "m.png"}], "mask {}", "neither a path"),
    ("masks with an empty path", without("boxes") | {"masks": [{"path": ""}]}, ["mask {'path': ''}", "neither a path"]),
    ("picture of another key", GOOD | {"image": {"x": "a.png"}}, ["picture {'x': 'a.png'}", "neither a path"]),
    ("mask and masks", GOOD | {"mask": "a.png", "masks": ["a.png"]}, ["mask and masks", "either"]),
    ("mask for two images", two(BOX_LISTS, mask="a.png"), ["mask", "2 images", "masks"]),
    ("masks is a path", GOOD | {"masks": "a.png"}, ["masks is 'a.png'", "call it mask"]),
    ("masks for one of two", two(BOX_LISTS, masks=["a.png"]), ["masks has 1 entries", "2 images"]),
    ("second mask of another size", two(BOX_LISTS, masks=[None, "a.png"]), ["mask", "a.png", "40 x 30", "20 x 50"]),
    *[(f"line {line}", line, ["not a JSON object", line]) for line in ("7", "null", '"a.png"', "[1, 2]")],
    *[(f"line {line[:40]}", line, ["not JSON", line[:9], "one JSON object per line"]) for line in NO_JSON],
    *[(line[:12], DEEP + line, ["nested more than 100", "one object"]) for line in NESTED],
    ("polygons nested five deep", GOOD | {"polygons": [[[[FLAT]]]]}, ["polygons is nested 5 lists deep", "[x, y]"]),
    ("polygons of objects, two images", two(BOX_LISTS, polygons=[[FLAT]] * 3), ["3 lists", "2 images", "each object"]),
]


def make_bad_pictures(folder: Path) -> None:
    noise = Image.effect_noise((WIDTH, HEIGHT), 50)
    for suffix in ("png", "gif"):
        noise.save(folder / f"whole.{suffix}")
        (folder / f"cut.{suffix}").write_bytes((folder / f"whole.{suffix}").read_bytes()[:-200])
    damaged = bytearray((folder / "whole.png").read_bytes())
    damaged[100] ^= 255
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "bomb.png").write_bytes(png(20_000, 20_000, 0))
    (folder / "zero.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><title>404 Not Found</title>")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='40' height='30'/>")
    Image.new("RGB", (500, 2)).save(folder / "long.png")
    Image.new("F", (WIDTH, HEIGHT), 0.5).save(folder / "float.tif")
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "black.png")


@pytest.mark.parametrize(("row", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_ROWS])
def test_bad_row_is_named_and_can_be_skipped(folder, row, words, capsys):
    make_bad_pictures(folder)
    bad = {"id": "odd one"} | row if isinstance(row, dict) else row
    data = write_jsonl(folder, GOOD | {"id": "first"}, "", bad, GOOD)
    with pytest.raises(DataError) as raised:
        load_examples(data)
    message = str(raised.value)
    line = next(line for line in message.splitlines() if "train.jsonl:3" in line)
    assert [word for word in words if word not in line] == [] and len(line) < 600
    assert "1 bad and 2 good rows" in message and "--bad_rows skip" in message
    assert "(id 'odd one')" in line or not isinstance(row, dict) or "id" in row
    examples = load_examples(data, bad_rows="skip")
    assert [(example["id"], example["boxes"]) for example in examples] == [
        (name, GOOD["boxes"]) for name in ("first", "train.jsonl:4")
    ]
    assert examples.skipped == [line.strip()]
    assert capsys.readouterr().err == f"train.jsonl: 1 of 3 rows skipped, first: {line.strip()}\n"


BAD_BOXES = [  # what is wrong, box_format, box of a 40 x 30 picture, words in the message
    ("corners, not w and h", "xywh", [10, 10, 39, 29], ["outside", "40 x 30", "--box_format xyxy"]),
    ("w is zero", "xywh", [10, 10, 0, 5], ["no area", "w > 0", "--box_format xyxy "]),
    ("h is negative", "xywh_1000", [10, 10, 5, -1], ["no area", "h > 0", "--box_format xyxy_1000 "]),
    ("x2 = x1", "xyxy_1000", [10, 10, 10, 20], ["no area", "x1 < x2", "--box_format xywh_1000"]),
    ("y2 < y1", "xyxy_normalized", [0.1, 0.5, 0.2, 0.4], ["no area", "--box_format xywh_normalized"]),
    ("fractions", "xywh", [0.1, 0.1, 0.5, 0.5], ["fractions", "--box_format xywh_normalized or xyxy_normalized"]),
    ("fractions, x + w", "xyxy", [0.5, 0.5, 0.2, 0.2], ["fractions", "those take --box_format xywh_normalized"]),
    ("thousandths, x + w", "xyxy", [600, 700, 100, 50], ["no area", "give --box_format xywh_1000 for those"]),
    ("fractions", "xyxy_1000", [0.1, 0.1, 0.5, 0.5], ["fractions", "--box_format xyxy_normalized"]),
    ("pixels", "xyxy_normalized", [1, 2, 30, 20], ["outside", "from 0 to 1;", "in --box_format xyxy or"]),
    ("pixels", "xywh_normalized", [20, 2, 15, 20], ["outside", "from 0 to 1;", "in --box_format xywh or"]),
    ("thousandths", "xyxy_normalized", [100, 200, 500, 900], ["outside", "in --box_format xyxy_1000 it"]),
    ("beyond 1000", "xyxy_1000", [100, 200, 500, 1100], ["outside", "from 0 to 1000"]),
    ("beyond floats", "xywh_1000", [10**400, 200, 0.5, 1100], ["outside", "from 0 to 1000"]),
    ("three numbers", "xywh", [1, 2, 3], ["four finite numbers", "[[x, y, w, h], ...]"]),
]


@pytest.mark.parametrize(("box_format", "box", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_BOXES])
def test_box_of_another_format_is_named_and_can_be_skipped(folder, box_format, box, words):
    good = written([1, 2, 30, 20], WIDTH, HEIGHT, box_format)
    data = write_jsonl(folder, GOOD | {"boxes": [good]}, GOOD | {"boxes": [good, box]})
    with pytest.raises(DataError) as raised:
        load_examples(data, box_format=box_format)
    line = str(raised.value).splitlines()[1]
    assert "train.jsonl:2" in line and str(box)[:20] in line
    assert [word for word in words if word not in line] == []
    examples = load_examples(data, box_format=box_format, bad_rows="skip")
    assert len(examples) == 1 and len(examples.skipped) == 1
    assert examples[0]["boxes"][0] == pytest.approx([1, 2, 30, 20])


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
    first, *listed, rest, last = str(raised.value).splitlines()
    assert first.startswith("23 bad and 1 good rows") and rest.strip() == "and 3 more" and "--bad_rows skip" in last
    assert ["answer is None" in line for line in listed] == [True] * 20
    assert len(load_examples(data, bad_rows="skip").skipped) == 23


def test_no_good_row_left(folder):
    for bad_rows in ("error", "skip"):
        with pytest.raises(DataError, match="answer is None(?s:.*)no good row") as raised:
            load_examples(write_jsonl(folder, without("answer")), bad_rows=bad_rows)
        assert "--bad_rows" not in str(raised.value)


UNOPENED = [  # data, words in the message
    *[(data, f"{data!r}: there is no such file or folder; valid: scenes") for data in ("./gone", "gone.parquet")],
    *[(data, f"{data!r}: there is no such file or folder") for data in ("gone.json", "{folder}/gone.jsonl")],
    *[(f"{{folder}}/{name}", f"{name}' cannot be loaded") for name in ("shards", "hollow", "zero.parquet")],
    *[(f"{{folder}}/{name}.parquet", f"{name}.parquet' cannot be loaded") for name in ("cut", "broken")],
    *[(f"{{folder}}/{name}", f"{name}' has no rows") for name in ("none.json", "zero.jsonl", "empty.jsonl")],
    ("{folder}/gone", "gone': there is no such file"),
    ("nobody/nothing", "'nobody/nothing' is no file or folder here, and no Hub id .*valid: scenes"),
    ("{folder}/a.png", "a.png' is a file of another type; .*.json or .parquet"),
    ("{folder}/object.json", "object.json.* one object with the keys info, images; write one list of objects"),
    ("{folder}/number.json", "number.json.*holds 7; write one list of objects"),
    ("{folder}/lines.json", "lines.json.*not JSON.*name it .jsonl"),
    ("{folder}/zero.json", "zero.json.*not JSON.*list of objects"),
    ("{folder}/numbers.json", "(?s)numbers.json:0: not a JSON object: 1.*numbers.json:1.*no good row"),
    ("{folder}/wide.jsonl", "wide.jsonl.*UTF-16.*UTF-8"),
    ("{folder}/bytes.jsonl", "bytes.jsonl:2: not JSON.*utf-8"),
    ("{folder}/empty.parquet", "empty.parquet.*no data"),
    ("scenes:nowhere", "'scenes:nowhere'.*scenes:heldout"),
]


@pytest.mark.parametrize(("data", "words"), UNOPENED)
def test_data_that_cannot_be_opened(folder, data, words, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (folder / "hollow").mkdir()
    line = json.dumps(GOOD)
    texts = {"broken.parquet": "no Parquet", "empty.jsonl": "\n\n", "lines.json": f"{line}\n{line}\n"}
    texts |= {"object.json": json.dumps({"info": {}, "images": [GOOD]}), "number.json": "7", "none.json": "[]"}
    texts |= {"numbers.json": "[1, 2]"} | dict.fromkeys(["zero.json", "zero.jsonl", "zero.parquet"], "")
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "wide.jsonl").write_text(line, encoding="utf-16")
    (folder / "bytes.jsonl").write_bytes(line.encode() + b'\n{"image": "\xff\xfe"}\n')
    datasets.Dataset.from_list([GOOD]).to_parquet(folder / "cut.parquet")
    (folder / "shards").mkdir()
    shutil.copy(folder / "cut.parquet", folder / "shards" / "0.parquet")
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-50])
    shutil.copy(folder / "cut.parquet", folder / "shards" / "1.parquet")
    datasets.Dataset.from_dict({"image": [], "question": []}).to_parquet(folder / "empty.parquet")
    with pytest.raises(ValueError, match=words.format(folder=folder)):
        load_examples(data.format(folder=folder))


def test_invalid_arguments(folder):
    cases = [
        ("box_format", "yolo", "valid ones: xyxy, xywh, xyxy_norm"),
        ("bad_rows", "ignore", "valid ones: error, skip"),
    ]
    for name, value, words in [*cases, *(("limit", number, "give a positive number") for number in (0, -1))]:
        with pytest.raises(ValueError, match=f"{name} is {value!r}; {words}"):
            load_examples(write_jsonl(folder, GOOD), **{name: value})


def test_the_good_rows_among_all_bad_ones_train(folder, tmp_path, capsys):
    """The whole corpus in one file: it is skipped and counted, and the rest trains with its boxes where they were."""
    good = [GOOD | {"id": f"good {number}", "boxes": [[number, 2, 30, 20]]} for number in range(3)]
    rows = [row for _, row, _ in BAD_ROWS]
    bad = [{"id": f"bad {number}"} | row if isinstance(row, dict) else row for number, row in enumerate(rows)]
    data = write_jsonl(folder, good[0], *bad[:40], good[1], *bad[40:], good[2])
    settings = {"max_steps": 1, "groups_per_step": 3, "num_generations": 2, "max_new_tokens": 6, "report_to": "none"}
    config = Config(data=data, bad_rows="skip", output_dir=str(tmp_path / "run"), **settings)
    train_rl.main(config)
    assert f"{len(bad)} of {len(bad) + 3} rows skipped" in capsys.readouterr().err
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["grad_norm"] > 0
    examples = load_examples(data, bad_rows="skip")
    assert {example["id"]: example["boxes"] for example in examples} == {row["id"]: row["boxes"] for row in good}


def other_rows(box_format: str, count: int = 12) -> list[dict]:
    """Rows of 40 x 30 pictures with boxes in this format."""
    corners = [[2 + 2 * number, 1 + number, 12 + 2 * number, 9 + number] for number in range(count)]
    return [
        GOOD | {"boxes": [written(box, WIDTH, HEIGHT, box_format)], "id": str(number)}
        for number, box in enumerate(corners)
    ]


FORMATS = [(stored, declared) for stored in BOX_FORMATS for declared in ("xyxy", "xywh") if stored != declared]


@pytest.mark.parametrize(("stored", "declared"), FORMATS)
def test_a_file_in_another_box_format_is_said_once_and_nothing_is_skipped(folder, stored, declared):
    data = write_jsonl(folder, *other_rows(stored), GOOD | {"image": "gone.png"})
    for bad_rows in ("error", "skip"):
        with pytest.raises(DataError, match=f"boxes in another format; give --box_format {stored}; first") as raised:
            load_examples(data, box_format=declared, bad_rows=bad_rows)
        message = str(raised.value)
        assert message.count("train.jsonl:") == 3 and "gone.png" in message and "no row is skipped before" in message
    assert len(load_examples(data, box_format=stored, bad_rows="skip")) == 12


def test_single_bad_boxes_are_no_other_format(folder):
    """One of few rows, and rows that other rows contradict, are skipped as before."""
    swapped = [GOOD | {"boxes": [[20, 15, 8, 8]]}] * 4  # [x, y, w, h], or corners in the wrong order
    for rows in ([GOOD, GOOD, swapped[0]], [*swapped, *[GOOD | {"boxes": [[30, 20, 39, 29]]}] * 8]):
        examples = load_examples(write_jsonl(folder, *rows), bad_rows="skip")
        assert len(examples.skipped) == sum(row in swapped for row in rows)
