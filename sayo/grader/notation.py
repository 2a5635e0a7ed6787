r"""One spelling for what has several: wrappers, LaTeX and Unicode, numbers and units. Every answer type compares these.

`clean` leaves LaTeX that has no plain form (\frac{1}{2}, \sqrt{3}, \text{...}) and the case; `normalized` is for text
and numbers; `latex` is what math-verify parses.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

_DOLLAR = "\ue000"  # "\$" while $...$ is taken off
_LOOKS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # fullwidth forms to ASCII
for _marks, _plain in (
    ("‐‑‒–—−", "-"),
    ("‘’‚′", "'"),
    ("“”„″", '"'),
    ("⋅∙", "·"),
    ("￥", "¥"),
    ("￡", "£"),
    ("。", "."),
):
    _LOOKS |= dict.fromkeys(map(ord, _marks), _plain)
_LOOKS |= {ord("℃"): "°C", ord("℉"): "°F", ord("µ"): "μ"}
_GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma phi omega"
_COMMANDS = {
    name: unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}") for name in _GREEK.split()
}
_COMMANDS |= {name.title(): _COMMANDS[name].upper() for name in ("delta", "sigma", "omega")}
_COMMANDS |= {
    "times": "×", "cdot": "·", "div": "÷", "pm": "±", "infty": "∞", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥",
    "neq": "≠", "ne": "≠", "approx": "≈", "cup": "∪", "cap": "∩", "in": "∈", "angle": "∠", "triangle": "△",
    "perp": "⊥", "parallel": "∥", "rightarrow": "→", "to": "→",
}  # fmt: skip
_LATEX_OF = {character: rf"\{name} " for name, character in reversed(_COMMANDS.items())} | {"°": r"^\circ "}
_ARGUMENT = r" ?([0-9]|\{[^{}]*\})"
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉"
_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s?"
_REWRITES = [  # in this order; a backslash behind another one is a line break of LaTeX
    (r"\{,\}(?=[0-9])", ","),
    (r"(?<!\\)\\!|(?<!\\)\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z]) ?", ""),
    (r"(?<!\\)\\[,;: ]|(?<!\\)\\q?quad(?![A-Za-z])|(?<=[0-9}])~(?=[\\A-Za-z])|(?<=\{)~", " "),
    (r"(?<!\\)\\([%#&_])", r"\1"),
    (r" ?\^ ?\{? ?\\circ ?\}?|(?<!\\)\\degree(?![A-Za-z])", "°"),
    (r"° (?=[CF](?![A-Za-z]))", "°"),
    (r"(?<!\\)\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (rf"\\frac{_ARGUMENT}{_ARGUMENT}", lambda found: rf"\frac{{{found[1].strip('{}')}}}{{{found[2].strip('{}')}}}"),
    (r"\\sqrt ?([0-9])|√ ?(?:([0-9]+(?:\.[0-9]+)?|[A-Za-z])|\(([^()]*)\))",
     lambda found: rf"\sqrt{{{next(part for part in found.groups() if part is not None)}}}"),
    (r"(?<=[0-9]) ?([¼½¾⅐-⅞])", r" \1"),
    (r"[¼½¾⅐-⅞]", lambda found: unicodedata.normalize("NFKC", found[0]).replace("⁄", "/")),
    (rf"[{_RAISED}]+", lambda found: f"^{{{unicodedata.normalize('NFKC', found[0]).replace('−', '-')}}}"),
    (rf"[{_LOWERED}]+", lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}"),
    (r"([\^_]) ?\{(.)\}", r"\1\2"),
    (rf"(?<!\\)\\({'|'.join(_COMMANDS)})(?![A-Za-z]) ?", lambda found: _COMMANDS[found[1]]),
]  # fmt: skip
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]
_WRAPPED = re.compile(
    rf"\\boxed\s?\{{(?P<boxed>.*)\}}|{_TEXT_COMMAND}\{{(?P<text>[^{{}}]*)\}}|\*\*(?P<bold>[^*]+)\*\*|"
    r"\*(?P<italic>[^*]+)\*|\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$]+)\$|\\\((?P<round>.*)\\\)|\\\[(?P<square>.*)\\\]"
)
_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)\*\*(?![\w*])")
_QUOTED = re.compile(r"(\"|'|`+)(.*)\1", re.DOTALL)
_INTRODUCED = re.compile(
    r"(?:(?:the|my|final|correct|right|best) ){0,3}(?:answer(?: is:?|:)|"
    r"(?:answer|option|choice)(?: is)?:?(?= ?[(\[]?(?:[a-z]|[0-9]{1,2})(?:[)\].:]*$|[)\].:](?![0-9])| [-:] ))) ?|"
    r"(?:正确|最终)?答案(?:是|为)?:? ?|选项? ?(?=[a-z][).]?$)",
    re.IGNORECASE,
)


def _balanced(inner: str) -> bool:
    """Whether braces match. Between the outermost braces of "\\boxed{A} or \\boxed{B}" they do not."""
    depths = list(accumulate((character == "{") - (character == "}") for character in inner))
    return not depths or (min(depths) >= 0 and depths[-1] == 0)


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The text without what the comparison ignores, in one spelling, except for case."""
    if not text.isascii():
        text = "".join(part for part in text.translate(_LOOKS) if unicodedata.category(part) != "Cf")
    text = text.replace("\\$", _DOLLAR)
    if not text.isascii() or any(mark in text for mark in "\\^_{"):  # no rewriting for plain words: they are most texts
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    for _ in range(8):  # nested wrappers
        before = text
        text = text.strip().rstrip(".").strip()
        if quoted := _QUOTED.fullmatch(text):  # an unpaired quote is a prime, a foot or an inch
            text = quoted[2].strip()
        wrapped = _WRAPPED.fullmatch(text)
        inner = wrapped and next(part for part in wrapped.groups() if part is not None)
        text = inner if inner and _balanced(inner) and inner.strip() else _BOLD.sub(r"\1", text)
        introduced = _INTRODUCED.match(text)
        if introduced and text[introduced.end() :].strip():
            text = text[introduced.end() :]
        if text == before:
            break
    return text.replace(_DOLLAR, "$")


def normalized(text: str) -> str:
    """clean() in lower case, with the content of \\text{...}."""
    return folded(clean(text))


def folded(text: str) -> str:
    """A clean text in lower case, with the content of \\text{...}."""
    return " ".join(_TEXT.sub(r"\1", text).split()).casefold()


def latex(text: str) -> str:
    """A clean text as LaTeX."""
    return "".join(_LATEX_OF.get(character, character) for character in text)


# --- numbers ------------------------------------------------------------------------------------------------------

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_OF_WORD = {word: str(number) for number, word in enumerate(_ONES)}
for _number, _word in enumerate(_TENS, 2):
    NUMBER_OF_WORD |= {_word: str(10 * _number)}
    NUMBER_OF_WORD |= {f"{_word}{mark}{_ONES[one]}": str(10 * _number + one) for one in range(1, 10) for mark in "- "}
_WORDS = re.compile(rf"\b(?:{'|'.join(sorted(NUMBER_OF_WORD, key=len, reverse=True))})\b(?!-)")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CURRENCIES = "$€£¥₹₩₽"
_DIGITS = (
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?|"
    r"[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_IN_UNIT = r"[^0-9,;:+=()\[\]^\\]"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<currency>[{CURRENCIES}]?)(?P<inner>-?)(?:(?P<whole>[0-9]{{1,20}}) (?=[0-9]+/))?"
    rf"(?P<digits>{_DIGITS})(?:/(?P<divisor>[0-9]{{1,20}})|"
    r"(?:e| ?[x×*·] ?10 ?\^ ?\{?)(?P<exponent>[-+]?[0-9]{1,3})\}?)?"
    rf"(?: (?P<scale>{'|'.join(_SCALES)}))?"
    rf"(?P<unit> ?[^0-9 .,;:/+=()\[\]^_\\-]{_IN_UNIT}{{0,40}}(?:\^[0-9]{_IN_UNIT}{{0,40}})?)?"
)
_FRACTION = re.compile(r"([0-9]?) ?\\frac\{([0-9]+)\}\{([0-9]+)\}")
MEASURES = {  # a unit: its other spellings, in the singular; every plural in -s is known
    "%": "percent|per cent|percentage", "$": "dollar|usd|us dollar", "€": "euro|eur", "£": "pound sterling|gbp",
    "¥": "yen", "₹": "rupee|inr|rs", "₩": "won|krw", "₽": "ruble|rouble|rub", "¢": "cent", "°": "degree",
    "rad": "radian", "°c": "degree celsius|degrees celsius|celsius",
    "°f": "degree fahrenheit|degrees fahrenheit|fahrenheit",
    "mm": "millimeter|millimetre", "cm": "centimeter|centimetre", "m": "meter|metre", "km": "kilometer|kilometre",
    "in": "inch|inche", "ft": "foot|feet", "mile": "", "mg": "", "g": "gram", "kg": "kilogram", "ton": "tonne",
    "lb": "", "ms": "", "s": "sec|second", "min": "minute", "h": "hr|hour", "day": "", "week": "", "month": "",
    "year": "yr", "ml": "", "l": "liter|litre", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "hz": "",
    "mm^2": "", "cm^2": "square centimeter|square cm", "m^2": "square meter|square m", "km^2": "square kilometer",
    "in^2": "square inch|square inche", "ft^2": "square foot|square feet", "cm^3": "cubic centimeter|cubic cm",
    "m^3": "cubic meter", "m/s": "meter per second|meters per second", "m/s^2": "",
    "km/h": "kmh|kph|kilometer per hour|kilometers per hour",
}  # fmt: skip
_UNITS = {name: unit for unit, others in MEASURES.items() for name in (unit, *others.split("|")) if name}
_TEXT = re.compile(rf"{_TEXT_COMMAND}\{{([^{{}}]*)\}}")
_LONG_UNITS = "|".join(
    sorted((re.escape(name) for name in _UNITS if len(name) > 1 and name != "in"), key=len, reverse=True)
)
_WITH_UNIT = re.compile(
    rf"(?P<value>.*[^\s^_\\,;=+*/-])(?:\s*{_TEXT_COMMAND}\{{(?P<text>[^{{}}]*)\}}(?P<power>\^[0-9])?|"
    rf"(?P<degree>°(?: ?[CF])?)|(?<=[0-9}}) ]) ?(?P<name>(?:{_LONG_UNITS})s?))",
    re.DOTALL,
)


def _unit(written: str) -> str:
    written = re.sub(r" ?/ ?", "/", written.strip().rstrip("."))
    return _UNITS.get(written) or _UNITS.get(written.removesuffix("s"), written.removesuffix("s"))


def without_unit(text: str, *, or_letter: bool = False) -> tuple[str, str]:
    """(value, unit) of a clean formula such as "2\\sqrt{3}\\text{ cm}"; the whole and "" where none is at its end.

    or_letter   whether m, g, s, ... behind a blank is a unit, too: it may be a variable
    """
    found = _WITH_UNIT.fullmatch(text)
    if found is None:
        letter = re.fullmatch(r"(.*[0-9})]) ([mgshljwvn])", text, re.DOTALL) if or_letter else None
        return (letter[1], letter[2]) if letter else (text, "")
    written = (found["text"] or "") + (found["power"] or "") or found["degree"] or found["name"] or ""
    return found["value"], _unit(folded(written))


@lru_cache(maxsize=4096)
def quantity(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a normalized text that is a single number, unit "" for none; None for any other text.

    Example: "$1,200.50" is (2401/2, "$"), "1.2 million cars" is (1200000, "car"), "3 or 4" is None.
    """
    text = _WORDS.sub(lambda word: NUMBER_OF_WORD[word[0]], text)
    text = re.sub(r"^(?:minus|negative) (?=[0-9])", "-", re.sub(r"^([-+]?)us ?\$ ?", r"\1$", text))
    text = re.sub(r"^([-+]?)10\^", r"\g<1>1×10^", plain_fractions(text))
    number = _NUMBER.fullmatch(text)
    if number is None or (number["sign"] and number["inner"]) or len(number["digits"]) > 60:
        return None
    value = Fraction(number["digits"].replace(",", "").replace(" ", ""))
    if number["divisor"]:
        if not int(number["divisor"]):
            return None
        value = value / int(number["divisor"]) + int(number["whole"] or 0)
    value *= Fraction(10) ** int(number["exponent"] or 0) * _SCALES.get(number["scale"], 1)
    unit = _unit(number["unit"] or "")
    if number["currency"] and unit not in ("", number["currency"]):
        return None
    return (-value if "-" in (number["sign"], number["inner"]) else value), number["currency"] or unit


def plain_fractions(text: str) -> str:
    """A clean text with 2 1/2 for 2\\frac{1}{2}."""
    return _FRACTION.sub(lambda found: f"{found[1]} {found[2]}/{found[3]}".strip(), text)
