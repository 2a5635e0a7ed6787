"""The answer check of training and evaluation: is the answer in a completion the example's answer?

The answer is the content of the only <answer> block behind the last </think>, compared as a whole: "A or B" names no
choice, "reddish" is not "red". The example determines the comparison:

    choices given        the text of a choice, its letter (or number: choice_labels), or both if they agree
    answer_type text     the default without choices: the same text, or the same number; math too if the answer is LaTeX
                yes_no   yes or true, no or false
                number   the same number, with or without a known unit or the example's own; 0.45 is 45%
                relaxed_number  a number within 5 % of the example's, as in ChartQA (arXiv 2203.10244); other answers
                         as text, or as a list if in [brackets]
                math     the same value, by math-verify; beside choices, the value may name a choice
                letter   one letter, for choices that only the picture shows
                list     the same items in any order, each as often; one a line, too

An example with `other_answers` is right by any of its answers. Ignored (notation.py): case (except in math),
whitespace, a final period, quotes around the answer, **bold**, $...$, \\boxed{...}, "The answer is ...", fullwidth
forms, typographic minus and quotes, invisible characters, and whether a sign is LaTeX or Unicode. Lookalikes (a
Cyrillic A) and digits of other scripts are different. No answer takes long: one of more than MAX_CHARACTERS is wrong
unread, and math runs under a time limit (math_answers.py).
"""

import re
import string
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, product

from sayo.grader import math_answers
from sayo.grader.notation import (
    CURRENCIES,
    MEASURES,
    NUMBER_OF_WORD,
    clean,
    folded,
    latex,
    normalized,
    plain_fractions,
    quantity,
    without_unit,
)

MAX_CHARACTERS = 500  # of an answer, or twice the example's longest answer or choice
MAX_MATH_CHARACTERS = 200
MAX_WRAPPERS = 20  # looked at in one text
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # that are looked for in a completion
RELATIVE_TOLERANCE = Fraction(5, 100)


def answer_block(text: str) -> tuple[int, str] | None:
    """(start, content) of the only <answer> block behind the last </think>; None for none, several, or an empty one."""
    begin = text.rfind("</think>") + 1
    if text.count("<answer>", begin) != 1 or text.count("</answer>", begin) != 1:
        return None
    start, end = text.index("<answer>", begin), text.index("</answer>", begin)
    said = text[start + len("<answer>") : end].strip()
    return (start, said) if said else None


def extract_answer(text: str) -> str | None:
    """The content of the only <answer> block behind the last </think>; None for none, several, or an empty one."""
    return (answer_block(text) or (0, None))[1]


_FINAL = re.compile(
    r"(?:^|\n|[.!?,;:] )[*# ]{0,6}(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is:?|:)"
    r"[* ]{0,4}([^\n]{1,100})\s{0,9}$",
    re.IGNORECASE,
)


def unwrapped(gold: str) -> str:
    """The right answer in what a data set has for it: an answer block, what is behind the last ####, the content of the
    last \\boxed{...}, or of a last sentence "The answer is ...". A completion is not unwrapped: it has its block."""
    if found := re.search(r"(?:<\|\w{1,40}\|>|</s>)\s{0,9}$", gold):
        gold = gold[: found.start()].strip() or gold
    if "</think>" in gold or "<answer>" in gold:
        gold = extract_answer(gold) or gold.rpartition("</think>")[2].strip() or gold
    if "####" in gold:
        gold = gold.rpartition("####")[2].strip() or gold
    for found in list(re.finditer(r"\\(?:boxed|fbox)\s?\{", gold))[: -MAX_WRAPPERS - 1 : -1]:
        depths = accumulate((character == "{") - (character == "}") for character in gold[found.end() :])
        length = next((index for index, depth in enumerate(depths) if depth < 0), 0)
        if inner := gold[found.end() : found.end() + length].strip():
            return inner
    return found[1].strip() if (found := _FINAL.search(gold)) else gold


def _same_number(answer: str, gold: str, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether a normalized text is the number `gold`, with no unit, gold's unit, or a known one where gold has none."""
    said, meant = quantity(answer), quantity(gold)
    if said is None or meant is None:
        return False
    (value, unit), (gold_value, gold_unit) = said, meant
    if unit not in ("", gold_unit) and (gold_unit or unit not in MEASURES):
        return False
    values = [value]
    if (unit == "%") != (gold_unit == "%"):  # 45% is 0.45; a chart in percent may omit the sign
        values.append(value / 100 if unit == "%" else value * 100)
    return any(abs(value - gold_value) <= tolerance * abs(gold_value) for value in values)


def _plain_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a number with no unit but a currency or percent sign."""
    found = quantity(text)
    return found if found and found[1] in ("", "%", *CURRENCIES) and "/" not in text else None


def _same_plain(first: tuple[Fraction, str] | None, second: tuple[Fraction, str] | None) -> bool:
    """Whether two plain numbers are the same; one may omit its unit."""
    return None not in (first, second) and first[0] == second[0] and ("" in (first[1], second[1]) or first == second)


def _as_text(text: str) -> str:
    text = NUMBER_OF_WORD.get(text, plain_fractions(text))
    if text[:1] == "(" and text[-1:] == ")" and "(" not in text[1:]:
        text = text[1:-1].strip()
    article = re.match(r"(?:an?|the) (?=.)", text)
    return re.sub(r" ?([,;]) ?", r"\1", text[article.end() :] if article else text)


def _same_text(answer: str, gold: str) -> bool:
    """Whether two normalized texts are the same text, number or measured quantity."""
    if answer == gold or _as_text(answer) == _as_text(gold):
        return True
    said = quantity(answer)
    if said and said[1] in MEASURES and said[1] not in string.ascii_lowercase and said == quantity(gold):
        return True  # 1.2M in lower case could be 1.2 m
    return _same_plain(_plain_number(answer), _plain_number(gold))


_SEPARATORS = r";|、| and | & |"
_SEPARATED = (re.compile(_SEPARATORS + ","), re.compile(_SEPARATORS + r",(?![0-9]{3}(?![0-9]))"))  # 1,000 is one or two


def _items(text: str, separator: re.Pattern) -> list[str]:
    if text[:1] in "[({" and text[-1:] in "])}":
        text = text[1:-1]
    return [_as_text(normalized(part)) for part in separator.split(text) if part.strip()]


def _same_items(answer: str, gold: str) -> bool:
    """Whether two texts list the same items, by one reading of the commas in each."""
    readings = ([_items(text, separator) for separator in _SEPARATED] for text in (answer, gold))
    return any(_are_paired(said, meant) for said, meant in product(*readings))


def _are_paired(said: list[str], meant: list[str]) -> bool:
    """Whether every item is the same text or number as one of the other list, each used once."""
    if not said or len(said) != len(meant):
        return False
    left = list(meant)
    for item in [item for item in said if item not in left or left.remove(item)]:  # equal ones first: 5 may be $5
        same = next((other for other in left if _same_text(item, other)), None)
        if same is None:
            return False
        left.remove(same)
    return True


def _in_a_line(text: str) -> str:
    """A list of one item a line as "a, b"; bullets or numbers go if all lines have one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bullets = [re.match(r"(?:[-*•]|[0-9]{1,2}[.)])\s+(?=\S)", line) for line in lines]
    if len(lines) > 1 and all(bullets):
        lines = [line[mark.end() :] for line, mark in zip(lines, bullets, strict=True)]
    return ", ".join(lines)


YES_NO = {"yes": True, "true": True, "no": False, "false": False}
_LETTER = re.compile(r"[(\[]?([a-z])[)\].:]?")
_HEDGES = re.compile(
    r"\b(?:or|and|not|either|neither|maybe|but)\b|\\(?:lor|land|vee|wedge|neg|lnot|pm|mp|cup)\b|[±∨∧¬]"
)
_ASSIGNED = re.compile(r"\s*(?:\\?[A-Za-z]{1,10}(?:_\{?\w{1,4}\}?)?(?: ?[A-Z]{1,4})?|[A-Za-z]\([a-z]\))\s*=\s*([^=]+)")
_IN_WORDS = re.compile(r"[A-Za-z]?[a-z]{2,}(?: [A-Za-z]?[a-z]{2,})*")  # "No solution"; the case of symbols matters


_BASE = re.compile(r"-?([0-9][0-9A-Fa-f]*)_\{?([0-9]{1,2})\}?")  # 1001_2
_LATEX = re.compile(
    r"\\(?:[dtc]?frac|sqrt|times|cdot|div|pm|pi|infty|theta|alpha|beta|left|right|begin|sum|int|log|ln|sin|cos|tan|"
    r"leq?|geq?|neq?|cup|cap|overline|vec|binom)(?![A-Za-z])|[\^_]\{(?!\\circ)"
)


def is_latex(text: str) -> bool:
    """Whether an answer is a formula in LaTeX, which is compared as mathematics without an answer_type."""
    return bool(_LATEX.search(text))


def _same_value(first: Fraction, second: Fraction, rounded: bool) -> bool:
    """Whether two numbers are equal: if `rounded`, to six places, as math-verify has it, and to three digits."""
    close = rounded and round(first, 6) == round(second, 6) and abs(first - second) * 1000 <= abs(second)
    return first == second or close


def _same_math(answer: str, gold: str) -> bool:
    """Whether two clean texts have the same value; "x = 3" is 3, several values are no answer."""
    if answer == gold or _same_number(folded(answer), folded(gold)):
        return True
    if _IN_WORDS.fullmatch(gold):
        return _same_text(folded(answer), folded(gold))
    said, meant = quantity(folded(answer)), quantity(folded(gold))
    if said and meant and said[1] == meant[1] == "":
        return _same_value(said[0], meant[0], "." in answer + gold)
    units = {said[1], meant[1]} - {""} if said and meant else set()
    if (len(units) == 2 and units & set(MEASURES)) or answer.casefold() == gold.casefold():
        return False  # other units, or letters in another case: math-verify ignores both, and a base
    if any(map(_BASE.fullmatch, (answer, gold))):
        bases = [found and found.groups() for found in map(_BASE.fullmatch, (answer, gold))]
        return bases[0] == bases[1] and answer[0] == gold[0]
    has_unit = any(without_unit(side)[1] for side in (answer, gold))
    (answer, unit), (gold, gold_unit) = (without_unit(side, or_letter=has_unit) for side in (answer, gold))
    if unit and gold_unit and unit != gold_unit:
        return False
    answer, gold = latex(answer), latex(gold)
    if max(len(answer), len(gold)) > MAX_MATH_CHARACTERS or "$" in answer + gold:
        return False
    if set(_HEDGES.findall(answer)) - set(_HEDGES.findall(gold)):
        return False
    if "=" not in gold and (assigned := _ASSIGNED.fullmatch(answer)):
        answer = assigned[1].strip()
    answer, gold = (re.sub(r"\^ ?\{?\\prime\}?", "'", side) for side in (answer, gold))
    if any(answer.count(mark) != gold.count(mark) for mark in "=,;'"):
        return False
    return math_answers.same_value(gold, answer)


def _same_letter(answer: str, gold: str) -> bool:
    letters = [_LETTER.fullmatch(side) for side in (answer, gold)]
    return all(letters) and letters[0][1] == letters[1][1]


_SCALED = re.compile(r"([-+]?[$€£¥₹]?[0-9.,]*[0-9])(K|M|B)")
_SCALE_OF = {"K": "thousand", "M": "million", "B": "billion"}


def _scaled(text: str) -> str:
    """1.2M as "1.2 million"; a blank before the letter would make it a unit."""
    found = _SCALED.fullmatch(text)
    return f"{found[1]} {_SCALE_OF[found[2]]}" if found else text


def _same_relaxed(answer: str, gold: str) -> bool:
    if quantity(gold):
        return _same_text(answer, gold) or _same_number(answer, gold, RELATIVE_TOLERANCE)
    return _same_items(answer, gold) if gold.startswith("[") else _same_text(answer, gold)


# answer_type: whether two clean texts agree (lower case but for math), whether an example's can be one, what to write
_TYPES = {
    "text": (_same_text, bool, ""),
    "yes_no": (lambda said, gold: YES_NO.get(said, "") is YES_NO.get(gold), YES_NO.__contains__, "write yes or no"),
    "number": (_same_number, quantity, "write one number, or leave answer_type out"),
    "relaxed_number": (_same_relaxed, bool, ""),
    "math": (_same_math, bool, ""),
    "letter": (_same_letter, _LETTER.fullmatch, "write one letter"),
    "list": (_same_items, bool, ""),
}
ANSWER_TYPES = tuple(_TYPES)
_LABELED = re.compile(r"[(\[]?([a-z]|[0-9]{1,2})[)\]]?(?:(?: ?[.:)\]-] ?| )(.*))?", re.DOTALL)
_NAMED_FIRST = re.compile(r"(.+?) ?\(([a-z]|[0-9]{1,2})\)", re.DOTALL)


def choice_labels(choices: Sequence[str]) -> list[str]:
    """Labels of the choices in a prompt: A, B, C, ...; or 1, 2, 3, ... if a choice's text is another's letter.

    Parts of a picture may be labeled, with the choices D, B, A, C: an answer A would be ambiguous.
    """
    letters, texts = list(string.ascii_uppercase[: len(choices)]), [normalized(str(text)).upper() for text in choices]
    numbers = [str(number) for number in range(1, len(choices) + 1)]
    clash = any(text in letters and letters.index(text) != index for index, text in enumerate(texts))
    return numbers if clash and not set(numbers) & set(texts) else letters


def choice_index(answer: str, choices: Sequence[str], answer_type: str | None = None) -> int | None:
    """The index of the choice that a clean answer names by text, label or both; None if there is none."""
    texts = [clean(str(choice)) for choice in choices]
    if re.match(r"[-*•] \S", answer) and not any(text.startswith(("-", "*", "•")) for text in texts):
        answer = answer[2:]  # a list of one
    said, lower = folded(answer), [folded(text) for text in texts]
    for text, known in ((answer, texts), (said, lower)):
        if text in known:
            return known.index(text)
    number, spoken, found = _plain_number(said), quantity(said), []
    if number:
        numbers = [_plain_number(text) for text in lower]
        found = [index for index, other in enumerate(numbers) if number == other]
        found = found or [index for index, other in enumerate(numbers) if _same_plain(number, other)]
    elif spoken and spoken[1] in MEASURES:
        found = [index for index, text in enumerate(lower) if quantity(text) == spoken]
        if len(spoken[1]) == 1:  # 1.2M is no meter
            found = [index for index in found if not (answer[-1:].isupper() or texts[index][-1:].isupper())]
    if found:
        return found[0] if len(found) == 1 else None  # 5 is both $5 and 5%
    # The answer in a dataset may be a letter even where the labels are numbers.
    names = (string.ascii_uppercase[: len(choices)], choice_labels(choices))
    places = {name.casefold(): index for part in names for index, name in enumerate(part)}
    labeled, named_first = _LABELED.fullmatch(said), _NAMED_FIRST.fullmatch(said)
    pairs = [(named_first[2], named_first[1])] if named_first else []
    is_marked = labeled and said[labeled.end(1) : labeled.end(1) + 1] != " "
    if labeled and (is_marked or labeled[2] not in places):  # "B A" are two labels
        pairs.append((labeled[1], labeled[2]))
    for label, named in pairs:
        if label in places and (not named or normalized(named) == lower[places[label]]):
            return places[label]
    if is_marked and labeled[1] in places:
        return None  # "B. cat", where B is the dog
    if answer_type == "math" or any(is_latex(str(choice)) for choice in choices):
        math_answers.same_value("1", "1")  # starting the child may take long
        began = time.monotonic()
        for index, text in enumerate(texts):
            found += [index] if _same_math(answer, text) else []
            if time.monotonic() - began > math_answers.SECONDS:  # the time of one comparison for all choices
                return None
    return found[0] if len(found) == 1 else None


def compared_as(example: dict) -> str:
    """How an example's answer is compared: "choices", its answer_type, or what that is where none is given."""
    if example.get("choices"):
        return "choices"
    return example.get("answer_type") or ("math" if is_latex(str(example["answer"])) else "text")


def is_correct(text: str, example: dict) -> bool:
    """Whether the answer in `text`, a whole completion, is that of the example; see the top of this file."""
    said, golds = extract_answer(text), (example["answer"], *(example.get("other_answers") or ()))
    return said is not None and any(_is_answer(said, example | {"answer": unwrapped(str(gold))}) for gold in golds)


def _is_answer(said: str, example: dict) -> bool:
    gold, choices, kind = example["answer"], example.get("choices"), compared_as(example)
    if len(said) > max(MAX_CHARACTERS, 2 * max(len(str(known)) for known in (gold, *(choices or [])))):
        return False
    if kind in ("list", "relaxed_number"):
        said, gold = _in_a_line(said), _in_a_line(gold)
    said, gold = clean(said), clean(gold)
    if not said:
        return False
    if kind == "choices":
        chosen, right = choice_index(said, choices, example.get("answer_type")), choice_index(gold, choices)
        if None in (chosen, right):
            return False
        return chosen == right or clean(str(choices[chosen])) == clean(str(choices[right])) != ""
    same = _TYPES.get(kind, _TYPES["text"])[0]
    if kind == "math":
        as_text = not example.get("answer_type") and _same_text(folded(said), folded(gold))
        return as_text or same(said, gold)
    if kind in ("number", "relaxed_number") and same(folded(_scaled(said)), folded(_scaled(gold))):
        return True
    return same(folded(said), folded(gold))


def answer_problem(answer: str, answer_type, choices: Sequence[str] | None) -> str | None:
    """What is wrong with an example's answer and answer_type, given its choices; None if nothing is."""
    if not clean(answer):
        return f"answer {answer!r:.200} has nothing that could be compared; write words, a number or a formula"
    if answer_type not in (*ANSWER_TYPES, None):
        fix = f"write one of {', '.join(ANSWER_TYPES)}, leave it out, or rename the column"
        return f"answer_type is {answer_type!r:.200}; {fix}"
    if choices and answer_type not in ("math", None):
        return f"answer_type {answer_type!r} given beside choices, which have their own check; omit it, or write math"
    _, is_valid, fix = _TYPES[answer_type or "text"]
    return None if is_valid(normalized(answer)) else f"answer {answer!r:.200} has answer_type {answer_type}; {fix}"
