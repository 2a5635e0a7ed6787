"""Synthetic pictures with questions, answers and exact boxes, drawn on demand and identical on every machine.

A picture shows three to six plain shapes, or a small bar chart with a legend. An example depends on (seed, split,
index) alone, so nothing is stored or downloaded.

    train, validation   the same distribution, different pictures
    heldout             every picture has a (shape, color) or (letter, color) pair that no other split shows
    newtype             pictures as in train, with a kind of question that no other split asks ("closest to")

    python -m data.check scenes:heldout --sheet sheet.png       # look at some
    python -m data.scenes --out scenes --count 20000            # write them as an ordinary dataset
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations

from PIL import Image, ImageDraw

from sayo.examples.pictures import DataError
from sayo.examples.scenes.questions import CHART_KINDS, COLORS, KINDS, NEW_KINDS, SHAPE_KINDS, SHAPES, Question, Thing

LETTERS = ("A", "B", "C", "D")
SIZES = {"small": (15, 20), "large": (30, 38)}  # side in pixels, both ends included
DEFAULT_SIZES = {"train": 20_000, "validation": 2_000, "heldout": 2_000, "newtype": 2_000}
# One held-out color per shape and per letter: training shows each color and each name in its other pairs.
HELD_OUT = frozenset(
    {("circle", "green"), ("square", "purple"), ("triangle", "blue"), ("star", "red"), ("cross", "yellow")}
    | {("A", "orange"), ("B", "red"), ("C", "blue"), ("D", "green")}
)

SIDES = [side for side in range(104, 212) if side % 32]  # no multiple of 32 px, the visual token of Qwen3-VL
MAX_TARGET_SHARE = 0.3  # the boxes of a question cover at most this share of its picture
INK = (45, 45, 50)
# 5 x 7 bitmaps, drawn at twice the size: a font file could differ between machines.
GLYPHS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "B": ("####.", "#...#", "#...#", "####.", "#...#", "#...#", "####."),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "D": ("####.", "#...#", "#...#", "#...#", "#...#", "#...#", "####."),
}


def _shape_mask(shape: str, side: int) -> Image.Image:
    """One shape as a (side, side) 1-bit mask."""
    mask = Image.new("1", (side, side))
    draw, last, third = ImageDraw.Draw(mask), side - 1, side // 3
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=1)
    elif shape == "square":
        draw.rectangle((0, 0, last, last), fill=1)
    elif shape == "triangle":
        draw.polygon([(0, last), (last, last), (last // 2, 0)], fill=1)
    elif shape == "cross":
        draw.rectangle((third, 0, last - third, last), fill=1)
        draw.rectangle((0, third, last, last - third), fill=1)
    else:
        radii, points = (side / 2, side / 4.6), []
        for tip in range(10):
            angle = math.pi * (tip / 5 - 0.5)
            # Rounded to pixels: the last bits of cos and sin differ between C libraries.
            points.append(tuple(round(last / 2 + radii[tip % 2] * f(angle)) for f in (math.cos, math.sin)))
        draw.polygon(points, fill=1)
    return mask


def _paint(rng: random.Random, color: str) -> tuple[int, int, int]:
    """The RGB value of a named color, with some jitter."""
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[color])


def _is_free(box: tuple[int, ...], taken: list[tuple[int, ...]], gap: int = 4) -> bool:
    return all(
        box[0] >= other[2] + gap or other[0] >= box[2] + gap or box[1] >= other[3] + gap or other[1] >= box[3] + gap
        for other in taken
    )


def _draw_shapes(rng: random.Random, image: Image.Image, looks: list[tuple[str, str, str]]) -> list[Thing] | None:
    """Draw (shape, color, size) triples at free positions; None when they do not fit."""
    things = []
    for shape, color, size in looks:
        side = rng.randint(*SIZES[size])
        mask = _shape_mask(shape, side)
        inner = mask.getbbox()
        for _ in range(40):
            left, top = rng.randint(2, image.width - side - 2), rng.randint(2, image.height - side - 2)
            box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
            if _is_free(box, [thing.box for thing in things]):
                break
        else:
            return None
        image.paste(_paint(rng, color), (left, top), mask)
        things.append(Thing(shape, color, size, "", box))
    return things


def _draw_chart(rng: random.Random, image: Image.Image, series: list[tuple[str, str]]) -> list[Thing] | None:
    """Draw a legend and a bar for each (letter, color); None when two heights are too similar."""
    draw, count = ImageDraw.Draw(image), len(series)
    paints = {letter: _paint(rng, color) for letter, color in series}
    legend_width, margin = 28, rng.randint(5, 10)
    legend_on_left = rng.random() < 0.5
    legend_left = margin if legend_on_left else image.width - margin - legend_width
    legend_top = rng.randint(4, image.height - 20 * count - 4)
    things = []
    for row, (letter, color) in enumerate(series):
        left, top = legend_left, legend_top + 20 * row
        draw.rectangle((left, top, left + 11, top + 13), fill=paints[letter])
        for y, line in enumerate(GLYPHS[letter]):
            for x in (left + 16 + 2 * column for column, dot in enumerate(line) if dot == "#"):
                draw.rectangle((x, top + 2 * y, x + 1, top + 2 * y + 1), fill=INK)
        things.append(Thing("legend", color, "", letter, (left, top, left + 26, top + 14)))

    plot_left = legend_left + legend_width + 8 if legend_on_left else margin
    plot_right = image.width - margin if legend_on_left else legend_left - 8
    baseline = image.height - rng.randint(6, 14)
    heights = [rng.randint(12, baseline - 6) for _ in series]
    if min(abs(first - second) for first, second in combinations(heights, 2)) < 9:
        return None
    pitch = (plot_right - plot_left) // count
    bar_width = max(8, min(26, pitch - rng.randint(4, 8)))
    for column, index in enumerate(rng.sample(range(count), count)):
        letter, color = series[index]
        left = plot_left + column * pitch + (pitch - bar_width) // 2
        box = (left, baseline - heights[index], left + bar_width, baseline)
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=paints[letter])
        things.append(Thing("bar", color, "", letter, box))
    draw.line((plot_left, baseline, plot_right, baseline), fill=INK)
    return things


def _draw(rng: random.Random, split: str, kind: str) -> tuple[Image.Image, list[Thing], Question]:
    """Draw pictures until one fits the split and suits the kind of question."""
    ask = (SHAPE_KINDS | CHART_KINDS | NEW_KINDS)[kind]
    # Every attempt makes the same choices for the question (which count, yes or no, ...). Redrawn, they would drift to
    # what most pictures suit, and nearly every count would be 1 or 2.
    plan = rng.random()
    while True:
        background = tuple(rng.randint(226, 252) for _ in range(3))
        image = Image.new("RGB", (rng.choice(SIDES), rng.choice(SIDES)), background)
        count = rng.randint(2, 4) if kind in CHART_KINDS else rng.randint(3, 6)
        if kind in CHART_KINDS:
            letters, colors = sorted(rng.sample(LETTERS, count)), rng.sample(list(COLORS), count)
            things = _draw_chart(rng, image, list(zip(letters, colors, strict=True)))
        else:
            # Half of the time few shapes and colors: groups to count, look-alikes to tell apart.
            shapes, colors = rng.sample(SHAPES, rng.choice((3, 5))), rng.sample(list(COLORS), rng.choice((3, 6)))
            looks = [(rng.choice(shapes), rng.choice(colors), rng.choice(list(SIZES))) for _ in range(count)]
            things = _draw_shapes(rng, image, looks)
        pairs = {(thing.letter or thing.name, thing.color) for thing in things or ()}
        if not things or bool(pairs & HELD_OUT) is not (split == "heldout"):
            continue
        if question := ask(random.Random(f"{plan}"), things, image.width, image.height):
            area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (thing.box for thing in question.targets))
            if area <= MAX_TARGET_SHARE * image.width * image.height:
                return image, things, question


class Scenes(Sequence):
    """A lazy sequence of examples, each drawn when it is indexed.

    Beside the keys of every example (load.py): `kind` of question; `reasoning` and `looking`, whole completions for
    supervised training (half of the former guess in haste, the latter all look first); `objects`, everything in the
    picture as dicts with the fields of `Thing`. Raises ValueError for an unknown split or a negative size.
    """

    def __init__(self, split: str, size: int, seed: int = 0):
        if split not in DEFAULT_SIZES:
            raise ValueError(f"unknown scenes split {split!r}; valid ones: {', '.join(DEFAULT_SIZES)}")
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of {self.size} scenes")
        index %= self.size
        # Python hashes a string seed with SHA-512: the same numbers on every machine.
        rng = random.Random(f"scenes/{self.seed}/{self.split}/{index}")
        kind = rng.choice(tuple(NEW_KINDS) if self.split == "newtype" else KINDS)
        image, things, question = _draw(rng, self.split, kind)
        example = {"id": f"scenes-{self.split}-{self.seed}-{index}", "image": image, "question": question.text}
        example |= {"answer": question.answer, "boxes": [list(thing.box) for thing in question.targets], "kind": kind}
        example |= {"reasoning": question.reasoning, "looking": question.looking}
        return example | {"objects": [asdict(thing) for thing in things]}


def load_scenes(name: str) -> Scenes:
    """The scenes of a split: "scenes" (= "scenes:train"), "scenes:heldout", ... Raises DataError for any other."""
    splits = {"scenes": "train"} | {f"scenes:{split}": split for split in DEFAULT_SIZES}
    if name not in splits:
        raise DataError(f"unknown scenes {name!r}; valid ones: {', '.join(splits)}")
    return Scenes(splits[name], DEFAULT_SIZES[splits[name]])
