"""Synthetic pictures with questions, answers and exact boxes, drawn on demand and identical on every machine.

A picture holds either three to six plain shapes or a small bar chart with a legend. Every example is a function of
(seed, split, index) alone, so nothing is stored and nothing is downloaded.

    train, validation   the same distribution, different pictures
    heldout             every picture holds a (shape, color) or (letter, color) pair that no other split ever shows
    newtype             pictures as in train, but a kind of question that no other split asks ("closest to")

    python -m data.check scenes:heldout --sheet sheet.png       # look at some
    python -m data.scenes --out scenes --count 20000            # write them as any other data set
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from data.scene_questions import CHART_KINDS, COLORS, KINDS, NEW_KINDS, SHAPE_KINDS, SHAPES, Question, Thing

LETTERS = ("A", "B", "C", "D")
SIZES = {"small": (15, 20), "large": (30, 38)}  # side in pixels, both ends included
DEFAULT_SIZES = {"train": 20_000, "validation": 2_000, "heldout": 2_000, "newtype": 2_000}
# One held-out color per shape and per letter: each color and each name is still well known from its other pairs.
HELD_OUT = frozenset(
    {("circle", "green"), ("square", "purple"), ("triangle", "blue"), ("star", "red"), ("cross", "yellow")}
    | {("A", "orange"), ("B", "red"), ("C", "blue"), ("D", "green")}
)

SIDES = [side for side in range(104, 212) if side % 32]  # never whole cells of 32 px, the visual token of Qwen3-VL
MAX_TARGET_SHARE = 0.3  # the boxes of a question cover at most this share of its picture
INK = (45, 45, 50)
# 5 x 7 bitmaps, painted twice as large: no font file, so no difference between machines.
GLYPHS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "B": ("####.", "#...#", "#...#", "####.", "#...#", "#...#", "####."),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "D": ("####.", "#...#", "#...#", "#...#", "#...#", "#...#", "####."),
}


# ---------------------------------------------------------------------------------------------------- pictures


def _shape_mask(shape: str, side: int) -> Image.Image:
    """The pixels of one shape as a (side, side) 1-bit mask."""
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
            # Whole pixels: the last bits of cos and sin differ between C libraries.
            points.append(tuple(round(last / 2 + radii[tip % 2] * f(angle)) for f in (math.cos, math.sin)))
        draw.polygon(points, fill=1)
    return mask


def _paint(rng: random.Random, color: str) -> tuple[int, int, int]:
    """A slightly different RGB value of a named color each time."""
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[color])


def _blank(rng: random.Random) -> Image.Image:
    background = tuple(rng.randint(226, 252) for _ in range(3))
    return Image.new("RGB", (rng.choice(SIDES), rng.choice(SIDES)), background)


def _is_free(box: tuple[int, ...], taken: list[tuple[int, ...]], gap: int = 4) -> bool:
    return all(
        box[0] >= other[2] + gap or other[0] >= box[2] + gap or box[1] >= other[3] + gap or other[1] >= box[3] + gap
        for other in taken
    )


def _draw_shapes(rng: random.Random, image: Image.Image, looks: list[tuple[str, str, str]]) -> list[Thing] | None:
    """Paint (shape, color, size) triples at free positions; None when they do not fit."""
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
    """Paint a legend and one bar for each (letter, color); None when the heights come out too alike."""
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
            for x, dot in enumerate(line):
                if dot == "#":
                    corner = (left + 16 + 2 * x, top + 2 * y)
                    draw.rectangle((*corner, corner[0] + 1, corner[1] + 1), fill=INK)
        things.append(Thing("legend", color, "", letter, (left, top, left + 26, top + 14)))

    plot_left = legend_left + legend_width + 8 if legend_on_left else margin
    plot_right = image.width - margin if legend_on_left else legend_left - 8
    baseline = image.height - rng.randint(6, 14)
    heights = [rng.randint(12, baseline - 6) for _ in series]
    gaps = [abs(first - second) for first, second in permutations(heights, 2)]
    if min(gaps) < 9:
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


# ---------------------------------------------------------------------------------------------------- examples


def _fits_split(things: list[Thing], split: str) -> bool:
    return any(thing.pair in HELD_OUT for thing in things) is (split == "heldout")


def _draw(rng: random.Random, split: str, kind: str) -> tuple[Image.Image, list[Thing], Question]:
    """Draw pictures until one fits the split and suits the kind of question."""
    ask = (SHAPE_KINDS | CHART_KINDS | NEW_KINDS)[kind]
    # The question's own choices (which count, yes or no, ...) stay the same from one attempt to the next: drawn anew,
    # they would drift to whatever pictures suit most often, and nearly every count would be 1 or 2.
    plan = rng.random()
    while True:
        image = _blank(rng)
        count = rng.randint(2, 4) if kind in CHART_KINDS else rng.randint(3, 6)
        if kind in CHART_KINDS:
            letters, colors = sorted(rng.sample(LETTERS, count)), rng.sample(list(COLORS), count)
            things = _draw_chart(rng, image, list(zip(letters, colors, strict=True)))
        else:
            # Fewer names and colors than there are, half of the time: groups to count, look-alikes to tell apart.
            shapes, colors = rng.sample(SHAPES, rng.choice((3, 5))), rng.sample(list(COLORS), rng.choice((3, 6)))
            looks = [(rng.choice(shapes), rng.choice(colors), rng.choice(list(SIZES))) for _ in range(count)]
            things = _draw_shapes(rng, image, looks)
        if not things or not _fits_split(things, split):
            continue
        question = ask(random.Random(f"{plan}"), things, image.width, image.height)
        if question is None:
            continue
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (thing.box for thing in question.targets))
        if area <= MAX_TARGET_SHARE * image.width * image.height:
            return image, things, question


class Scenes(Sequence):
    """A lazy sequence of examples; an item is drawn when it is asked for and depends on (seed, split, index) only.

    An example is a dict: `id`; `image` (PIL RGB); `question`; `answer`; `boxes` (list of [x1, y1, x2, y2] in pixels,
    x2 and y2 exclusive, at least one); `kind` of question; `reasoning` and `looking` (full
    completions, answer tags included, for supervised training: half of the former are hasty guesses, the latter all
    look first); `objects` (everything in the picture, as dicts with the fields of `Thing`).

    Raises ValueError for an unknown split or a negative size, IndexError for an index outside the sequence.
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
        """The example at an integer index; a list of examples for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of {self.size} scenes")
        index %= self.size
        # A string seed goes through SHA-512 in Python itself: the same numbers on every machine.
        rng = random.Random(f"scenes/{self.seed}/{self.split}/{index}")
        kind = rng.choice(tuple(NEW_KINDS) if self.split == "newtype" else KINDS)
        image, things, question = _draw(rng, self.split, kind)
        return {
            "id": f"scenes-{self.split}-{self.seed}-{index}",
            "image": image,
            "question": question.text,
            "answer": question.answer,
            "boxes": [list(thing.box) for thing in question.targets],
            "kind": kind,
            "reasoning": question.reasoning,
            "looking": question.looking,
            "objects": [asdict(thing) for thing in things],
        }


def load_scenes(name: str) -> Scenes:
    """The scenes called "scenes" (= "scenes:train"), "scenes:validation", "scenes:heldout" or "scenes:newtype".

    Raises ValueError that names the value and the valid ones for anything else.
    """
    head, _, split = name.partition(":")
    split = "train" if name == "scenes" else split
    if head != "scenes" or split not in DEFAULT_SIZES:
        valid = ", ".join(["scenes", *(f"scenes:{split}" for split in DEFAULT_SIZES)])
        raise ValueError(f"unknown scenes {name!r}; valid ones: {valid}")
    return Scenes(split, DEFAULT_SIZES[split])


def write_scenes(scenes: Sequence, folder: Path) -> None:
    """Write examples as any other data set: folder/train.jsonl, and a PNG for each in folder/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number, example in enumerate(tqdm(scenes, desc="scenes", unit="picture")):
            row = {name: example[name] for name in ("id", "question", "answer", "boxes", "kind")}
            row["image"] = f"images/{number:06d}.png"
            example["image"].save(folder / row["image"], compress_level=1)
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write scenes to a folder as any other data set: train.jsonl, images/."
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", default="train", choices=tuple(DEFAULT_SIZES), help="default: train")
    parser.add_argument("--count", type=int, default=1000, help="number of examples (default: 1000)")
    arguments = parser.parse_args()
    write_scenes(Scenes(arguments.split, arguments.count), Path(arguments.out))
    print(f"{arguments.count} examples of scenes:{arguments.split} -> {Path(arguments.out) / 'train.jsonl'}")


if __name__ == "__main__":
    main()
