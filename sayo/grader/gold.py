"""What data sets write as the right answer and as choices, read into the form that completions are graded against."""

import ast
import datetime
import math
import re
import string
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from sayo.grader.grader import YES_NO, answer_problem, choice_index, choice_labels, is_correct, unwrapped
from sayo.grader.notation import clean, normalized

LONGEST_LIST = 10_000  # characters of choices that are a list written as text, as in a CSV file


def read_answer(row: dict) -> dict:
    """The row's answer, choices and answer_type as the grader takes them, without those that are absent.

    An answer may be a text, number, boolean or date, or a list of several that are each right (`other_answers`); with
    answer_type list, the list is the answer. It is taken out of what stands around it (`unwrapped`). Choices may be a
    list, {"A": text, ...} or {"label": [...], "text": [...]}; the answer then names one by text, label or key, or by
    its index from 0.

    Raises ValueError, with the fix, for an answer that would not be right if a completion gave it.
    """
    written, answer_type, keys = row.get("answer"), row.get("answer_type"), ", ".join(key for key in row if key != "id")
    choices, names = _choices(row.get("choices"))
    given = written if isinstance(written, list) and written else [written]
    texts = [_text(value) for value in given]
    if not all(text and text.strip() for text in texts):
        fix = "write a text that is not empty, or a number, or a list of right answers"
        raise ValueError(f"answer is {written!r:.200}, keys are: {keys}; {fix}")
    if answer_type == "list" and isinstance(written, list):
        if parts := [text for text in texts if re.search("[,;]", text)]:
            raise ValueError(f"answer {written!r:.200} has {parts[0]!r:.200} in its list; write items without , and ;")
        texts = [f"[{', '.join(texts)}]"]
    if answer_type is None and not choices and any(isinstance(value, bool) for value in given):
        answer_type = "yes_no"
    answers = [text if choices and text.strip() in choices else unwrapped(text) for text in texts]
    if choices:
        answers = [_named(answer, choices, names) for answer in answers]
        if len({choice_index(clean(answer), choices) for answer in answers}) > 1:
            raise ValueError(f"answer {written!r:.200} names several of the choices; write the one that is right")
    found = {"answer": answers[0], "choices": choices, "answer_type": answer_type}
    for answer in answers:
        if problem := answer_problem(answer, answer_type, choices):
            raise ValueError(problem)
        if not is_correct(f"<answer>{answer}</answer>", found | {"answer": answer}):
            fix = "write the answer alone, without tags or reasoning"
            raise ValueError(f"answer {answer!r:.200} would not be right if a completion gave it; {fix}")
    others = list(dict.fromkeys(answers[1:])) if not choices else []
    return {name: value for name, value in (found | {"other_answers": others}).items() if value}


def _text(value) -> str | None:
    """A scalar as text, None for anything else. Dates are as in ISO 8601, midnight left out."""
    if isinstance(value, datetime.datetime):
        return str(value.date() if value.time() == datetime.time() else value)
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | Decimal | datetime.date):
        return without_noise(str(value))
    return None


def without_noise(text: str) -> str:
    """0.1 for 0.10000000149: what a float32 column makes of a number of at most seven digits, however it was cut."""
    if not re.fullmatch(r"-?[0-9]{1,8}\.[0-9]{6,40}(?:e-[0-9]{2})?", text) or _digits(text) < 9:
        return text
    single, written = np.float32(text), Decimal(text)
    exact, short = Decimal(float(single)), np.format_float_positional(single, unique=True, trim="-")
    cut = float(text) == float(single) or round(exact, -written.as_tuple().exponent) == written
    is_noise = exact != written or abs(single) >= 1  # 1234.56005859375 was 1234.56, but 819/8192 has digits of its own
    return short if cut and is_noise and _digits(short) <= 7 else text


def _digits(number: str) -> int:
    """Significant digits of a number as written."""
    return len(number.partition("e")[0].replace(".", "").lstrip("-0"))


def _choices(value) -> tuple[list[str] | None, list[str]]:
    """(texts, names), names only where the data set has its own. Raises ValueError."""
    given, names = value, []
    if isinstance(value, str) and value.strip()[:1] in ("[", "{") and len(value) <= LONGEST_LIST:
        try:
            given = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            given = value
    if isinstance(given, dict) and {"label", "text"} <= given.keys():
        names, given = given["label"], given["text"]
    elif isinstance(given, dict):  # a table has null for the letters that this row lacks
        present = {name: text for name, text in given.items() if text is not None}
        names, given = list(present), list(present.values())
    if given in (None, [], ""):
        return None, []
    texts = [_text(choice) for choice in given] if isinstance(given, list) else [None]
    if None in texts or not isinstance(names, list) or len(names) not in (0, len(texts)):
        raise ValueError(f"choices is {value!r:.200}; write a list of texts, or leave it out")
    if len(texts) > len(string.ascii_uppercase):
        raise ValueError(f"choices has {len(texts)} entries; give at most 26, one for each letter")
    return texts, [str(name) for name in names]


def _named(answer: str, choices: Sequence[str], names: Sequence[str]) -> str:
    """The answer as written where it is a choice's text or letter, else the text of the choice that it names."""
    letters, said = string.ascii_uppercase[: len(choices)], answer.strip()
    keys = [index for index, name in enumerate(names) if normalized(name) == normalized(said)]
    index = keys[0] if keys else choice_index(clean(said), choices)
    if not keys and said.lower() in [text.strip().lower() for text in (*choices, *letters)]:
        return answer
    numbered = choice_labels(choices)[0] != "A"  # the prompt numbers them from 1: what a number means is not known
    if not keys and re.fullmatch(r"[0-9]{1,2}(\.0+)?", said) and (numbered or index is None):
        index = int(float(said)) if not numbered and float(said) < len(choices) else None
    if index is None and normalized(said) in YES_NO:
        same = [place for place, text in enumerate(choices) if YES_NO.get(normalized(text)) is YES_NO[normalized(said)]]
        index = same[0] if len(same) == 1 else None
    if index is None:
        fix = "use one, its letter, or its index from 0"
        raise ValueError(f"answer {answer!r:.200} is not among choices {list(choices)!r:.200}; {fix}")
    return answer if said.upper() == letters[index] and choice_index(clean(said), choices) == index else choices[index]
