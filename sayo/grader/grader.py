"""The answer check of training and evaluation: is the answer in a completion the example's answer?

The answer is the content of the only <answer> block, compared as a whole: "A or B" names no choice, "reddish" is not
"red". The example determines the comparison:

    choices given        the text of a choice, its letter (or number: choice_labels), or both if they agree
    answer_type text     the default without choices: the same text, or the same number
                yes_no   yes or true, no or false
                number   the same number, with or without a known unit or the example's own; 0.45 is 45%
                relaxed_number  a number within 5 % of the example's, as in ChartQA (arXiv 2203.10244); other answers
                         as text, or as a list if in [brackets]
                math     the same value, by math-verify; beside choices, the value may name a choice
                letter   one letter, for choices that only the picture shows
                list     the same items in any order, each as often

Ignored: case (except in math), whitespace, a final period, quotes around the answer, **bold**, $...$, \\boxed{...},
"The answer is ...", fullwidth forms, typographic minus and quotes, invisible characters. Lookalikes (a Cyrillic A) and
digits of other scripts are different. No answer takes long: one of more than MAX_CHARACTERS is wrong unread, and math
runs under a time limit (math_answers.py).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from sayo.grader import math_answers

MAX_CHARACTERS = 500  # of an answer, or twice the example's longest answer or choice
MAX_MATH_CHARACTERS = 200
RELATIVE_TOLERANCE = Fraction(5, 100)


def answer_block(text: str) -> tuple[int, str] | None:
    """(start, content) of the only <answer> block; None for none, several, or an empty one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    start, end = text.index("<answer>"), text.index("</answer>")
    said = text[start + len("<answer>") : end].strip()
    return (start, said) if said else None


def extract_answer(text: str) -> str | None:
    """The content of the only <answer> block; None for none, several, or an empty one."""
    return (answer_block(text) or (0, None))[1]


_LOOKS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # fullwidth forms to ASCII
for _marks, _plain in (("‐‑‒–—−", "-"), ("‘’‚′", "'"), ("“”„″", '"')):
    _LOOKS |= dict.fromkeys(map(ord, _marks), _plain)
_WRAPPED = re.compile(
    r"\\boxed\s?\{(?P<boxed>.*)\}|\\(?:text|mathrm|mathbf|textbf)\s?\{(?P<text>[^{}]*)\}|\*\*(?P<bold>[^*]+)\*\*|"
    r"\*(?P<italic>[^*]+)\*|\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$]+)\$|\\\((?P<round>.*)\\\)|\\\[(?P<square>.*)\\\]"
)
_QUOTED = re.compile(r"(\"|'|`+)(.*)\1", re.DOTALL)
_INTRODUCED = re.compile(
    r"(?:(?:the|my|final|correct|best) ){0,3}(?:answer(?: is:?|:)|"
    r"(?:option|choice)(?=:? ?[(\[]?(?:[a-z]|[0-9]{1,2})[)\].:]*$):?) ?",
    re.IGNORECASE,
)


def _balanced(inner: str) -> bool:
    """Whether braces match. Between the outermost braces of "\\boxed{A} or \\boxed{B}" they do not."""
    depths = list(accumulate((character == "{") - (character == "}") for character in inner))
    return not depths or (min(depths) >= 0 and depths[-1] == 0)


def clean(text: str) -> str:
    """The text without what the comparison ignores, except for case."""
    text = "".join(character for character in text.translate(_LOOKS) if unicodedata.category(character) != "Cf")
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    for _ in range(8):  # nested wrappers
        before = text
        text = text.strip().rstrip(".").strip()
        if quoted := _QUOTED.fullmatch(text):  # an unpaired quote is a prime, a foot or an inch
            text = quoted[2].strip()
        wrapped = _WRAPPED.fullmatch(text)
        inner = wrapped and next(part for part in wrapped.groups() if part is not None)
        if inner and _balanced(inner) and inner.strip():
            text = inner
        introduced = _INTRODUCED.match(text)
        if introduced and text[introduced.end() :].strip():
            text = text[introduced.end() :]
        if text == before:
            break
    return text


def normalized(text: str) -> str:
    """clean() in lower case."""
    return clean(text).casefold()


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMBER_OF_WORD = {word: str(number) for number, word in enumerate(_WORDS)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_DIGITS = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<currency>[$€£¥]?)(?P<inner>-?)(?P<digits>{_DIGITS})(?:/(?P<divisor>[0-9]{{1,20}})|"
    r"(?:e| ?[x×*] ?10 ?\^ ?\{?)(?P<exponent>[-+]?[0-9]{1,2})\}?)?"
    rf"(?: (?P<scale>{'|'.join(_SCALES)}))?(?P<unit> ?[^0-9 .,;:/+=()\[\]-][^0-9,;:+=()\[\]]{{0,40}})?"
)
_MEASURES = {  # a unit: its other spellings, in the singular; every plural in -s is known
    "%": "percent|per cent|percentage", "$": "dollar|usd|us dollar", "€": "euro|eur", "£": "pound sterling|gbp",
    "¥": "yen", "°": r"degree|^\circ|^{\circ}|\degree", "°c": "degree celsius", "°f": "degree fahrenheit",
    "mm": "millimeter", "cm": "centimeter|centimetre", "m": "meter|metre", "km": "kilometer|kilometre",
    "in": "inch|inche", "ft": "foot|feet", "mile": "", "mg": "", "g": "gram", "kg": "kilogram", "ton": "tonne",
    "lb": "", "ms": "", "s": "sec|second", "min": "minute", "h": "hr|hour", "day": "", "week": "", "month": "",
    "year": "yr", "ml": "", "l": "liter|litre", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "hz": "",
    "mm²": "", "cm²": "cm^2|square centimeter", "m²": "m^2|square meter", "km²": "", "cm³": "cm^3", "m³": "m^3",
    "m/s": "", "km/h": "",
}  # fmt: skip
_UNITS = {name: unit for unit, others in _MEASURES.items() for name in (unit, *others.split("|")) if name}


def _unit(written: str) -> str:
    written = written.strip().rstrip(".")
    return _UNITS.get(written) or _UNITS.get(written.removesuffix("s"), written.removesuffix("s"))


def quantity(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a normalized text that is a single number, unit "" for none; None for any other text.

    Example: "$1,200.50" is (2401/2, "$"), "1.2 million cars" is (1200000, "car"), "3 or 4" is None.
    """
    text = _NUMBER_OF_WORD.get(text, text)
    number = _NUMBER.fullmatch(text)
    if number is None or (number["sign"] and number["inner"]) or len(number["digits"]) > 60:
        return None
    value = Fraction(number["digits"].replace(",", "").replace(" ", ""))
    if number["divisor"]:
        if not int(number["divisor"]):
            return None
        value /= int(number["divisor"])
    value *= Fraction(10) ** int(number["exponent"] or 0) * _SCALES.get(number["scale"], 1)
    unit = _unit(number["unit"] or "")
    if number["currency"] and unit not in ("", number["currency"]):
        return None
    return (-value if "-" in (number["sign"], number["inner"]) else value), number["currency"] or unit


def _same_number(answer: str, gold: str, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether a normalized text is the number `gold`, with no unit, gold's unit, or a known one where gold has none."""
    said, meant = quantity(answer), quantity(gold)
    if said is None or meant is None:
        return False
    (value, unit), (gold_value, gold_unit) = said, meant
    if unit not in ("", gold_unit) and (gold_unit or unit not in _MEASURES):
        return False
    values = [value]
    if (unit == "%") != (gold_unit == "%"):  # 45% is 0.45; a chart in percent may omit the sign
        values.append(value / 100 if unit == "%" else value * 100)
    return any(abs(value - gold_value) <= tolerance * abs(gold_value) for value in values)


def _plain_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a number with no unit but a currency or percent sign."""
    found = quantity(text)
    return found if found and found[1] in ("", "%", "$", "€", "£", "¥") and "/" not in text else None


def _same_plain(first: tuple[Fraction, str] | None, second: tuple[Fraction, str] | None) -> bool:
    """Whether two plain numbers are the same; one may omit its unit."""
    return None not in (first, second) and first[0] == second[0] and ("" in (first[1], second[1]) or first == second)


def _as_text(text: str) -> str:
    text = _NUMBER_OF_WORD.get(text, text)
    if text[:1] == "(" and text[-1:] == ")" and "(" not in text[1:]:
        text = text[1:-1].strip()
    article = re.match(r"(?:an?|the) (?=.)", text)
    return re.sub(r" ?([,;]) ?", r"\1", text[article.end() :] if article else text)


def _same_text(answer: str, gold: str) -> bool:
    """Whether two normalized texts are the same text or the same number."""
    if answer == gold or _as_text(answer) == _as_text(gold):
        return True
    return _same_plain(_plain_number(answer), _plain_number(gold))


def _items(text: str) -> Counter:
    if text[:1] in "[({" and text[-1:] in "])}":
        text = text[1:-1]
    parts = [normalized(part) for part in re.split(r"[,;]| and ", text) if part.strip()]
    return Counter(number[0] if (number := _plain_number(part)) else part for part in map(_as_text, parts))


_YES_NO = {"yes": True, "true": True, "no": False, "false": False}
_LETTER = re.compile(r"[(\[]?([a-z])[)\].:]?")
_HEDGES = re.compile(
    r"\b(?:or|and|not|either|neither|maybe|but)\b|\\(?:lor|land|vee|wedge|neg|lnot|pm|mp|cup)\b|[±∨∧¬]"
)
_ASSIGNED = re.compile(r"\s*(?:\\?[A-Za-z]{1,10}(?:_\{?\w{1,4}\}?)?(?: ?[A-Z]{1,4})?|[A-Za-z]\([a-z]\))\s*=\s*([^=]+)")
_IN_WORDS = re.compile(r"[A-Za-z]?[a-z]{2,}(?: [A-Za-z]?[a-z]{2,})*")  # "No solution"; the case of symbols matters


def _same_math(answer: str, gold: str) -> bool:
    """Whether two clean texts have the same value; "x = 3" is 3, several values are no answer."""
    if answer == gold or _same_number(answer.casefold(), gold.casefold()):
        return True
    if _IN_WORDS.fullmatch(gold):
        return _same_text(answer.casefold(), gold.casefold())
    quantities = [quantity(side.casefold()) for side in (answer, gold)]
    units = {found[1] for found in quantities if found}
    if (None not in quantities and len(units) == 2 and units <= set(_MEASURES)) or answer.casefold() == gold.casefold():
        return False  # other units, or letters in another case: math-verify ignores both
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


def _same_relaxed(answer: str, gold: str) -> bool:
    if quantity(gold):
        return _same_text(answer, gold) or _same_number(answer, gold, RELATIVE_TOLERANCE)
    return _items(answer) == _items(gold) if gold.startswith("[") else _same_text(answer, gold)


# answer_type: whether two clean texts agree (lower case but for math), whether an example's can be one, what to write
_TYPES = {
    "text": (_same_text, bool, ""),
    "yes_no": (lambda said, gold: _YES_NO.get(said, "") is _YES_NO.get(gold), _YES_NO.__contains__, "write yes or no"),
    "number": (_same_number, quantity, "write one number, or leave answer_type out"),
    "relaxed_number": (_same_relaxed, bool, ""),
    "math": (_same_math, bool, ""),
    "letter": (_same_letter, _LETTER.fullmatch, "write one letter"),
    "list": (lambda said, gold: _items(said) == _items(gold) != Counter(), bool, ""),
}
ANSWER_TYPES = tuple(_TYPES)
_LABELED = re.compile(r"[(\[]?([a-z]|[0-9]{1,2})[)\]]?(?: ?[.:)\]-] ?(.*))?", re.DOTALL)
_NAMED_FIRST = re.compile(r"(.+?) ?\(([a-z]|[0-9]{1,2})\)", re.DOTALL)


def choice_labels(choices: Sequence[str]) -> list[str]:
    """Labels of the choices in a prompt: A, B, C, ...; or 1, 2, 3, ... if a choice's text is another's letter.

    Parts of a picture may be labeled, with the choices D, B, A, C: an answer A would be ambiguous.
    """
    letters, texts = list(string.ascii_uppercase[: len(choices)]), [normalized(str(text)).upper() for text in choices]
    numbers = [str(number) for number in range(1, len(choices) + 1)]
    clash = any(text in letters and letters.index(text) != index for index, text in enumerate(texts))
    return numbers if clash and not set(numbers) & set(texts) else letters


def _choice(answer: str, choices: Sequence[str], answer_type: str | None = None) -> int | None:
    """The index of the choice that a clean answer names by text, label or both; None if there is none."""
    texts, said = [clean(str(choice)) for choice in choices], answer.casefold()
    folded = [text.casefold() for text in texts]
    for text, known in ((answer, texts), (said, folded)):
        if text in known:
            return known.index(text)
    number, numbers = _plain_number(said), [_plain_number(text) for text in folded]
    found = [index for index, other in enumerate(numbers) if number is not None and number == other]
    found = found or [index for index, other in enumerate(numbers) if _same_plain(number, other)]
    if found:
        return found[0] if len(found) == 1 else None  # 5 is both $5 and 5%
    label = named = None
    if labeled := _LABELED.fullmatch(said):
        label, named = labeled.groups()
    elif named_first := _NAMED_FIRST.fullmatch(said):
        named, label = named_first.groups()
    # The answer in a dataset may be a letter even where the labels are numbers.
    names = (string.ascii_uppercase[: len(choices)], choice_labels(choices))
    places = {name.casefold(): index for part in names for index, name in enumerate(part)}
    if label in places:
        return places[label] if not named or normalized(named) == folded[places[label]] else None
    if answer_type == "math":
        same = [index for index, text in enumerate(texts) if _same_math(answer, text)]
        return same[0] if len(same) == 1 else None
    return None


def is_correct(text: str, example: dict) -> bool:
    """Whether the answer in `text`, a whole completion, is that of the example; see the top of this file."""
    said, gold, choices = extract_answer(text), str(example["answer"]), example.get("choices")
    longest = max(len(str(known)) for known in (gold, *(choices or [])))
    if said is None or len(said) > max(MAX_CHARACTERS, 2 * longest):
        return False
    answer_type, said, gold = example.get("answer_type"), clean(said), clean(gold)
    if said and choices:
        chosen, right = _choice(said, choices, answer_type), _choice(gold, choices)
        if None in (chosen, right):
            return False
        return chosen == right or clean(str(choices[chosen])) == clean(str(choices[right])) != ""
    if answer_type != "math":
        said, gold = said.casefold(), gold.casefold()
    return said != "" and _TYPES.get(answer_type, _TYPES["text"])[0](said, gold)


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
