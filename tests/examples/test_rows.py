"""Files of JSON as people have them, and columns under the names that people gave them."""

import json
import tracemalloc

import datasets
import pytest
from conftest import GOOD, without, write_jsonl

from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.examples.rows import Lines
from sayo.run.config import PolicyConfig
from sayo.settings import ConfigError, read_config


def test_lines_as_editors_write_them(folder):
    """A byte order mark, Windows line ends, blank lines between and after, no line end at the end."""
    questions = ["What color?", "¿Qué color?"]
    lines = [json.dumps(GOOD | {"question": question}, ensure_ascii=False) for question in questions]
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n \r\n{lines[1]}\r\n\r\n\n".encode())
    (folder / "y.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "\n".join(["", *lines]).encode())
    for name, numbers in (("x.jsonl", [1, 4]), ("y.jsonl", [3, 4])):
        examples = load_examples(str(folder / name))
        assert [example["question"] for example in examples] == questions
        assert [examples._rows.label(row) for row in range(2)] == [f"{name}:{number}" for number in numbers]


def test_list_in_a_json_file_counts_from_zero(folder):
    (folder / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([without("answer"), GOOD], indent=2).encode())
    with pytest.raises(DataError, match=r"x\.json:0: answer is None"):
        load_examples(str(folder / "x.json"))
    assert [example["id"] for example in load_examples(str(folder / "x.json"), bad_rows="skip")] == ["x.json:1"]


def test_lines_are_not_in_memory(tmp_path):
    """200,000 lines of 1,000 bytes."""
    with (tmp_path / "long.jsonl").open("w") as file:
        file.writelines(f'{{"id": {i}, "text": "{"x" * 980}"}}\n' for i in range(200_000))
    tracemalloc.start()
    lines = Lines(tmp_path / "long.jsonl")
    assert [json.loads(lines[i])["id"] for i in (0, 199_999, 77_777)] == [0, 199_999, 77_777]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(lines) == 200_000 and held < 5e6


NESTED = {
    "uid": "7", "img": {"path": "a.png"}, "query": "What color?", "label": {"text": "red", "score": 1},
    "objects": [{"bbox": [1, 2, 30, 20], "area": 5}, {"bbox": [3, 4, 5, 6], "area": 6}],
    "image": "a thumbnail", "boxes": "other boxes", "kind": "c",
}  # fmt: skip
FIELDS = ["id=uid", "image=img.path", "question=query", "answer=label.text", "boxes=objects.bbox"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_other_names(folder, kind):
    data = write_jsonl(folder, NESTED, NESTED | {"uid": 8, "images": ["a.png"]})
    if kind == "parquet":
        data = str(folder / "train.parquet")
        datasets.Dataset.from_list([NESTED, NESTED | {"uid": "8"}]).to_parquet(data)
    examples = load_examples(data, fields=FIELDS)
    assert [example["id"] for example in examples] == ["7", "8"]
    for example in examples:
        assert example["image"].size == (40, 30) and example["boxes"] == [[1, 2, 30, 20], [3, 4, 5, 6]]
        assert (example["question"], example["answer"], example["kind"]) == ("What color?", "red", "c")
        assert "query" not in example and "uid" not in example


def test_columns_may_change_places(folder):
    row = GOOD | {"question": "red", "answer": "What color?", "label.text": "dotted"}
    example = load_examples(write_jsonl(folder, row), fields=["question=answer", " answer = question "])[0]
    assert (example["question"], example["answer"]) == ("What color?", "red")
    assert load_examples(write_jsonl(folder, row), fields=["answer=label.text"])[0]["answer"] == "dotted"


def test_column_that_only_later_rows_have(folder):
    data = write_jsonl(folder, GOOD, "not JSON", GOOD | {"region": [[[1, 1], [9, 1], [9, 9]]]})
    examples = load_examples(data, fields=["polygons=region"], bad_rows="skip")
    assert ["polygons" in example for example in examples] == [False, True]


def test_everything_wrong_with_fields_is_said_at_once(folder):
    fields = ["query", "=x", "colour=kind", "answer=label.txt", "answer=label.text", "boxes=bbox", "question=query"]
    with pytest.raises(DataError) as raised:
        load_examples(write_jsonl(folder, NESTED), fields=fields)
    wanted = ["'query' is not name=column", "'=x' is not name=column", "answer has the column 'label.txt' already"]
    wanted += ["unknown name 'colour'; valid are id, image, images, question", "no row has 'label.txt'"]
    wanted += ["no row has 'bbox'", "columns are: uid, img.path, query, label.text, label.score, objects.bbox, "]
    wanted.append("objects.bbox, objects.area, image, boxes, kind")
    assert [words for words in wanted if words not in str(raised.value)] == []
    assert "question=query:" not in str(raised.value)


def test_mapped_name_does_not_fall_back_to_its_own_column(folder):
    fallback = without("question") | {"query": "What color?"}
    data = write_jsonl(folder, fallback, GOOD | {"question": "Another?", "id": "without query"})
    with pytest.raises(DataError, match=r"train\.jsonl:2 \(id 'without query'\): question is None, keys are: .*answer"):
        load_examples(data, fields=["question=query"])
    objects = [{"bbox": [1, 2, 3, 4]}, {"area": 3}]
    data = write_jsonl(folder, GOOD | {"objects": objects[:1]}, GOOD | {"objects": objects})
    with pytest.raises(DataError, match=r"train\.jsonl:2: boxes is empty or missing"):
        load_examples(data, fields=["boxes=objects.bbox"])


def test_mapped_column_that_is_a_name_itself_keeps_it(folder):
    example = load_examples(write_jsonl(folder, GOOD), fields=["id=image"])[0]
    assert example["id"] == "a.png" and example["image"].size == (40, 30)
    example = load_examples(write_jsonl(folder, GOOD), fields=["answer=question"])[0]
    assert example["answer"] == example["question"] == GOOD["question"]
    # A region is of one kind: boxes that a file calls polygons are not polygons, too.
    data = write_jsonl(folder, without("boxes") | {"polygons": [[1, 2, 30, 20]]})
    example = load_examples(data, fields=["boxes=polygons"])[0]
    assert example["boxes"] == [[1, 2, 30, 20]] and "polygons" not in example


@pytest.mark.parametrize("kind", ["folder", "hub", "parquet"])
@pytest.mark.parametrize("mapped", [False, True])
def test_class_labels_are_their_names(folder, kind, mapped):
    label = datasets.ClassLabel(names=["cat", "dog"])
    nested = {"objects": [{"kind": 1}, {"kind": None}], "meta": {"tags": [0, 1]}}
    rows = [GOOD | nested | {"answer": number} for number in (1, 0, -1)]
    labels = {"answer": label, "objects": [{"kind": label}], "meta": {"tags": datasets.Sequence(label)}}
    features = datasets.Dataset.from_list(rows).features | labels
    if mapped:
        rows = [{"label" if key == "answer" else key: value for key, value in row.items()} for row in rows]
        features["label"] = features.pop("answer")
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    data = str(folder / "table" / "train.parquet") if kind == "parquet" else str(folder / "table")
    (folder / "table").mkdir()
    table.save_to_disk(data) if kind == "folder" else table.to_parquet(folder / "table" / "train.parquet")
    for name in ("a.png", "b.png"):
        (folder / "table" / name).write_bytes((folder / name).read_bytes())
    examples = load_examples(data, fields=["answer=label"] if mapped else [], bad_rows="skip")
    assert [example["answer"] for example in examples] == ["dog", "cat"]
    assert len(examples.skipped) == 1 and "answer is None" in examples.skipped[0]  # -1 is no label
    assert examples[0]["objects"] == [{"kind": "dog"}, {"kind": None}]
    assert examples[0]["meta"] == {"tags": ["cat", "dog"]}


def test_the_settings_reach_the_loader(folder):
    data = write_jsonl(folder, NESTED, NESTED | {"uid": 8})
    flags = ["--data", data, "--limit", "1", "--box_format", "xywh", "--fields", *FIELDS]
    config = read_config(PolicyConfig, flags)
    examples = load_examples(config.data, **config.data_arguments())
    assert len(examples) == 1 and examples[0]["boxes"] == [[1, 2, 31, 22], [3, 4, 8, 10]]
    assert load_examples("scenes", **read_config(PolicyConfig, []).data_arguments())[0]["boxes"]
    with pytest.raises(ConfigError, match="(?s)box_format='yolo'.*fields: 'query' is not name=column"):
        read_config(PolicyConfig, ["--box_format", "yolo", "--fields", "query"])
