"""The answer check as a table, each case with its reason; what has no answer."""

import pytest

from sayo.examples.checks import check_row
from sayo.examples.pictures import DataError, DataFolder
from sayo.grader import grader
from sayo.grader.grader import ANSWER_TYPES, choice_labels, clean, is_correct, quantity
from sayo.model.prompts import question_text

PETS = {"answer": "B", "choices": ["cat", "dog", "a cat and a dog", "neither"]}
NUMBER = {"answer": "3", "answer_type": "number"}
CHART = {"answer": "200", "answer_type": "relaxed_number"}
HALF = {"answer": "\\frac{1}{2}", "answer_type": "math"}
FOUR = {"answer": "4", "answer_type": "math"}
YES = {"answer": "yes", "answer_type": "yes_no"}
LETTER = {"answer": "B", "answer_type": "letter"}
LIST = {"answer": "[red, blue]", "answer_type": "list"}
POINTS = {"answer": "P'", "choices": ["P'", "P", "Q"]}
PARTS = {"answer": "A", "choices": ["B", "A", "2"]}
DIGITS = {"answer": "B", "choices": ["1", "10", "100"]}
ANGLES = {"answer": "A", "choices": ["$45^\\circ$", "$60^\\circ$"]}
SPEEDS = {"answer": "3 \\times 10^8 m/s", "choices": ["3 \\times 10^8 m/s", "3 \\times 10^6 m/s", "3 \\times 10^8 m"]}
HALVES = {"answer": "A", "choices": ["\\frac{1}{2}", "\\frac{1}{3}"]}
SIGNS = {"answer": "B", "choices": ["-x", "x"]}
COLORS = {"answer": "red", "other_answers": ["crimson", "dark red"]}
MATH_CHOICES = {"answer": "C", "choices": ["$\\frac{1}{3}$", "$2$", "$\\frac{1}{2}$"], "answer_type": "math"}


def cases(example: dict, expected: bool, reason: str, *answers: str) -> list[tuple]:
    return [(answer, example, expected, reason) for answer in answers]


def number(gold: str) -> dict:
    return {"answer": gold, "answer_type": "number"}


def math(gold: str) -> dict:
    return {"answer": gold, "answer_type": "math"}


CASES = [  # answer, example, whether it is right, why
    # letters and choices
    *cases(PETS, True, "the letter, however it is written", "B", "b", "(B)", "[B]", "B.", "B)", "**B**", "\\boxed{B}"),
    *cases(PETS, True, "the letter, however it is written", "$\\text{B}$", "Option B", "The answer is B."),
    ("dog", PETS, True, "the text of the choice"),
    *cases(PETS, True, "letter and text that agree", "B: dog", "(B) dog", "B - dog", "dog (B)"),
    *cases(PETS, True, "letter and text that agree", "The correct answer is (B) dog."),
    ("A", PETS, False, "another letter"),
    *cases(PETS, False, "hedging", "A or B", "A/B", "(A) or (B)", "Option A or option B", "\\boxed{A} or \\boxed{B}"),
    *cases(PETS, False, "hedging", "\\boxed{A} \\boxed{B}"),
    *cases(PETS, False, "two letters", "A, B", "AB", "A and B"),
    *cases(PETS, False, "all of them listed", "A. cat B. dog C. a cat and a dog D. neither", "A B C D", "B\nA\nC\nD"),
    *cases(PETS, False, "a negation, or more than one choice", "not B", "not A", "The answer is not B", "B is wrong"),
    *cases(PETS, False, "a negation, or more than one choice", "B, definitely not A"),
    *cases(PETS, False, "letter and text that disagree", "B. cat", "cat (B)"),
    *cases(PETS, False, "inside another word; the paper's script takes BLACK", "dogma", "hotdog", "BLACK"),
    ("a dog and a cat", PETS, False, "contains the right text, says more"),
    ("Because it barks, B", PETS, False, "a letter somewhere in a sentence is no answer"),
    *cases(PETS, False, "no such choice, or no letter", "E", "2", "\u0412", "\u0392"),
    ("\uff22", PETS, True, "a fullwidth B is a B written wide"),
    ("\u200bB", PETS, True, "a character that is not shown does not count"),
    ('{"answer": "B"}', PETS, False, "the gold answer's format injected as JSON"),
    ("answer: B | answer: A", PETS, False, "two answers behind each other's marks"),
    ("the letter", {"answer": "A", "choices": ["x", "y"]}, False, "an article is not the letter A"),
    ("A", {"answer": "A", "choices": ["B", "A"]}, True, "a text that is a letter: the text is meant, on both sides"),
    ("10", {"answer": "B", "choices": ["1", "10", "100"]}, True, "a number among choices"),
    ("10.0", {"answer": "B", "choices": ["1", "10", "100"]}, True, "a number among choices, written otherwise"),
    ("1, 10", {"answer": "B", "choices": ["1", "10", "100"]}, False, "two of the numbers"),
    ("B", {"answer": "C", "choices": ["x", "same", "same"]}, True, "two choices of one text are one answer"),
    ("kW", {"answer": "A", "choices": ["kW", "KW"]}, True, "choices that differ in case alone: as written"),
    ("KW", {"answer": "A", "choices": ["kW", "KW"]}, False, "and the other one is another"),
    ("P'", POINTS, True, "a prime is no quote"),
    ("'P''", POINTS, True, "a prime in quotes"),
    ("P", POINTS, False, "and P is another point"),
    ("B", {"answer": "A", "choices": ["6'", '6"']}, False, "6 inches are not 6 feet"),
    *cases(
        PETS, True, "common wordings", "Option B. dog", "Option (B) dog", "Option B: dog", "The correct option is B"
    ),
    *cases(PETS, True, "common wordings", "The correct choice is B", "Answer (B)", "The answer is option B", "答案：B"),
    *cases(
        PETS, True, "Markdown", "**B.** dog", "**B** dog", "**Answer:** B", "B: **dog**", "- B", "B\n\ndog", "- dog"
    ),
    ("B。", PETS, True, "a Chinese full stop"),
    *cases(PETS, False, "the same wordings for another one", "Option B. cat", "The correct option is A", "**B.** cat"),
    *cases(
        PETS, False, "the same wordings for another one", "B\n\ncat", "- A", "A。", "答案：A", "**A.** dog", "B cat"
    ),
    *cases(
        PETS, False, "hedging in the same wordings", "**A** or **B**", "The correct option is A or B", "- A\n- B", "B A"
    ),
    *cases(
        PETS, False, "a negation, or no label", "The correct option is not B", "Option B dog cat", "The option is yours"
    ),
    *cases(PARTS, True, "a letter that is also a text: the text", "A", "- A", "**A**"),
    *cases(PARTS, False, "the letter of the right text, which is another text", "B", "- B", "2"),
    *cases(DIGITS, True, "a number in LaTeX or words", "$10$", "ten", "\\text{10}"),
    *cases(DIGITS, False, "two of the numbers, without a comma", "1 10", "10 1"),
    *cases(ANGLES, True, "degrees in any spelling", "45°", "45^\\circ", "$45^{\\circ}$", "45 degrees", "A. 45°"),
    *cases(ANGLES, False, "another angle or unit", "60°", "45", "45 rad", "45%", "A. 60°"),
    *cases(
        SPEEDS,
        True,
        "a quantity",
        "3×10⁸ m/s",
        "3e8 m/s",
        "3 \\times 10^{8} \\text{ m/s}",
        "300,000,000 meters per second",
    ),
    *cases(SPEEDS, False, "another quantity", "3×10⁶ m/s", "3×10⁸ m", "3e8 m/s^2", "3e8 km/h"),
    *cases(HALVES, True, "choices in LaTeX are values", "0.5", "½", "\\frac24", "\\dfrac{1}{2}"),
    *cases(HALVES, False, "another value, or two", "0.3", "1/3", "½ or ⅓", "2"),
    *cases(SIGNS, True, "a sign is no bullet", "x", "B"),
    *cases(SIGNS, False, "a sign is no bullet", "-x", "- x", "A"),
    ("5 meters", {"answer": "A", "choices": ["5 m", "6 m"]}, True, "the unit in a word"),
    ("1.2 m", {"answer": "A", "choices": ["1.2M", "6M"]}, False, "a million is no meter"),
    ("45%", {"answer": "A", "choices": ["45\\%", "60\\%"]}, True, "a percent sign in LaTeX"),
    ("60%", {"answer": "A", "choices": ["45\\%", "60\\%"]}, False, "another percentage"),
    # text
    *cases(COLORS, True, "several right answers", "red", "Crimson", "the dark red"),
    *cases(
        COLORS,
        False,
        "two of them, or a part",
        "red, crimson",
        "red or crimson",
        "dark",
        "[red, crimson]",
        "['red', 'crimson']",
    ),
    *cases({"answer": "红色"}, True, "a Chinese full stop", "红色。", "答案是红色"),
    ("蓝色。", {"answer": "红色"}, False, "another color"),
    *cases({"answer": "60°"}, True, "the same quantity", "60 degrees", "60^\\circ", "60\\text{ degrees}"),
    *cases({"answer": "60°"}, False, "another quantity", "60", "60 rad", "60°C", "6°", "60%"),
    *cases({"answer": "3 cm"}, True, "the same quantity", "3cm", "3 centimeters", "3\\,\\mathrm{cm}", "three cm"),
    *cases({"answer": "3 cm"}, False, "another quantity", "3", "3 m", "30 mm", "3 cm²", "3 or 4 cm", "-3 cm"),
    ("1.2 m", {"answer": "1.2M"}, False, "a million is no meter"),
    *cases({"answer": "¾"}, True, "a fraction", "3/4", "\\frac34", "\\frac{3}{4}"),
    *cases({"answer": "¾"}, False, "another fraction, or a date", "6/8", "4/3", "34", "\\frac43", "2¾"),
    *cases({"answer": "x^2"}, True, "a superscript", "x²", "x^{2}"),
    *cases({"answer": "x^2"}, False, "no superscript", "x2", "x_2", "x₂", "x³", "2x"),
    *cases({"answer": "$18.90"}, True, "LaTeX escapes and names of a currency", "\\$18.90", "US$18.90", "$\\$18.90$"),
    *cases({"answer": "$18.90"}, False, "another currency or amount", "A$18.90", "₹18.90", "\\$18.09", "€18.90"),
    *cases({"answer": "45%"}, True, "a percent sign in LaTeX", "45\\%", "$45\\%$"),
    *cases({"answer": "45%"}, False, "another unit", "45°", "45\\text{ cm}", "0.45"),
    *cases({"answer": "1000"}, True, "thousands", "1,000", "1{,}000", "1\\,000", "10^3"),
    *cases({"answer": "1000"}, False, "no thousands", "1.000", "1,00", "0,1000", "10,00", "10^4", "103"),
    *cases({"answer": "\\frac12"}, True, "LaTeX is mathematics", "0.5", "1/2", "½", "\\frac{2}{4}"),
    *cases({"answer": "\\frac12"}, False, "another value", "1/3", "12", "\\frac21", "0.5 or 2", "2"),
    *cases({"answer": "\\sqrt{2}"}, True, "LaTeX is mathematics", "√2", "\\sqrt2", "2^{1/2}", "\\frac{2}{\\sqrt{2}}"),
    *cases({"answer": "\\sqrt{2}"}, False, "another value", "2", "√3", "1.4", "\\pm\\sqrt{2}"),
    ("1/2", {"answer": "\\frac{2}{4}", "answer_type": "text"}, False, "text by its answer_type"),
    ("Top institutions", {"answer": "top institutions"}, True, "case"),
    ("the left subplot", {"answer": "left subplot"}, True, "an article in front"),
    ("“red”", {"answer": "red"}, True, "typographic quotes"),
    ("case,det", {"answer": "case, det"}, True, "blanks around a comma"),
    ("det, case", {"answer": "case, det"}, False, "text keeps its order; a list would be answer_type list"),
    ("(c)", {"answer": "c"}, True, "parentheses around all of it"),
    ("one\u2011at\u2011a\u2011time", {"answer": "one-at-a-time"}, True, "hyphens that do not break"),
    ("red blue", {"answer": "red"}, False, "says more"),
    ("red, blue, green", {"answer": "red"}, False, "lists all colors"),
    ("infrared", {"answer": "red"}, False, "inside another word"),
    ("not red", {"answer": "red"}, False, "a negation"),
    ("12345678902", {"answer": "12345678901"}, False, "long numbers are compared exactly"),
    ("6", {"answer": "6B"}, False, "a name is not a number"),
    ("1/2", {"answer": "2/4"}, False, "as text, a slash may be a date"),
    ("45%", {"answer": "$45"}, False, "another unit"),
    ("€5", {"answer": "$5"}, False, "another currency"),
    ("45 dollars", {"answer": "45%"}, False, "another unit, in a word"),
    ("45", {"answer": "$45"}, True, "the unit left out"),
    ("45 dollars", {"answer": "$45"}, True, "the same unit in a word"),
    ("45 %", {"answer": "45"}, True, "a unit that the answer leaves out"),
    ("6'", {"answer": '6"'}, False, "feet are not inches"),
    ("3.0", {"answer": "3"}, True, "the same number"),
    (".5", {"answer": "0.5"}, True, "no leading zero"),
    # yes and no
    ("Yes.", YES, True, "case and a period"),
    ("true", YES, True, "true says yes"),
    ("no", YES, False, "no"),
    *cases(YES, False, "both", "yes and no", "yes/no", "yes, no"),
    ("not yes", YES, False, "a negation"),
    ("yesterday", YES, False, "inside another word"),
    # numbers
    ("three", NUMBER, True, "a number word"),
    ("3.00", NUMBER, True, "zeros behind the point"),
    ("3 cm", NUMBER, True, "a known unit that the answer leaves out"),
    ("3%", NUMBER, True, "a percent sign that the answer leaves out"),
    ("\uff13", NUMBER, True, "a fullwidth digit"),
    ("\u0663", NUMBER, False, "a digit of another script is not read"),
    ("3²", NUMBER, False, "a superscript is a power, not the digit 3"),
    *cases(NUMBER, False, "more than one number", "3 or 4", "3 four", "1 2 3 4", "2-4", "about 3 to 4"),
    ("33", NUMBER, False, "contains the digit"),
    ("-3", NUMBER, False, "the sign counts"),
    ("\u22123", {"answer": "-3", "answer_type": "number"}, True, "a typographic minus"),
    ("3 wrong", NUMBER, False, "no unit"),
    ("1,200", {"answer": "1200", "answer_type": "number"}, True, "thousands with a comma"),
    ("1 200", {"answer": "1200", "answer_type": "number"}, True, "thousands with a blank"),
    ("1,20", {"answer": "120", "answer_type": "number"}, False, "no thousands"),
    ("$1.2 million", {"answer": "1,200,000", "answer_type": "number"}, True, "currency and a scale"),
    ("0.45", {"answer": "45%", "answer_type": "number"}, True, "the value of a percentage"),
    ("45", {"answer": "45%", "answer_type": "number"}, True, "its sign left out"),
    ("45%", {"answer": "0.45", "answer_type": "number"}, True, "a percentage for a value"),
    ("4.5", {"answer": "45%", "answer_type": "number"}, False, "neither"),
    ("5 m", {"answer": "5 cm", "answer_type": "number"}, False, "another unit"),
    ("5 centimeters", {"answer": "5 cm", "answer_type": "number"}, True, "the unit in a word"),
    ("5", {"answer": "5 apples", "answer_type": "number"}, True, "what is counted left out"),
    ("5 pears", {"answer": "5 apples", "answer_type": "number"}, False, "something else is counted"),
    ("1.5e3", {"answer": "1500", "answer_type": "number"}, True, "scientific"),
    ("1.5 × 10^3", {"answer": "1500", "answer_type": "number"}, True, "scientific, as printed"),
    *cases(NUMBER, False, "no number", "1/0", "inf"),
    ("nan", {"answer": "nan"}, True, "as text, not as a number"),
    *cases(
        number("5"),
        True,
        "numbers as people write them",
        "₹5",
        "￥5",
        "US$5",
        "five",
        "5℃",
        "5 degrees Celsius",
        "5\\%",
    ),
    *cases(number("5"), True, "a unit in LaTeX", "5\\text{ cm}", "5\\,\\mathrm{m}", "5^\\circ", "5 m²"),
    *cases(
        number("5"),
        False,
        "another number",
        "5²",
        "5₂",
        "5^2",
        "- 5",
        "~5",
        "5!",
        "5\\text{ or }6",
        "5\\text{ wrong}",
        "5K",
    ),
    *cases(number("5°C"), True, "degrees", "5℃", "5 degrees Celsius", "5^\\circ\\text{C}", "5° C"),
    *cases(number("5°C"), False, "other degrees", "5°F", "5℉", "5°", "5 degrees", "-5°C", "5 rad"),
    *cases(number("5 cm"), False, "another unit in LaTeX", "5\\text{ m}", "5\\,\\mathrm{mm}", "5 cm²", "5^\\circ"),
    *cases(number("12 cm^2"), True, "a squared unit", "12 cm²", "12\\text{ cm}^2", "12 square centimeters", "12"),
    *cases(number("12 cm^2"), False, "another power", "12 cm", "12 cm³", "12 m²", "122"),
    *cases(number("21"), True, "a number in words", "twenty-one", "twenty one"),
    *cases(
        number("21"),
        False,
        "another number in words",
        "twenty",
        "twenty two",
        "twenty-one or two",
        "one",
        "-twenty-one",
    ),
    *cases(number("-5"), True, "a sign in words", "minus five", "negative 5"),
    *cases(number("100000"), True, "Indian groups", "1,00,000", "100,000"),
    *cases(number("100000"), False, "no groups", "1,00,00", "10,00,000", "1,0,0,000", "0,100,000"),
    *cases(number("1200000"), True, "a letter for the scale", "1.2M", "$1.2M", "1200K", "1.2 million"),
    *cases(number("1200000"), False, "a unit, or another scale", "1.2m", "1.2 m", "1.2 M", "1.2B", "1.2K"),
    *cases(number("1.2B"), True, "a letter for the scale", "1.2 billion", "1200M", "1,200,000,000"),
    *cases(number("0.5"), True, "a fraction", "½", "1/2", "\\frac12", "\\dfrac{1}{2}", "\\frac{2}{4}", "50\\%"),
    *cases(number("0.5"), False, "another fraction", "⅓", "2/1", "\\frac21", "\\frac{1}{0}", "12"),
    *cases(number("2.5"), True, "a mixed number", "2½", "2 1/2", "2\\frac{1}{2}", "5/2"),
    *cases(number("2.5"), False, "another mixed number", "2¼", "21/2", "1", "3 1/2", "2 1 2"),
    *cases(number("300000000"), True, "scientific", "3×10⁸", "3\\times10^8", "3 \\times 10^{8}", "3·10^8", "3e8"),
    *cases(number("300000000"), False, "another exponent", "3×10⁷", "3×108", "3\\times10^{-8}", "3×10⁸×10"),
    *cases(number("10^{-30}"), True, "tiny", "10⁻³⁰", "1e-30", "1\\times 10^{-30}"),
    *cases(number("10^{-30}"), False, "another tiny number", "10^{-20}", "0", "1e-29", "-1e-30"),
    # ChartQA's tolerance
    *cases({"answer": "1200000", "answer_type": "relaxed_number"}, True, "a letter for the scale", "1.2M", "1.25M"),
    *cases(
        {"answer": "1200000", "answer_type": "relaxed_number"}, False, "5 % are not enough", "1.3M", "1.2 m", "1.2K"
    ),
    ("2010\n2012", {"answer": "[2010, 2012]", "answer_type": "relaxed_number"}, True, "a list by line"),
    ("209", CHART, True, "4.5 % off"),
    ("210", CHART, True, "just 5 % off"),
    ("211", CHART, False, "more than 5 % off"),
    ("190", CHART, True, "5 % below"),
    ("189 to 211", CHART, False, "a range around it"),
    ("209", {"answer": "200"}, False, "no tolerance without the answer type"),
    ("209", {"answer": "200", "answer_type": "number"}, False, "nor for number"),
    ("0.01", {"answer": "0", "answer_type": "relaxed_number"}, False, "5 % of zero is zero"),
    ("-200", CHART, False, "the sign counts"),
    ("Blues", {"answer": "Blue", "answer_type": "relaxed_number"}, False, "no tolerance for words"),
    ("blue", {"answer": "Blue", "answer_type": "relaxed_number"}, True, "words as text"),
    ("2010, 2012", {"answer": "[2010, 2012]", "answer_type": "relaxed_number"}, True, "a list in brackets"),
    ("45%", {"answer": "$45", "answer_type": "relaxed_number"}, False, "no tolerance for units"),
    ("45", {"answer": "$45", "answer_type": "relaxed_number"}, True, "the unit left out"),
    # mathematics
    *cases(HALF, True, "another form of the same value", "1/2", "0.5", "\\dfrac{2}{4}", "$\\frac12$"),
    *cases(HALF, True, "another form of the same value", "x = \\frac{1}{2}"),
    ("\\frac{1}{3}", HALF, False, "another value"),
    *cases(HALF, False, "two values; a parser may take the last", "\\frac{1}{2} or \\frac{1}{3}"),
    *cases(HALF, False, "two values; a parser may take the last", "\\frac{1}{2}, \\frac{1}{3}", "\\pm\\frac{1}{2}"),
    *cases(HALF, False, "two values; a parser may take the last", "$1/3$ $1/2$"),
    *cases(FOUR, False, "it holds the value, and says more", "\\{3, 4\\}", "3 = 4", "1 = 2 = 3 = 4", "x < 5"),
    *cases(FOUR, False, "it holds the value, and says more", "not = 4"),
    ("4^\\circ", FOUR, True, "degrees that the answer leaves out"),
    ("4\\text{ cm}", FOUR, True, "a unit in LaTeX"),
    ("2\\sqrt{3}", {"answer": "\\sqrt{12}", "answer_type": "math"}, True, "roots"),
    ("(2,1)", {"answer": "(1,2)", "answer_type": "math"}, False, "a point keeps its order"),
    ("(x+1)^2", {"answer": "x^2+2x+1", "answer_type": "math"}, True, "an expression"),
    ("__import__('os').getcwd()", FOUR, False, "nothing is evaluated"),
    ("a b", {"answer": "b", "answer_type": "math"}, False, "a product, not an article"),
    ("n", {"answer": "N", "answer_type": "math"}, False, "letters have their case"),
    ("f", {"answer": "f'", "answer_type": "math"}, False, "a derivative is another function"),
    ("$f^{\\prime}$", {"answer": "f'", "answer_type": "math"}, True, "a prime in LaTeX"),
    ("12 m", {"answer": "12 cm", "answer_type": "math"}, False, "another unit"),
    ("12", {"answer": "12 cm", "answer_type": "math"}, True, "the unit left out"),
    ("even", {"answer": "Even", "answer_type": "math"}, True, "a word has no case"),
    ("an even number", {"answer": "even number", "answer_type": "math"}, True, "words may have an article"),
    *cases(
        math("2\\text{ m}"), True, "the same unit in other words", "2 m", "2\\,\\mathrm{m}", "2\\text{ meters}", "2"
    ),
    *cases(
        math("2\\text{ m}"),
        False,
        "another unit",
        "2\\text{ cm}",
        "2 cm",
        "2\\text{ m}^2",
        "2°",
        "2\\%",
        "2\\text{ apples}",
    ),
    *cases(math("30^\\circ"), True, "degrees", "30°", "30^{\\circ}", "30 degrees", "30"),
    *cases(
        math("30^\\circ"),
        False,
        "no degrees",
        "30\\text{ rad}",
        "30 rad",
        "\\frac{\\pi}{6}",
        "30\\%",
        "30^\\circ\\text{C}",
    ),
    *cases(math("2\\sqrt{3}\\text{ cm}"), True, "roots with a unit", "2√3 cm", "2\\sqrt3 cm", "√12\\text{ cm}", "2√3"),
    *cases(
        math("2\\sqrt{3}\\text{ cm}"),
        False,
        "another root or unit",
        "2√3 m",
        "2\\sqrt{3}\\text{ m}",
        "√23 cm",
        "2\\sqrt3 cm²",
    ),
    *cases(math("10^{-30}"), True, "tiny", "10⁻³⁰", "1e-30", "\\frac{1}{10^{30}}"),
    *cases(math("10^{-30}"), False, "another tiny value", "10^{-20}", "0", "\\frac{1}{10^{20}}", "1e-31"),
    *cases(math("10^{-30}x"), False, "another tiny factor", "10^{-20}x", "0"),
    *cases(math("0.0000001"), False, "seven places", "0.0000002", "0"),
    *cases(math("\\frac13"), True, "six places", "0.333333", "0.33333333333"),
    *cases(math("\\frac13"), False, "too few places", "0.33", "0.3333"),
    *cases(math("1001_2"), True, "a base", "1001_{2}", "1001₂"),
    *cases(math("1001_2"), False, "another base", "1001", "1001_3", "1011_2", "-1001_2"),
    ("1001_2", math("1001"), False, "a base that the answer has not"),
    *cases(math("\\$18.90"), True, "a currency", "$18.90", "18.90", "\\$18.9"),
    *cases(math("\\$18.90"), False, "another currency or amount", "€18.90", "\\$18.09", "18.90%"),
    *cases(math("1000"), True, "thousands", "1{,}000", "1\\,000", "1,000", "10^3"),
    *cases(math("1000"), False, "no thousands", "1.000", "(1,000,0)", "10,00"),
    *cases(math("(-\\infty, 2]"), True, "infinity", "(-∞,2]", "\\left(-\\infty, 2\\right]"),
    *cases(math("(-\\infty, 2]"), False, "another interval", "(-∞,2)", "(∞,2]", "[2,-∞)"),
    ("\\infty", math("∞"), True, "infinity"),
    ("-∞", math("\\infty"), False, "minus infinity"),
    *cases(math("\\pi r^2"), True, "letters and powers in Unicode", "πr²", "r²·π", "π × r^2"),
    *cases(math("\\pi r^2"), False, "another power or letter", "πr³", "πr2", "2πr", "θr²"),
    *cases(math("x \\le 5"), True, "a relation", "x≤5", "x \\leq 5"),
    *cases(math("x \\le 5"), False, "another relation", "x<5", "x≥5", "x = 5", "5"),
    ("2½", math("\\frac{5}{2}"), True, "a mixed number"),
    ("1", math("2\\frac{1}{2}"), False, "a mixed number is no product"),
    ("5 pears", math("5\\text{ m}"), False, "something else is counted"),
    (
        "\\begin{pmatrix}1\\\\ 2\\end{pmatrix}",
        math("\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        True,
        "a line break of LaTeX",
    ),
    ("C", MATH_CHOICES, True, "beside choices, the letter"),
    ("0.5", MATH_CHOICES, True, "beside choices, the value"),
    ("0.4", MATH_CHOICES, False, "no choice has this value"),
    # a letter alone, and lists
    ("(b)", LETTER, True, "in parentheses"),
    ("B. dog", LETTER, False, "what the choices say is not known: only the letter counts"),
    ("A or B", LETTER, False, "hedging"),
    ("ABCD", LETTER, False, "all of them"),
    ("blue and red", LIST, True, "in any order"),
    *cases(
        LIST, True, "a list by line or with other marks", "red\nblue", "- blue\n- red", "1. red\n2. blue", "red & blue"
    ),
    *cases(
        LIST, False, "a list by line with another item", "red\ngreen", "- red", "red\nblue\ngreen", "1. red\n2. red"
    ),
    *cases({"answer": "1,000, 2,000", "answer_type": "list"}, True, "thousands", "1000, 2000", "2000\n1,000"),
    *cases(
        {"answer": "1,000, 2,000", "answer_type": "list"}, False, "other numbers", "1, 2", "1000, 200", "1000", "3000"
    ),
    *cases({"answer": "5, 6", "answer_type": "list"}, False, "signs are no bullets", "-5\n-6", "5\n-6", "- 5"),
    *cases({"answer": "[$5, 6]", "answer_type": "list"}, True, "units of items", "6, $5", "6 and 5", "5 dollars, 6"),
    *cases({"answer": "[$5, 6]", "answer_type": "list"}, False, "units of items", "6, €5", "5%, 6", "$6, 5%"),
    *cases(LIST, False, "one missing, too many, or twice", "red", "red, blue, green", "red, red, blue"),
]


WHOLE_TEXTS = [
    ("The answer is B. <answer>A</answer>", False, "right in the reasoning alone"),
    ("B", False, "no answer block"),
    ("", False, "nothing"),
    ("<answer></answer>", False, "an empty block"),
    ("<answer> \n </answer>", False, "a blank block"),
    ("<answer>.</answer>", False, "a block of punctuation"),
    ("<answer>\u200b</answer>", False, "a block of what is not shown"),
    ("<answer>B</answer> <answer>A</answer>", False, "several blocks, the first right"),
    ("<answer>A</answer> <answer>B</answer>", False, "several blocks, the last right"),
    ("<answer>B</answer></answer>", False, "closed twice"),
    ("</answer>B<answer>", False, "the wrong way round"),
    ("<answer><answer>B</answer></answer>", False, "nested"),
    ("<answer>B", False, "never closed"),
    ("<answer>A</answer> B</answer>", False, "a second end behind the gold answer"),
    ("\uff1canswer\uff1eB\uff1c/answer\uff1e", False, "fullwidth tags are no tags"),
    ("<think>I end with <answer></answer>.</think> <answer>B</answer>", True, "tags quoted in the thinking"),
    ("<think><answer>B</answer></think> <answer>A</answer>", False, "right in the thinking alone"),
    ("<think>It is <answer>B</answer></think>", False, "no answer behind the thinking"),
    ("</think> <answer>B</answer>", True, "the prompt had begun the thinking"),
    ("<think>a</think> b</think> <answer>B</answer>", True, "behind the last end of thinking"),
    ("<think></think> <answer>A</answer> <answer>B</answer>", False, "several blocks behind the thinking"),
    ("x" * 100_000 + "<answer>B</answer>", True, "long reasoning"),
    ("<answer>" + "B " * 5_000 + "</answer>", False, "a very long answer"),
    ("<answer>B" + " " * 300 + "</answer>", True, "blanks around it are no length"),
]


TEXTS = [(f"I look. <answer>{answer}</answer>", *case) for answer, *case in CASES]
TEXTS += [(text, PETS, expected, reason) for text, expected, reason in WHOLE_TEXTS]


@pytest.mark.parametrize(("text", "example", "expected", "reason"), TEXTS, ids=lambda text: str(text)[:60])
def test_is_correct(text, example, expected, reason):
    assert is_correct(text, example) is expected, reason


def test_every_example_is_valid_and_its_own_answer_right(tmp_path):
    assert len(CASES) + len(WHOLE_TEXTS) >= 80
    assert {example.get("answer_type") for _, example, _, _ in CASES} >= set(ANSWER_TYPES) - {"text"} | {None}
    for _, example, _, reason in CASES:
        gold = example["answer"]
        assert is_correct(f"I look. <answer>{gold}</answer>", example), (gold, reason)
        assert check_row({"image": "a.png", "question": "?"} | example, DataFolder(tmp_path))["answer"] == gold


QUANTITIES = [
    ("1,200.50", (1200.5, "")), ("$45", (45, "$")), ("-$45", (-45, "$")), ("45 usd", (45, "$")), ("3 km", (3, "km")),
    ("3 kilometers", (3, "km")), ("2.5 million people", (2500000, "people")), ("twelve", (12, "")), ("3/4", (0.75, "")),
    *[(text, None) for text in ("1,2", "1,2345", "three or four", "", "-", "--3")],
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), QUANTITIES)
def test_quantity(text, expected):
    assert quantity(text) == expected


def test_clean_takes_wrappers_off_until_none_is_left():
    assert clean(' **The answer is: "$\\boxed{\\text{Two  words}}$".** ') == "Two words"
    assert clean("'5.'") == "5" and clean("...") == "" and clean("$45") == "$45" and clean("```cat```") == "cat"


def test_a_number_names_the_choice_with_its_unit_and_none_where_several_could_be_meant():
    cases = [("5 5%", "5 %", ["5%"]), ("$50 50%", "50 %", ["50%"]), ("$50 60", "50", ["$50"]), ("$50 50%", "50", [])]
    for texts, answer, expected in cases:
        examples = [{"answer": gold, "choices": texts.split()} for gold in texts.split()]
        right = [example["answer"] for example in examples if is_correct(f"<answer>{answer}</answer>", example)]
        assert right == expected
    for answer in ("1,000", "A", "A. 1000"):  # a dictionary of yours may hold numbers
        assert is_correct(f"<answer>{answer}</answer>", {"answer": 1000, "choices": [1000, 4]}), answer


def test_choices_that_are_letters_are_numbered():
    """Of D, B, A, C an answer A was the third, also where a model meant the first by it."""
    example = {"question": "Which part?", "answer": "D", "choices": ["D", "B", "A", "C"]}
    assert question_text(example).splitlines() == ["Which part?", "1. D", "2. B", "3. A", "4. C"]
    for answer, expected in (("D", True), ("1", True), ("(1) D", True), ("D (1)", True), ("A", False), ("3", False)):
        assert is_correct(f"<answer>{answer}</answer>", example) is expected, answer
    for answer in ("C", "3", "none", "3. none"):  # gold may be a letter that is no text
        assert is_correct(f"<answer>{answer}</answer>", {"answer": "C", "choices": ["B", "A", "none"]}), answer
    assert choice_labels(["A", "b", "C"]) == ["A", "B", "C"], "no letter means another one"
    assert choice_labels(["B", "A", "2"]) == ["A", "B", "C"], "numbers would be no better"
    assert choice_labels(["red", "AB", ""]) == ["A", "B", "C"] and choice_labels([]) == []


def test_the_reward_uses_this_very_check():
    import reward

    assert reward.is_correct is grader.is_correct and reward.extract_answer is grader.extract_answer


UNFIT = [  # answer, answer_type, choices, words in the message
    *[(answer, None, None, "nothing that could be compared") for answer in ("...", '""', "\u200b", "$.$")],
    ("1", "numeric", None, "answer_type is 'numeric'; write one of text, yes_no, number"),
    ("1", 3, None, "answer_type is 3; write one of"),
    ("maybe", "yes_no", None, "answer 'maybe' has answer_type yes_no; write yes or no"),
    ("3 or 4", "number", None, "answer '3 or 4' has answer_type number; write one number"),
    ("AB", "letter", None, "answer 'AB' has answer_type letter; write one letter"),
    ("A", "text", ["x", "y"], "given beside choices"),
]


@pytest.mark.parametrize(("answer", "answer_type", "choices", "words"), UNFIT)
def test_an_answer_type_that_does_not_fit_is_named(answer, answer_type, choices, words, tmp_path):
    row = {"image": "a.png", "question": "?", "answer": answer, "answer_type": answer_type, "choices": choices}
    with pytest.raises(DataError, match=words):
        check_row(row, DataFolder(tmp_path))
