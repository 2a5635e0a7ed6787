"""The embedded scenes: the same pictures everywhere, exact boxes, answers that the picture really gives."""

import hashlib
import math
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image, ImageChops

from data.scenes import write_scenes
from sayo.examples.load import load_examples
from sayo.examples.scenes.questions import KINDS, NEW_KINDS
from sayo.examples.scenes.scenes import COLORS, DEFAULT_SIZES, HELD_OUT, MAX_TARGET_SHARE, Scenes, load_scenes

SPLITS = tuple(DEFAULT_SIZES)
CELL = 32  # pixels, side of a visual token of Qwen3-VL


@pytest.fixture(scope="module")
def examples() -> dict[str, list[dict]]:
    return {split: Scenes(split, 400)[:] for split in SPLITS}


def every(examples: dict[str, list[dict]]) -> list[dict]:
    return [example for split in SPLITS for example in examples[split]]


def fingerprint(example: dict) -> str:
    fields = repr([(key, example[key]) for key in sorted(example) if key != "image"])
    return hashlib.sha256(example["image"].tobytes() + fields.encode()).hexdigest()[:16]


GOLDEN = [
    ("train", 0, "14a7befbed8f1e99"), ("train", 19_999, "a407a06a52632de3"), ("validation", 7, "d456196ffb97786b"),
    ("heldout", 1234, "a6c2383ebd3f01a0"), ("newtype", 5, "83d0e2c6dcaaa395"),
]  # fmt: skip


@pytest.mark.parametrize(("split", "index", "golden"), GOLDEN)
def test_same_seed_draws_the_same_pictures_on_every_machine(split, index, golden):
    assert fingerprint(Scenes(split, DEFAULT_SIZES[split])[index]) == golden


def test_an_example_depends_on_its_index_and_seed_alone():
    alone = fingerprint(Scenes("train", 20_000)[11])
    assert [fingerprint(example) for example in Scenes("train", 12)][11] == alone
    assert fingerprint(Scenes("train", 12, seed=1)[11]) != alone


def test_no_picture_and_no_id_is_shared_between_splits(examples):
    pictures = [hashlib.sha256(example["image"].tobytes()).digest() for example in every(examples)]
    assert len(set(pictures)) == len(pictures)
    assert len({example["id"] for example in every(examples)}) == len(pictures)


def test_every_picture_shows_what_its_example_says(examples):
    for example in every(examples):
        image, name, things = example["image"], example["id"], example["objects"]
        assert all(side % CELL and 104 <= side <= 211 for side in image.size), name  # never whole visual tokens
        assert example["kind"].startswith("chart") or 3 <= len(things) <= 6, name
        boxes = [thing["box"] for thing in things]
        assert example["boxes"] and all(tuple(box) in boxes for box in example["boxes"]), name
        area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in example["boxes"])
        assert area <= MAX_TARGET_SHARE * image.width * image.height, name
        background = Image.new("RGB", image.size, image.getpixel((0, 0)))
        difference = ImageChops.difference(image, background).convert("L").point(lambda value: 255 * (value > 0))
        for thing in things:
            x1, y1, x2, y2 = thing["box"]
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height, (name, thing)
            # The picture minus its plain background, cut to a little more than the box, has the box as its bounds.
            # Things keep a gap of 4 pixels; only the base line of a chart touches its bars, from below.
            below = 0 if thing["name"] == "bar" else 1
            left, top = max(0, x1 - 1), max(0, y1 - 1)
            bounds = difference.crop((left, top, min(image.width, x2 + 1), min(image.height, y2 + below))).getbbox()
            assert bounds == (x1 - left, y1 - top, x2 - left, y2 - top), (name, thing)
            spot = (x1 + 3, y1 + 3) if thing["name"] == "legend" else ((x1 + x2) // 2, (y1 + y2) // 2)
            pairs = zip(image.getpixel(spot), COLORS[thing["color"]], strict=True)
            assert all(abs(channel - wanted) <= 12 for channel, wanted in pairs), (name, thing)


def _pairs(example: dict) -> set[tuple[str, str]]:
    return {(thing["letter"] or thing["name"], thing["color"]) for thing in example["objects"]}


def test_held_out_pairs_and_new_kinds_are_in_their_own_split_alone(examples):
    for split in SPLITS:
        holds = [bool(_pairs(example) & HELD_OUT) for example in examples[split]]
        assert all(holds) if split == "heldout" else not any(holds), split
        kinds = {example["kind"] for example in examples[split]}
        assert kinds == set(NEW_KINDS if split == "newtype" else KINDS), split
    seen = set().union(*(_pairs(example) for example in examples["train"]))  # in training, with other partners
    assert {name for name, _ in HELD_OUT} <= {name for name, _ in seen}
    assert {color for _, color in HELD_OUT} <= {color for _, color in seen}


def _center(thing: dict, axis: int) -> float:
    return (thing["box"][axis] + thing["box"][axis + 2]) / 2


def _find(objects: list[dict], noun: str) -> dict:
    """The only object that a noun such as "small red circle", "red object" or "star" describes."""
    words = [word for word in noun.split() if word != "object"]
    found = [thing for thing in objects if set(words) <= {thing["name"], thing["color"], thing["size"]}]
    assert len(found) == 1, (noun, found)
    return found[0]


def solve(example: dict) -> str:
    """The answer, worked out from the words of the question and the objects alone."""
    question, things = example["question"].rstrip("?"), example["objects"]
    if match := re.fullmatch(r"What color is series (\w)", question):
        return next(thing["color"] for thing in things if thing["letter"] == match[1])
    bars = {thing["letter"]: thing["box"][3] - thing["box"][1] for thing in things if thing["name"] == "bar"}
    if match := re.fullmatch(r"Which series is the (tallest|shortest)", question):
        return (max if match[1] == "tallest" else min)(bars, key=bars.get)
    if match := re.fullmatch(r"Is (\w) (taller|shorter) than (\w)", question):
        return "yes" if (bars[match[1]] > bars[match[3]]) == (match[2] == "taller") else "no"
    if match := re.fullmatch(r"What (color|shape) is the (left|right|top|bottom)most object", question):
        ends = sorted(things, key=lambda thing: _center(thing, axis=0 if match[2] in ("left", "right") else 1))
        return ends[0 if match[2] in ("left", "top") else -1]["color" if match[1] == "color" else "name"]
    if match := re.fullmatch(r"What shape is the object closest to the (.+)", question):
        thing = _find(things, match[1])
        away = {
            math.hypot(*(_center(other, axis) - _center(thing, axis) for axis in (0, 1))): other for other in things
        }
        return away[sorted(away)[1]]["name"]  # the first is the thing itself
    if match := re.fullmatch(r"What (color|shape) is the (.+)", question):
        return _find(things, match[2])["color" if match[1] == "color" else "name"]
    if match := re.fullmatch(r"Is the (.+) small or large", question):
        return _find(things, match[1])["size"]
    if match := re.fullmatch(r"Is the (.+) (left or right of|above or below) the (.+)", question):
        axis = 0 if match[2].startswith("left") else 1
        before = _center(_find(things, match[1]), axis) < _center(_find(things, match[3]), axis)
        return match[2].split()[0 if before else 2]
    if match := re.fullmatch(r"How many (.+) are there", question):
        word = match[1].removesuffix(" objects")
        names = {word, word.removesuffix("s"), word.removesuffix("es")}
        return str(sum(bool(names & {thing["name"], thing["color"]}) for thing in things))
    if match := re.fullmatch(r"(?:Do|Are) the (.+) and the (.+?)(?: have)? the same (color|size)", question):
        return "yes" if _find(things, match[1])[match[3]] == _find(things, match[2])[match[3]] else "no"
    if match := re.fullmatch(r"Which is larger, the (.+) or the (.+)", question):
        return max(match[1], match[2], key=lambda noun: _find(things, noun)["size"] == "large")
    raise AssertionError(f"no solver for {example['question']!r}")


def test_answers_are_right_and_end_the_reasoning(examples):
    for example in every(examples):
        assert solve(example) == example["answer"], (example["id"], example["question"])
        assert example["reasoning"].endswith(f" <answer>{example['answer']}</answer>"), example["id"]
        assert example["reasoning"].count("<answer>") == 1, example["id"]


def test_no_answer_is_a_good_guess(examples):
    """Per kind of question, the most frequent answer must not be right much more often than by chance."""
    answers = defaultdict(Counter)
    for example in examples["train"] + examples["validation"] + examples["newtype"]:
        kind = "count" if example["kind"] == "count" else example["question"].split(" the ")[0][:12]
        answers[kind][example["answer"]] += 1
    for kind, counts in answers.items():
        if counts.total() >= 40:
            assert max(counts.values()) <= 1.5 * max(0.4, 1 / len(counts)) * counts.total(), (kind, counts)


def test_names_of_splits():
    assert load_scenes("scenes").split == "train"
    assert [load_scenes(f"scenes:{split}").split for split in SPLITS] == list(SPLITS)
    assert {split: len(load_scenes(f"scenes:{split}")) for split in SPLITS} == DEFAULT_SIZES
    for make in (lambda: Scenes("test", 10), lambda: load_scenes("scenes:test")):
        with pytest.raises(ValueError, match="test(?=.*train)(?=.*validation)(?=.*heldout)(?=.*newtype)"):
            make()


def test_indices_behave_like_those_of_a_list():
    scenes = Scenes("train", 5)
    assert [scene["id"] for scene in [scenes[-1], *scenes[1:4:2]]] == [scenes[number]["id"] for number in (4, 1, 3)]
    with pytest.raises(IndexError, match="5"):
        scenes[5]
    with pytest.raises(ValueError, match="-1"):
        Scenes("train", -1)


def test_written_scenes_are_a_data_set_like_any_other(tmp_path):
    write_scenes(Scenes("heldout", 3), tmp_path / "out")
    written = load_examples(str(tmp_path / "out" / "train.jsonl"))
    for example, scene in zip(written, Scenes("heldout", 3), strict=True):
        assert example["image"].tobytes() == scene["image"].tobytes()
        assert all(example[name] == scene[name] for name in ("id", "question", "answer", "boxes", "kind"))
