"""Every benchmark from a folder in its own form, through the real `datasets`; options in texts; pictures and paths."""

import json
import os
import shutil
import time
from unittest.mock import Mock, call

import benchmark_folders
import datasets
import pytest
from benchmark_folders import BUILDERS, TABLE_CHOICES
from conftest import write_jsonl
from prepare_folders import encoded

from sayo.examples.benchmark_rows import split_options, without_letters
from sayo.examples.benchmarks import BENCHMARKS, PAPER_NINE, PUBLISHED, load_benchmark, local_copies, published
from sayo.examples.pictures import DataError
from sayo.grader.grader import is_correct


def as_tuples(examples) -> list:
    """The examples in the form of benchmark_folders.example."""
    return [
        (row["id"], row["question"], row["answer"], row.get("choices"), row.get("answer_type"), row["boxes"])
        for row in examples
    ]


FORMS = [
    *((name, BUILDERS[name]) for name in BENCHMARKS),
    ("wemath", benchmark_folders.build_wemath_repository),
    ("chartqa", benchmark_folders.build_chartqa_of_huggingface),
    ("mme_realworld_lite", BUILDERS["mme_realworld"]),  # the lite one for lmms-eval has these columns
]


@pytest.mark.parametrize(("name", "build"), FORMS)
def test_every_form_of_a_benchmark(name, build, tmp_path):
    expected = build(tmp_path)
    examples = load_benchmark(name, copy=tmp_path)
    assert as_tuples(examples) == expected
    for found in examples:
        assert found["image"].mode == "RGB" and len(found["images"]) == 1
        assert is_correct(f"I look. <answer>{found['answer']}</answer>", found), found["id"]
        assert not is_correct("I look. <answer>A or B</answer>", found)


def test_the_data_file_may_be_named_itself_and_a_saved_dataset_is_one(tmp_path):
    expected = BUILDERS["mmstar"](tmp_path / "hub")
    assert as_tuples(load_benchmark("mmstar", copy=tmp_path / "hub" / "mmstar.parquet")) == expected
    saved = datasets.load_dataset("parquet", data_files=str(tmp_path / "hub" / "mmstar.parquet"))
    datasets.DatasetDict({"val": saved["train"]}).save_to_disk(tmp_path / "saved")
    assert as_tuples(load_benchmark("mmstar", copy=tmp_path / "saved")) == expected


def test_what_was_left_out_is_said(tmp_path, capsys):
    words = {"m3cot": "1 of 3 questions have no picture: left out"}
    words["mmstar"] = "options of 1 questions stay in their text, graded by letter"
    for name, said in words.items():
        BUILDERS[name](tmp_path / name)
        load_benchmark(name, copy=tmp_path / name)
        assert f"{name}: {said}" in capsys.readouterr().err


def test_the_grading_of_each_kind(tmp_path):
    answers = {  # benchmark: (number of the example, an answer, whether it is right)
        "chartqa": [(0, "260", True), (0, "300", False), (1, "2012 and 2010", True), (2, "blue", True)],
        "mathvision": [(0, "4.5", True), (2, "1.5", True), (2, "3", False)],
        "ai2d": [(0, "hare", True), (0, "wolf", False), (1, "B", True), (1, "C", False)],
        "mmstar": [(0, "A: no", True), (2, "C", True), (2, "C or D", False)],
        "charxiv": [(0, "joint-cnn", True), (2, "2.0", True), (2, "3", False)],
        "mme_realworld_lite": [(0, "(B) 13%", True), (0, "13", True), (0, "(B) 24%", False)],
        "wemath": [(0, "3,215.36", True), (0, "No correct answer", False)],
    }
    for name, cases in answers.items():
        BUILDERS[name](tmp_path / name)
        examples = load_benchmark(name, copy=tmp_path / name)
        for number, answer, expected in cases:
            assert is_correct(f"<answer>{answer}</answer>", examples[number]) is expected, (name, answer)


@pytest.mark.parametrize("image", ["../outside.jpg", "/etc/hostname", "direct_attributes/../../outside.jpg"])
def test_no_picture_is_read_from_outside_of_the_folder(image, tmp_path):
    copy = tmp_path / "vstar"
    BUILDERS["vstar"](copy)
    (tmp_path / "outside.jpg").write_bytes(encoded(form="JPEG"))
    first, second = map(json.loads, (copy / "test_questions.jsonl").read_text().splitlines())
    write_jsonl(copy, first | {"image": image}, second, name="test_questions.jsonl")
    with pytest.raises(DataError, match="lies outside of"):
        load_benchmark("vstar", copy=copy)
    assert len(load_benchmark("vstar", copy=copy, bad_rows="skip")) == 1


def test_a_picture_that_is_not_there_is_named_with_the_places(tmp_path):
    BUILDERS["mme_realworld_lite"](tmp_path)
    (tmp_path / "data" / "imgs" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"'2.jpg': there is no such file in .*data/imgs"):
        load_benchmark("mme_realworld_lite", copy=tmp_path)


def test_the_hubs_cache_of_links_is_read(tmp_path, monkeypatch):
    """A snapshot holds links to files that really lie in the folder blobs beside all snapshots."""
    expected = BUILDERS["vstar"](tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(tmp_path / "blobs", snapshot, copy_function=os.symlink)
    download = Mock(return_value=str(snapshot))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for revision in (None, "c0ffee"):
        assert as_tuples(load_benchmark("vstar", revision=revision)) == expected
        assert download.call_args == call("craigwu/vstar_bench", repo_type="dataset", revision=revision)


def test_several_pictures_in_a_list(tmp_path):
    pictures = [{"bytes": encoded(color), "path": None} for color in ("red", "blue")]
    rows = [{"question": "Which?", "options": ["one", "two"], "answer": "1", "image": pictures}]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "test.parquet")
    (found,) = load_benchmark("ai2d", copy=tmp_path)
    assert [image.getpixel((0, 0)) for image in found["images"]] == [(255, 0, 0), (0, 0, 255)]


UNFIT = [  # benchmark, row beside its picture, words in the message
    ("chartqa", {"text": "?"}, "this copy has no column question or query .question., but text, image"),
    ("ai2d", {"question": "Q?", "options": ["x", "y"], "answer": "7"}, "answer '7' is not among choices"),
]


@pytest.mark.parametrize(("name", "row", "words"), UNFIT)
def test_a_copy_with_other_columns_or_answers_is_refused(name, row, words, tmp_path):
    rows = [row | {"image": benchmark_folders.embedded("red")}]
    benchmark_folders.hub_folder(tmp_path, {"test": ("data/test-00000-of-00001.parquet", rows)})
    with pytest.raises(DataError, match=words):
        load_benchmark(name, copy=tmp_path)


def test_without_the_hub_the_way_out_is_said(tmp_path):
    with pytest.raises(DataError, match="lmms-lab/ChartQA of the Hub cannot be read.*--benchmark_root chartqa=FOLDER"):
        load_benchmark("chartqa")
    with pytest.raises(DataError, match="vstar: craigwu/vstar_bench of the Hub cannot be read"):
        load_benchmark("vstar")


def test_copies_are_found_by_name_and_by_repository(tmp_path):
    for name in ("vstar_bench", "chartqa", "elsewhere"):
        (tmp_path / name).mkdir()
    roots = [str(tmp_path), f"ai2d={tmp_path / 'elsewhere'}"]
    found, problems = local_copies(["vstar", "chartqa", "ai2d"], roots)
    assert found == {"vstar": tmp_path / "vstar_bench", "chartqa": tmp_path / "chartqa", "ai2d": tmp_path / "elsewhere"}
    assert problems == []
    _, problems = local_copies(["mmstar"], roots)
    assert "no mmstar or MMStar in" in problems[0] and "mmstar=path" in problems[0] and "Lin-Chen/MMStar" in problems[0]
    _, problems = local_copies(["ai2d"], ["ai2d=/gone", "nosuch=/tmp"])
    assert "there is no '/gone'" in problems[0] and "name=path; names: " in problems[1]


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Q?\nOptions: A: one, B: two", "Q?", ["one", "two"]),
        ("Q?\nOptions: A: one\nB: two\nC: three", "Q?", ["one", "two", "three"]),
        ("Q? Options: A: 1,000, B: 2,000, C: 3", "Q?", ["1,000", "2,000", "3"]),
        ("Q?\n(A) one (B) two (C) three", "Q?", ["one", "two", "three"]),
        ("Q?\nA. one\nB. two", "Q?", ["one", "two"]),
        ("A. 200.96;B. 3215.36; C. 6;", "", ["200.96", "3215.36", "6"]),
        ("Is (A) or (B) more?\nChoices:\n(A) one\n(B) two\n(C) no", "Is (A) or (B) more?", ["one", "two", "no"]),
        ("With A: red and B: blue?\nOptions: A: one, B: two", "With A: red and B: blue?", ["one", "two"]),
        ("Vitamin A. Which food has it?", "Vitamin A. Which food has it?", []),
        ("Q?\nOptions: A: one, C: two", "Q?\nOptions: A: one, C: two", []),
        ("Q?\nOptions: A: , B: two", "Q?\nOptions: A: , B: two", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_split_options(text, question, options):
    assert split_options(text) == (question, options)


def test_letters_of_a_list_go_when_all_have_them():
    assert without_letters(["(A) 24%", "(B) 13%"]) == ["24%", "13%"] and without_letters(["A. x", "B: y"]) == ["x", "y"]
    assert without_letters(["A", "B"]) == ["A", "B"]  # the letters are the options
    assert without_letters(["A. x", "y"]) == ["A. x", "y"] and without_letters([]) == []
    assert without_letters(list(benchmark_folders.TABLE_OPTIONS)) == TABLE_CHOICES


def test_splitting_takes_no_time():
    begin = time.perf_counter()
    for text in ("(A) " * 5000, "A: " * 5000, "A. B. " * 3000, ", " * 20000, " " * 50000, "x" + " " * 19000 + "y"):
        split_options(text)
    assert time.perf_counter() - begin < 20


def test_the_papers_figures_are_found_by_the_name_of_the_model_alone():
    assert published("Qwen/Qwen3-VL-8B-Instruct")["vstar"] == (81.15, 82.20)
    assert published("somewhere/Qwen3-VL-4B-Instruct")["charxiv"] == (38.00, 41.90)
    assert published("OpenGVLab/InternVL3_5-8B-HF")["wemath"] == (20.06, 25.23)
    others = "Qwen/Qwen3-VL-8B-Thinking Qwen/Qwen3-VL-2B-Instruct OpenGVLab/InternVL3_5-14B-HF data/tiny_policy"
    assert [published(other) for other in others.split()] == [{}] * 4


def test_the_papers_averages_come_out():
    """Each row of the paper's table ends with the average of the nine, to two decimals."""
    averages = {"Qwen3-VL-4B": (59.15, 62.17), "Qwen3-VL-8B": (59.64, 64.03), "InternVL3.5-8B": (50.49, 53.77)}
    for model, rows in PUBLISHED.items():
        for figures, average in zip(rows, averages[model], strict=True):
            assert len(figures) == len(PAPER_NINE) == 9
            assert abs(sum(figures) / 9 - average) < 0.011, model
