"""The questions about synthetic scenes (scenes.py): wording, answer, target things and reasoning.

To add a kind of question, write a function like the ones below and list it at the end of the file. It takes a random
generator, the things in a picture and the picture's width and height in pixels, and returns None when the picture does
not suit the question.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (214, 36, 40), "green": (40, 158, 60), "blue": (30, 80, 205), "yellow": (238, 205, 25),
    "purple": (142, 50, 178), "orange": (246, 128, 22),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """A shape, a bar, or a legend entry (a color swatch and its letter) in a picture."""

    name: str  # a shape, "bar" or "legend"
    color: str
    size: str  # "small" or "large"; "" for bars and legend entries
    letter: str  # "" for shapes
    box: tuple[int, int, int, int]  # (x1, y1, x2, y2) in pixels, x2 and y2 exclusive: the tight bounds

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def height(self) -> int:
        return self.box[3] - self.box[1]


@dataclass(frozen=True)
class Question:
    """A question about one picture, its answer, the things it is about, and two completions that answer it.

    `reasoning` is one of three wordings; half of the time it is a hasty guess that names nothing in the picture.
    `looking` is the same completion, with a hasty one replaced by one that looks first.
    """

    text: str
    answer: str
    targets: list[Thing]
    reasoning: str
    looking: str


def region_name(thing: Thing, width: int, height: int) -> str:
    """The ninth of a width x height picture that holds the center of a thing: "top left", "center", "right", ..."""
    x, y = thing.center
    column = ("left", "", "right")[int(3 * x / width)]
    row = ("top", "", "bottom")[int(3 * y / height)]
    return f"{row} {column}".strip() or "center"


def _only(things: list[Thing], **look: str) -> Thing | None:
    """The only thing with these attributes; None when there is none or several."""
    found = [thing for thing in things if all(getattr(thing, key) == value for key, value in look.items())]
    return found[0] if len(found) == 1 else None


def _pair(rng: random.Random, things: list[Thing], *keys: str) -> list[Thing]:
    """Two things, or as many as there are, that these attributes identify uniquely."""
    unique = [thing for thing in things if _only(things, **{key: getattr(thing, key) for key in keys})]
    return rng.sample(unique, min(2, len(unique)))


def _finish(rng: random.Random, text: str, answer: str, targets: list[Thing], usual: str, other: str) -> Question:
    """The question with its completions: half guess in haste, the others look first, in one of two wordings.

    A real policy does both, and an attention reward can only change how often it does which.
    """
    hasty = f"Let me think about the question. I would say {answer}."
    reasoning = rng.choices((hasty, usual, other), (0.5, 0.3, 0.2))[0]
    looking = usual if reasoning == hasty else reasoning
    tagged = f" <answer>{answer}</answer>"
    return Question(text, answer, targets, reasoning + tagged, looking + tagged)


def _ask_attribute(rng: random.Random, things: list[Thing], width: int, height: int, wanted: str) -> Question | None:
    """The color of the thing with a given shape, or the shape of the thing with a given color."""
    thing, with_size = rng.choice(things), rng.random() < 0.4
    look = {"name": thing.name} if wanted == "color" else {"color": thing.color}
    if not _only(things, **look, **({"size": thing.size} if with_size else {})):
        return None
    noun = thing.name if wanted == "color" else f"{thing.color} object"
    noun = f"{thing.size} {noun}" if with_size else noun
    answer, said = (thing.color, thing.color) if wanted == "color" else (thing.name, f"a {thing.name}")
    region = region_name(thing, width, height)
    usual = f"The {noun} is at the {region}. It is {said}."
    other = f"I look at the {region}. The {noun} there is {said}."
    return _finish(rng, f"What {wanted} is the {noun}?", answer, [thing], usual, other)


def _ask_size(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    thing = rng.choice(things)
    if not _only(things, name=thing.name, color=thing.color):
        return None
    noun, region = f"{thing.color} {thing.name}", region_name(thing, width, height)
    usual = f"The {noun} is at the {region}. It looks {thing.size}."
    other = f"I look at the {region}. The {noun} there is {thing.size}."
    return _finish(rng, f"Is the {noun} small or large?", thing.size, [thing], usual, other)


def _ask_position(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    pair = _pair(rng, things, "name", "color")
    if len(pair) < 2:
        return None
    axis = rng.randrange(2)
    apart = pair[0].center[axis] - pair[1].center[axis]
    if abs(apart) < 16:
        return None
    words = ("left", "right") if axis == 0 else ("above", "below")
    nouns = [f"{thing.color} {thing.name}" for thing in pair]
    places = [region_name(thing, width, height) for thing in pair]
    text = f"Is the {nouns[0]} {words[0]} or {words[1]}{' of' if axis == 0 else ''} the {nouns[1]}?"
    usual = f"The {nouns[0]} is at the {places[0]}. The {nouns[1]} is at the {places[1]}."
    other = f"I look at the {places[0]} for the {nouns[0]} and at the {places[1]} for the {nouns[1]}."
    return _finish(rng, text, words[apart > 0], pair, usual, other)


def _ask_lookup(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    word = rng.choice(("leftmost", "rightmost", "topmost", "bottommost"))
    axis = 0 if word in ("leftmost", "rightmost") else 1
    ranked = sorted(things, key=lambda thing: thing.center[axis], reverse=word in ("rightmost", "bottommost"))
    if abs(ranked[0].center[axis] - ranked[1].center[axis]) < 10:
        return None
    thing, wanted = ranked[0], rng.choice(("color", "shape"))
    answer = thing.color if wanted == "color" else thing.name
    region = region_name(thing, width, height)
    usual = f"The {word} object is at the {region}. It is a {thing.size} {thing.color} {thing.name}."
    other = f"I look at the {region}. There is a {thing.size} {thing.color} {thing.name}."
    return _finish(rng, f"What {wanted} is the {word} object?", answer, [thing], usual, other)


def _ask_count(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    by_shape, wanted = rng.random() < 0.5, rng.randint(1, 4)
    counts = Counter(thing.name if by_shape else thing.color for thing in things)
    values = [value for value in (SHAPES if by_shape else COLORS) if counts[value] == wanted]
    if not values:
        return None
    value = rng.choice(values)
    # In reading order, so that a picture always gets the same list.
    ordered = sorted(things, key=lambda thing: (int(3 * thing.center[1] / height), thing.center[0]))
    found = [thing for thing in ordered if value in (thing.name, thing.color)]
    places = [f"the {region_name(thing, width, height)}" for thing in found]
    listed = " and ".join(filter(None, (", ".join(places[:-1]), places[-1])))
    plural = (value + ("es" if value.endswith("s") else "s")) if by_shape else f"{value} objects"
    seen = plural if wanted > 1 else f"a {value}" if by_shape else f"one {value} object"
    usual, other = f"I see {seen} at {listed}.", f"Look at {listed}."
    return _finish(rng, f"How many {plural} are there?", str(wanted), found, usual, other)


def _ask_comparison(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    about, wanted = rng.choice(("size", "larger", "color")), rng.random() < 0.5
    pair = _pair(rng, things, *(("name",) if about == "color" else ("name", "color")))
    if len(pair) < 2:
        return None
    nouns = [thing.name if about == "color" else f"{thing.color} {thing.name}" for thing in pair]
    looks = [thing.color if about == "color" else thing.size for thing in pair]
    places = [region_name(thing, width, height) for thing in pair]
    if (looks[0] == looks[1]) is not (wanted and about != "larger"):
        return None
    text = {
        "color": f"Do the {nouns[0]} and the {nouns[1]} have the same color?",
        "size": f"Are the {nouns[0]} and the {nouns[1]} the same size?",
        "larger": f"Which is larger, the {nouns[0]} or the {nouns[1]}?",
    }[about]
    answer = nouns[looks.index("large")] if about == "larger" else "yes" if wanted else "no"
    usual = f"The {nouns[0]} at the {places[0]} is {looks[0]}. The {nouns[1]} at the {places[1]} is {looks[1]}."
    other = f"I look at the {places[0]}: {looks[0]}. I look at the {places[1]}: {looks[1]}."
    return _finish(rng, text, answer, pair, usual, other)


def _ask_nearest(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    thing = rng.choice(things)
    if not _only(things, name=thing.name, color=thing.color):
        return None
    others = sorted((math.dist(thing.center, other.center), i) for i, other in enumerate(things) if other is not thing)
    if others[0][0] > 0.75 * others[1][0]:
        return None
    nearest = things[others[0][1]]
    noun, region = f"{thing.color} {thing.name}", region_name(thing, width, height)
    usual = f"The {noun} is at the {region}. The object there is a {nearest.name}."
    other = f"I look at the {region}. There is a {nearest.name}."
    text = f"What shape is the object closest to the {noun}?"
    return _finish(rng, text, nearest.name, [thing, nearest], usual, other)


def _series(things: list[Thing], letter: str) -> list[Thing]:
    """The legend entry of a letter, then its bar."""
    return sorted((thing for thing in things if thing.letter == letter), key=lambda thing: thing.name != "legend")


def _ask_chart_extreme(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    word = rng.choice(("tallest", "shortest"))
    bars = sorted((thing for thing in things if thing.name == "bar"), key=lambda bar: bar.height)
    bar = bars[-1 if word == "tallest" else 0]
    usual = f"The {word} bar is {bar.color}. In the legend, {bar.color} is {bar.letter}."
    other = f"I look at the {bar.color} bar. The legend says {bar.letter}."
    return _finish(rng, f"Which series is the {word}?", bar.letter, _series(things, bar.letter), usual, other)


def _ask_chart_comparison(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    first, second = rng.sample([thing for thing in things if thing.name == "bar"], 2)
    taller = max(first, second, key=lambda bar: bar.height)
    word = rng.choice(("taller", "shorter"))
    answer = "yes" if (taller is first) == (word == "taller") else "no"
    text = f"Is {first.letter} {word} than {second.letter}?"
    targets = _series(things, first.letter) + _series(things, second.letter)
    usual = f"{first.letter} is {first.color} and {second.letter} is {second.color}. The {taller.color} bar is taller."
    other = f"In the legend, {first.letter} is {first.color} and {second.letter} is {second.color}."
    return _finish(rng, text, answer, targets, usual, other)


def _ask_chart_color(rng: random.Random, things: list[Thing], width: int, height: int) -> Question | None:
    entry = rng.choice([thing for thing in things if thing.name == "legend"])
    usual = f"In the legend, series {entry.letter} is {entry.color}."
    other = f"I look at the legend. {entry.letter} is {entry.color}."
    text = f"What color is series {entry.letter}?"
    return _finish(rng, text, entry.color, _series(things, entry.letter), usual, other)


SHAPE_KINDS = {wanted: partial(_ask_attribute, wanted=wanted) for wanted in ("color", "shape")}
SHAPE_KINDS |= {"size": _ask_size, "position": _ask_position, "lookup": _ask_lookup, "count": _ask_count}
SHAPE_KINDS["comparison"] = _ask_comparison
CHART_KINDS = {"chart_extreme": _ask_chart_extreme, "chart_comparison": _ask_chart_comparison}
CHART_KINDS["chart_color"] = _ask_chart_color
NEW_KINDS = {"nearest": _ask_nearest}
KINDS = (*SHAPE_KINDS, *CHART_KINDS)
