"""Files of JSON as people have them, and columns under the names that people gave them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc

import datasets
import pytest
from conftest import GOOD, without, write_jsonl

from evaluate import load_held_out
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.examples.rows import Lines
from sayo.run.config import PolicyConfig
from sayo.settings import ConfigError, read_config
from train_rl import Config


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


def table(rows: list[dict], **options) -> bytes:
    """Rows as a table of texts, lists in JSON, as csv.DictWriter has them."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), **options)
    writer.writeheader()
    writer.writerows(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    )
    return file.getvalue().encode()


ANSWERS = [
    "2020-01-01",
    "007",
    "1.0",
    "NA",
    "true",
    'a, "b"; c\td',
    "1e5",
]  # each was something else in a table of pandas
ROWS = [GOOD | {"answer": answer, "id": f"n{number}"} for number, answer in enumerate(ANSWERS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENTS = [  # name, bytes
    ("a.jsonl", LINES), ("a.JSONL", LINES), ("a.ndjson", LINES), ("a.jsonl.gz", gzip.compress(LINES)),
    ("a.ndjson.bz2", bz2.compress(LINES)), ("a.JSONL.XZ", lzma.compress(LINES)),
    ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ("a.csv", table(ROWS)), ("a.CSV", b"\xef\xbb\xbf" + table(ROWS)), ("a.tsv", table(ROWS, delimiter="\t")),
    ("semicolons.csv", table(ROWS, delimiter=";")), ("a.csv.gz", gzip.compress(table(ROWS))),
    ("unix.csv", table(ROWS, lineterminator="\n")), ("python.csv", table(ROWS).replace(b"[[", b"[ [")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), CONTENTS, ids=[name for name, _ in CONTENTS])
def test_a_file_in_any_text_format_has_the_texts_that_are_in_it(folder, name, content):
    """By its own name, through a link of any name from elsewhere, and as the only file of a folder."""
    inner = folder / "inner"
    inner.mkdir()
    (inner / name).write_bytes(content)
    (inner / "a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "a.png").unlink()
    for link in (name, "link"):
        (folder / link).symlink_to(inner / name)
    wanted = [(row["id"], row["answer"], row["boxes"]) for row in ROWS]
    sources = [inner / name, folder / name, folder / "link"]
    for source in sources + ([inner] if name in ("a.jsonl", "a.csv", "a.tsv", "a.json.gz") else []):
        found = [(example["id"], example["answer"], example["boxes"]) for example in load_examples(str(source))]
        assert found == wanted


BROKEN_FILES = [  # name, bytes, words
    ("cut.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be unpacked .*pack it again"),
    ("no.jsonl.gz", b"\x1f\x8bnothing", "cannot be unpacked"),
    ("wide.csv", table(ROWS).decode().encode("utf-16"), "UTF-16; save it as UTF-8"),
    ("latin.csv", "image,question\na.png,\xe9".encode("latin-1"), "no table in UTF-8"),
    ("quote.csv", b'image,question\na.png,"Who', "no table in UTF-8 .*unexpected end of data"),
    ("twice.csv", b"image,answer,answer\na,b,c\n", "two columns with the name 'answer'"),
    ("long.csv", table(ROWS[:1]) + b"\na,b,c,d,e,f,g\n", r"long.csv:4: cells \['f', 'g'\] are beyond the names"),
    ("boxes.csv", table([ROWS[0] | {"boxes": "1 2 3 4"}]), "boxes is '1 2 3 4'"),
    ("deep.csv", table([ROWS[0] | {"boxes": "[" * 5000}]), r"boxes is '\[\[\["),
    ("code.csv", table([ROWS[0] | {"boxes": "[__import__('os')]"}]), r"boxes is \"\[__import__"),
    ("a.txt", LINES, "file of another type"),
    ("part-*.jsonl", None, "no file has such a name"),
    ("*/train.jsonl", None, "reaches into several folders"),
    ("*", None, "(?s)reaches into several folders"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BROKEN_FILES, ids=[case[0] for case in BROKEN_FILES])
def test_a_file_that_cannot_be_read_is_named(folder, name, content, words):
    for inner in ("x", "y"):
        (folder / inner).mkdir()
        write_jsonl(folder / inner, GOOD)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_examples(str(folder / name))


def test_a_pattern_names_several_files_of_a_folder(folder):
    for number in (2, 1):
        write_jsonl(folder, "", GOOD | {"question": f"{number}?"}, name=f"part-{number}.jsonl")
    (folder / "part-3.csv").write_bytes(table([GOOD | {"question": "3?"}]))
    examples = load_examples(str(folder / "part-*"))
    assert [example["id"] for example in examples] == ["part-1.jsonl:2", "part-2.jsonl:2", "part-3.csv:2"]
    assert [example["question"] for example in examples] == ["1?", "2?", "3?"]
    write_jsonl(folder, GOOD | {"query": "a column of one file"}, name="part-4.jsonl")
    assert len(load_examples(str(folder / "part-*"), fields=["polygons=query"], bad_rows="skip")) == 3
    write_jsonl(folder, GOOD, name="part-[x].jsonl")  # the name of a file
    assert len(load_examples(str(folder / "part-[x].jsonl"))) == 1


CONVERSATION = {
    "image": "a.png",
    "conversations": [{"value": "Which?"}, {"value": "red"}],
    "prompt": [{"content": "Q?"}],
}
TURNS = [  # --fields, question and answer, or words of the message
    (["question=conversations.0.value", "answer=conversations.1.value"], ("Which?", "red")),
    (["question=conversations.-2.value", "answer=conversations.-1.value"], ("Which?", "red")),
    (["question=prompt.content", "answer=conversations.1.value"], ("Q?", "red")),
    (
        ["question=conversations.value", "answer=conversations.1.value"],
        r"question is \['Which\?', 'red'\].*conversations.0",
    ),
    (["question=prompt.1.content", "answer=conversations.1.value"], "no row has 'prompt.1.content'"),
    ([], "no row has answer, question; .*\n.*question=prompt.0.content answer=conversations.1.value"),
]


@pytest.mark.parametrize(("fields", "wanted"), TURNS)
def test_one_turn_of_a_conversation_has_a_number(folder, fields, wanted):
    data = write_jsonl(folder, CONVERSATION)
    if isinstance(wanted, tuple):
        (example,) = load_examples(data, fields=fields, require_boxes=False)
        assert (example["question"], example["answer"]) == wanted
    else:
        with pytest.raises(DataError, match=wanted):
            load_examples(data, fields=fields, require_boxes=False)


FOREIGN = [  # a row, and the --fields that read it
    ({"img_path": "a.png", "Query": "Q?", "label": "red", "bbox": [[1, 2, 3, 4]]},
     "image=img_path question=Query answer=label boxes=bbox"),
    ({"images": ["a.png"], "problem": "Q?", "solution": "red"}, "question=problem answer=solution"),
    ({"image_paths": ["a.png"], "question": "Q?", "answer": "red", "box": [1, 2, 3, 4]},
     "images=image_paths boxes=box"),
    ({"image": "a.png", "question": "Q?", "reward_model": {"ground_truth": "red"}}, "answer=reward_model.ground_truth"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fields"), FOREIGN)
def test_columns_of_others_are_one_message_with_the_fields_that_read_them(folder, row, fields):
    for rows in ([row] * 30, ["no JSON", row]):
        data = write_jsonl(folder, *rows)
        for bad_rows in ("error", "skip"):
            with pytest.raises(DataError, match="no row has ") as raised:
                load_examples(data, require_boxes=False, bad_rows=bad_rows)
            first, *others = str(raised.value).splitlines()
            assert others == [f"this may fit: --fields {fields}"] and "its columns are: " in first
    examples = load_examples(data, require_boxes=False, bad_rows="skip", fields=fields.split())
    assert [(example["question"], example["answer"]) for example in examples] == [("Q?", "red")]
    # Rows of sayo's own among them: each bad row is named.
    with pytest.raises(DataError, match="1 bad and 1 good rows"):
        load_examples(write_jsonl(folder, row, GOOD))


EVAL = [  # flags, fields and box format of the data to evaluate
    ([], ["question=query"], "xywh"),
    (["--eval_fields", "none"], [], "xywh"),
    (["--eval_fields", "answer=label", "--eval_box_format", "xyxy_1000"], ["answer=label"], "xyxy_1000"),
]


@pytest.mark.parametrize(("flags", "fields", "box_format"), EVAL)
def test_data_to_evaluate_may_have_columns_and_a_box_format_of_its_own(folder, flags, fields, box_format):
    row = {
        "image": "a.png",
        "label": "red",
        "answer": "blue",
        "query": "Which?",
        "question": "What?",
        "boxes": [[1, 2, 30, 20]],
    }
    data = write_jsonl(folder, row)
    config = read_config(
        Config, ["--data", data, "--eval_data", data, "--box_format", "xywh", "--fields", "question=query", *flags]
    )
    (example,) = load_held_out(config)
    mapped = dict(field.split("=") for field in fields)
    assert [example[name] for name in ("question", "answer")] == [
        row[mapped.get(name, name)] for name in ("question", "answer")
    ]
    with pytest.raises(DataError, match="--eval_fields does not fit"):
        load_held_out(read_config(Config, ["--eval_data", data, "--eval_fields", "question=gone"]))
    with pytest.raises(ConfigError, match="(?s)eval_box_format='yolo'.*eval_fields: 'query' is not name=column"):
        read_config(Config, ["--eval_box_format", "yolo", "--eval_fields", "query"])
