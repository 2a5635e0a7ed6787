"""Hostile answers against the clock, and the process that answers for mathematics."""

import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from test_grader import CHART, FOUR, LETTER, LIST, MATH_CHOICES, NUMBER, PETS, YES

from sayo.grader import math_answers
from sayo.grader.grader import is_correct

HOSTILE = [
    "<answer>a" + " " * 200_000 + "b</answer>",  # hung the regex that took the block out before
    "<answer>" + "(" * 400 + "</answer>",
    "<answer>" + "1," * 240 + "</answer>",
    "<answer>" + "1 " * 240 + "</answer>",
    "<answer>" + "9" * 490 + "</answer>",
    "<answer>" + "{" * 90 + "}" * 90 + "</answer>",
    "<answer>" + "\\frac{" * 30 + "</answer>",
    "<answer>1e99</answer>",
    "<answer>" + "the answer is " * 30 + "</answer>",
    "<answer>" + "*" * 490 + "</answer>",
    "<answer>" + "A. " * 150 + "</answer>",
    "<answer>9^{9^{9^{9}}}</answer>",  # one operation on integers that no signal handler interrupts
    "<answer>(10^{9})!</answer>",
    "<answer>" * 50_000,
    "<answer>" + "\ud800" + "</answer>",
]


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", 1.0)
    math_answers.same_value.cache_clear()
    math_answers.same_value("1", "2")  # the child is there, so that no test measures its start


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40].encode("ascii", "replace").decode())
def test_no_answer_takes_long(text, one_second):
    examples = [MATH_CHOICES, FOUR, PETS, NUMBER, CHART, YES, LIST, LETTER, {"answer": "red"}]
    begin = time.perf_counter()
    assert not any(is_correct(text, example) for example in examples)
    assert time.perf_counter() - begin < 40


def test_mathematics_goes_on_after_an_answer_that_was_stopped(one_second):
    begin = time.perf_counter()
    assert not math_answers.same_value("4", "9^{9^{9^{9}}}")
    assert 0.9 < time.perf_counter() - begin < 20
    assert math_answers.same_value("\\frac{1}{2}", "\\frac{2}{4}")


def test_mathematics_in_other_threads(one_second):
    """math-verify itself refuses to work outside of the main thread."""
    with ThreadPoolExecutor(4) as pool:
        fractions, plain = [[form.format(n) for n in (1, 3, 5, 7)] for form in ("\\frac{{{}}}{{2}}", "{}/2")]
        assert list(pool.map(math_answers.same_value, fractions, plain)) == [True] * 4


def test_a_missing_math_verify_is_named(monkeypatch):
    math_answers.stop()
    math_answers.same_value.cache_clear()
    monkeypatch.setattr(math_answers.sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="pip install -r requirements.txt"):
        math_answers.same_value("1", "\\frac{3}{3}")


def test_an_interrupted_question_does_not_answer_the_next_one(one_second, monkeypatch):
    """The reply of the question that Ctrl-C cut short was read as that of the one after it."""

    monkeypatch.setattr(math_answers._child, "stdout", Mock(**{"readline.side_effect": KeyboardInterrupt}))
    with pytest.raises(KeyboardInterrupt):
        math_answers.same_value("3", "3")
    assert not math_answers.same_value("3", "4") and math_answers.same_value("7", "7.0")
