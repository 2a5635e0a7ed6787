"""Reading of huge JSON, JSON lines and tables, and fitting of boxes, each against an independent answer."""

import json
import math
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_folders import encoded

from data.prepare.folder import random_order
from data.prepare.rows import Dropped, Picture, as_shown, fit_boxes, inspect_picture, text
from data.prepare.sources import TableRows, open_table, read_entry, scan_object
from data.prepare.visual_cot import MetadataRows
from sayo.examples.pictures import DataError
from sayo.settings import ConfigError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
INDENTS, BLANKS = st.sampled_from([None, 0, 3, "\t"]), st.sampled_from(["", " ", "\r\n\t "])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json") / "object.json"


def scanned(file: Path, content: str, chunk: int) -> list[tuple[str, object]]:
    file.write_text(content, encoding="utf-8", newline="")
    found = []
    for key, start, end in scan_object(file, chunk):
        again, value = read_entry(file, start, end)
        assert again == key
        found.append((key, value))
    return found


@settings(max_examples=60)
@given(st.dictionaries(st.text(), VALUES), st.integers(1, 40), INDENTS, st.booleans(), BLANKS)
def test_an_object_is_read_as_json_loads_reads_it(file, value, chunk, indent, ascii, blanks):
    content = json.dumps(value, indent=indent, ensure_ascii=ascii)
    try:
        content.encode()
    except UnicodeEncodeError:  # halves of characters can be spelled, not written
        content = json.dumps(value, indent=indent)
    assert scanned(file, blanks + content + blanks, chunk) == list(json.loads(content).items())


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=3), VALUES, min_size=1), st.data(), st.integers(1, 40))
def test_a_file_that_is_cut_off_or_spoiled_is_refused_where_json_loads_refuses_it(file, value, data, chunk):
    content = json.dumps(value)
    place = data.draw(st.integers(0, len(content) - 1))
    spoiled = content[:place] + data.draw(st.sampled_from(["", "}", ",", '"', "x", "]"])) + content[place + 1 :]
    for broken in (content[:place], spoiled):
        try:
            expected = json.loads(broken)
        except ValueError:
            expected = None
        if isinstance(expected, dict):
            assert dict(scanned(file, broken, chunk)) == expected
        else:
            with pytest.raises(DataError, match="is not one JSON object"):
                scanned(file, broken, chunk)


@pytest.mark.parametrize(
    "content", ["", " ", "[]", "3", "{", '{"a": 1,}', '{"a": 1} {}', '{"a" 1}', "{1: 2}", '{,"a": 1}']
)
def test_not_one_object(file, content):
    with pytest.raises(DataError, match="is not one JSON object, or is cut off"):
        scanned(file, content, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_a_byte_order_mark_is_skipped_and_a_number_is_read_to_its_end(file, chunk):
    assert scanned(file, '\ufeff {"a": -1.5e10 , "b": {}}', chunk) == [("a", -1.5e10), ("b", {})]
    assert scanned(file, '{"a":12.25}', chunk) == [("a", 12.25)]


def test_an_entry_that_is_nested_too_deeply_is_refused(file):
    with pytest.raises(DataError, match="the entry at byte 9 is nested too deeply"):
        scanned(file, '{"a": 1, "b": ' + "[" * 100_000 + "]" * 100_000 + "}", 1 << 20)


def test_lines_of_several_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"n": 1}\n\n{"n": "猫"}\r\n[3]\nnope\n'.encode())
    (tmp_path / "b.jsonl").write_bytes(b'{"n": 5}')
    rows = MetadataRows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert len(rows) == 5
    assert [rows.line(i) for i in (0, 1, 4)] == [("a:1", {"n": 1}), ("a:3", {"n": "猫"}), ("b:1", {"n": 5})]
    for index, said in ((2, "not a JSON object.*a.jsonl:4"), (3, "line is not JSON.*a.jsonl:5")):
        with pytest.raises(Dropped, match=said):
            rows.line(index)


@pytest.fixture
def table() -> datasets.Dataset:
    picture = {"bytes": encoded(), "path": "x.png"}
    rows = [{"id": "x", "q": "?", "image": picture}, {"id": None, "q": "!", "image": None}]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_rows_of_a_table(table, tmp_path):
    rows = TableRows(table, "image", "id")
    expected = [{"id": "x", "q": "?", "picture": encoded()}, {"id": "1", "q": "!", "picture": None}]
    assert [rows[i] for i in range(2)] == expected
    assert [TableRows(table, "image")[i]["id"] for i in range(2)] == ["0", "1"]
    (tmp_path / "x.png").write_bytes(encoded("blue"))
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.png"), "gone.png"]})
    rows = TableRows(table.cast_column("image", datasets.Image()), "image")
    assert (rows[0]["picture"], rows[1]["picture"]) == (encoded("blue"), None)


def test_every_kind_of_local_table(table, tmp_path):
    table.to_parquet(tmp_path / "table.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("table.parquet", "saved", "splits", "folder"):
        opened = open_table(str(tmp_path / name), "train", None, ["q"], "image")
        assert opened.column_names == ["q", "image"] and TableRows(opened, "image")[0]["picture"] == encoded(), name
    for name in ("splits", "folder"):
        with pytest.raises(ConfigError, match="(?s)cannot be loaded.*holiday"):
            open_table(str(tmp_path / name), "holiday", None, ["q"], "image")


def test_columns_that_are_missing(table, tmp_path):
    table.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ConfigError, match="has no column question, answer; columns present: id, q, image"):
        open_table(str(tmp_path / "table.parquet"), "train", None, ["question", "answer", "q"], "image")
    with pytest.raises(ConfigError, match="column q holds Value.*not pictures"):
        open_table(str(tmp_path / "table.parquet"), "train", None, ["id"], "q")


@pytest.mark.parametrize("name", ["someone/no-such-dataset", "no/such/folder", "gone.parquet"])
def test_a_dataset_that_is_not_there(name):
    with pytest.raises(ConfigError, match="no file or folder here, and no Hub dataset that can be loaded"):
        open_table(name, "train", None, ["q"], "image")


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([[1, 2, 3, 4]], [[1, 2, 3, 4]]),
        ([[1.234, 2, 3, 4.567], [1.23, 2, 3, 4.57]], [[1.23, 2, 3, 4.57]]),  # the same one after rounding
        ([[-2, -1, 102, 51]], [[0, 0, 100, 50]]),  # 2 % and a pixel
        ([[0, 0, 1, 2]], [[0, 0, 1, 2]]),
        ([[-3, 0, 10, 10]], "box outside of its picture"),
        ([[0, 48, 10, 52]], "box outside of its picture"),
        ([[100, 0, 101, 10]], "box outside of its picture"),
        ([[1, 2, 3, 4], [5, 5, 5, 9]], "box without area"),
        ([[5, 9, 3, 2]], "box without area"),
        ([[5, 5, 5.001, 9]], "box without area"),
        ([[0, 0, 1, 1]], "box of one pixel"),
        ([[0.1, 0.2, 0.5, 0.9]], "box of one pixel"),
        ([[1, 2, 3]], "box is not four numbers"),
        ([[1, 2, 3, None]], "box is not four numbers"),
        ([[1, 2, 3, math.nan]], "box is not four numbers"),
        ([[1, 2, 3, math.inf]], "box is not four numbers"),
        ([7], "box is not four numbers"),
        (7, "box is not four numbers"),
        ([], "no box"),
    ],
)
def test_boxes_are_fitted(boxes, expected):
    if isinstance(expected, list):
        assert fit_boxes(boxes, 100, 50, 0.02) == expected
    else:
        with pytest.raises(Dropped) as caught:
            fit_boxes(boxes, 100, 50, 0.02)
        assert caught.value.reason == expected


def test_boxes_of_another_size():
    assert as_shown([[1, 2, 3, 4]], 40, 30, Picture(40, 30, 6)) == [[1, 2, 3, 4]]
    for size in [(80, 60), (None, None), (30, 40), ("40", 30)]:
        with pytest.raises(Dropped, match=f"another size than annotated.*annotated as {size[0]!r} x {size[1]!r}"):
            as_shown([[1, 2, 3, 4]], *size, Picture(40, 30))


def test_texts():
    assert [text(value, "answer") for value in (" a b\n", 3, 2.5)] == ["a b", "3", "2.5"]
    for value in ("", " ", None, True, ["a"], math.nan):
        with pytest.raises(Dropped, match="no answer"):
            text(value, "answer")


def test_pictures(tmp_path):
    assert inspect_picture(encoded(form="JPEG", orientation=6)) == Picture(30, 40, 6, ".jpg")
    assert inspect_picture(encoded(form="WEBP")) == Picture(40, 30, 1, ".webp")
    assert inspect_picture(encoded(form="TIFF")).suffix == ".tif"
    missing = (None, b"", tmp_path / "gone.png", tmp_path, tmp_path / ("x" * 5000))
    unreadable = (b"no picture", encoded(size=(1000, 3)))
    cases = [(content, "picture missing") for content in missing]
    for content, reason in [*cases, *((content, "picture unreadable") for content in unreadable)]:
        with pytest.raises(Dropped) as caught:
            inspect_picture(content)
        assert caught.value.reason == reason


def test_the_order_is_that_of_every_machine():
    assert random_order(10, 0).tolist() == [3, 7, 5, 2, 8, 4, 9, 1, 6, 0]
    assert sorted(random_order(1000, 7).tolist()) == list(range(1000))
    assert random_order(0, 0).tolist() == []


def test_a_saved_folder_that_leads_out_of_itself_is_refused(tmp_path):
    saved, other = tmp_path / "saved", tmp_path / "secret.arrow"
    pictures = datasets.Features({"a": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict({"a": ["x"], "image": [None]}, features=pictures).save_to_disk(str(saved))
    state = json.loads((saved / "state.json").read_text())
    other.write_bytes((saved / state["_data_files"][0]["filename"]).read_bytes())
    assert open_table(str(saved), "train", None, ["a"], "image")["a"] == ["x"]
    state["_data_files"][0]["filename"] = "../secret.arrow"
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="lies outside"):
        open_table(str(saved), "train", None, ["a"], "image")
