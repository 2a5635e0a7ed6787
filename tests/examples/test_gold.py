"""Right answers and choices as data sets write them, read into what a completion is graded against."""

import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOOD
from hypothesis import given
from hypothesis import strategies as st

from sayo.examples.load import load_examples
from sayo.grader.gold import read_answer, without_noise
from sayo.grader.grader import is_correct

AB, PETS = ["red", "blue"], ["cat", "dog", "bird"]
NOISE = float(np.float32(0.1))

READ = [  # answer, what is beside it, what it is read as, an answer that stays wrong
    ("<answer> 3 </answer>", {}, "3", "<answer>"),
    ("<think>Look.</think>\n\n<answer>A</answer>", {}, "A", "Look"),
    ("<think>It is A.</think>\nB", {}, "B", "A"),
    ("<think>Not <answer>A</answer>.</think><answer>B</answer>", {}, "B", "A"),
    ("So 6 * 7 = 42. #### 42", {}, "42", "6"),
    ("2 + 2 = 4\n#### 1,004", {"answer_type": "number"}, "1,004", "4"),
    ("So $x=2$, thus \\boxed{42}.", {"answer_type": "math"}, "42", "2"),
    ("First \\boxed{1}, then $\\boxed{\\frac{1}{2}}$.", {"answer_type": "math"}, "\\frac{1}{2}", "1"),
    ("\\boxed{A} or \\boxed{B}", {}, "B", "A"),
    ("It has 3 parts.\nThe answer is: 12", {"answer_type": "number"}, "12", "3"),
    ("**Step 1** look\n**Answer:** blue", {}, "blue", "look"),
    ("B<|im_end|>", {"choices": PETS}, "B", "A"),
    ("Half of it is \\boxed{", {}, "Half of it is \\boxed{", "Half"),
    ("#### no. 4", {}, "no. 4", "4"),
    (3, {}, "3", "4"),
    (3.0, {"choices": ["1", "2", "3"]}, "3", "B"),
    (0.10000000149, {}, "0.1", "0.11"),
    (NOISE, {"answer_type": "number"}, "0.1", "0.100001"),
    ("0.10000000149011612", {"choices": ["0.1", "0.2"]}, "0.1", "0.2"),
    (Decimal("0.10"), {}, "0.10", "0.01"),
    (datetime.date(2020, 1, 2), {}, "2020-01-02", "2020"),
    (datetime.datetime(2020, 1, 2), {}, "2020-01-02", "2020-01-02 00:00"),
    (datetime.datetime(2020, 1, 2, 3, 4), {}, "2020-01-02 03:04:00", "2020-01-02"),
    (True, {}, "True", "no"),
    (False, {"choices": ["yes", "no"]}, "no", "yes"),
    (True, {"choices": ["False", "True"]}, "True", "A"),
    ("(A)", {"choices": AB}, "red", "B"),
    ("A.", {"choices": AB}, "red", "B"),
    ("a", {"choices": AB}, "a", "B"),
    ("B. blue", {"choices": AB}, "blue", "A"),
    ("Option B", {"choices": AB}, "blue", "A"),
    ("Red", {"choices": AB}, "Red", "blue"),
    ("<answer>B</answer>", {"choices": AB}, "B", "A"),
    (0, {"choices": PETS}, "cat", "dog"),
    ("2", {"choices": PETS}, "bird", "B"),
    (1.0, {"choices": PETS}, "dog", "cat"),
    (2, {"choices": [1, 2, 3]}, "2", "3"),
    (0.5, {"choices": [0.25, 0.5]}, "0.5", "0.25"),
    (NOISE, {"choices": [NOISE, 0.5]}, "0.1", "0.5"),
    ("B", {"choices": {"A": "red", "B": "blue"}}, "B", "red"),
    ("B", {"choices": {"B": "red", "A": "blue"}}, "red", "B"),  # the prompt letters them anew
    ("A", {"choices": {"A": "B", "B": "A"}}, "B", "A"),
    (1, {"choices": {"1": "red", "2": "blue"}}, "red", "blue"),
    ("blue", {"choices": {"A": "red", "B": "blue", "C": None}}, "blue", "A"),
    ("2", {"choices": {"label": ["1", "2"], "text": AB}}, "blue", "red"),
    ("blue", {"choices": "['red', 'blue']"}, "blue", "red"),
    ("red", {"choices": []}, "red", "blue"),
    ("red", {"choices": {}}, "red", "blue"),
    (["red"], {}, "red", "blue"),
    (["B", "dog"], {"choices": PETS}, "B", "A"),
    (["red", "blue"], {"answer_type": "list"}, "[red, blue]", "red"),
]


@pytest.mark.parametrize(("answer", "beside", "expected", "wrong"), READ)
def test_an_answer_is_read_as_what_a_completion_can_say(answer, beside, expected, wrong):
    row = {"answer": answer} | beside
    found = read_answer(row)
    assert found["answer"] == expected
    assert is_correct(f"I look. <answer>{expected}</answer>", found)
    assert not is_correct(f"I look. <answer>{wrong}</answer>", found)


def test_several_answers_are_each_right_and_choices_that_are_empty_are_none():
    found = read_answer({"answer": ["red", "crimson", 3, "crimson"], "choices": []})
    assert found == {"answer": "red", "other_answers": ["crimson", "3"]}
    for said, right in (("Crimson", True), ("3.0", True), ("red", True), ("red, crimson", False), ("4", False)):
        assert is_correct(f"<answer>{said}</answer>", found) is right
    for said in ("yes", "true", "True"):
        assert is_correct(f"<answer>{said}</answer>", read_answer({"answer": True}))


@given(st.integers(-999_999, 999_999), st.integers(1, 6))
def test_the_noise_of_float32_goes(number, places):
    text = f"{number / 10**places:.{places}f}"
    single = float(np.float32(text))
    for written in (repr(single), f"{single:.11g}", f"{single:.13g}"):
        assert float(without_noise(written)) == pytest.approx(float(text), rel=1e-9)
        assert is_correct(f"<answer>{text}</answer>", {"answer": without_noise(written)})


@pytest.mark.parametrize(
    "text",
    [
        "0.0009765625",
        "0.1484375",
        "0.0999755859375",
        "5.0999755859375",
        "2.00000001",
        "0.3333333333333333",
        "3.14159265358979",
        "0.12345678",
        "1e-30",
    ],
)
def test_a_number_that_no_float32_made_stays(text):
    assert without_noise(text) == text


COLUMNS = [
    (pa.array([0.1], pa.float32()), "0.1"), (pa.array([0.1], pa.float16()), "0.1"), (pa.array([0.1]), "0.1"),
    (pa.array([Decimal("0.10")]), "0.10"), (pa.array([True]), "yes"), (pa.array([3], pa.int8()), "3"),
    (pa.array([datetime.date(2020, 1, 2)]), "2020-01-02"), (pa.array([["red", "crimson"]]), "crimson"),
    (pa.array([2.5], pa.float16()), "2.5"), (pa.array([1234.56], pa.float32()), "1,234.56"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "said"), COLUMNS)
def test_a_column_of_any_type_holds_answers(folder, column, said):
    path = folder / "rows.parquet"
    picture = (folder / "a.png").read_bytes()
    pq.write_table(pa.table({"image": [picture], "question": ["Q?"], "boxes": [GOOD["boxes"]], "answer": column}), path)
    example = load_examples(str(path))[0]
    assert is_correct(f"I look. <answer>{said}</answer>", example)
    assert not is_correct("I look. <answer>0.2</answer>", example) and example["boxes"] == GOOD["boxes"]
