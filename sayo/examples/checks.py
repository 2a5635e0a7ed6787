"""Turn rows into examples, or say what is wrong with them: from the row alone, then from its pictures."""

import hashlib
import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import NamedTuple

from tqdm import tqdm

from sayo.examples.pictures import MAX_PIXELS, DataError, DataFolder, measure_mask, measure_picture, picture_in
from sayo.examples.regions import (
    BOX_FORMATS,
    boxes_per_image,
    fit_regions,
    formats_that_fit,
    polygons_per_image,
)
from sayo.examples.rows import Rows
from sayo.grader.gold import read_answer
from sayo.settings import no_bar

MAX_WORKERS = 8  # threads that decode pictures, each with a whole one in memory
MAX_PIXELS_OF_ROW = 4 * MAX_PIXELS  # area of all pictures in a row; two gigabytes as RGB
MIN_VOTES, GOOD_VOTES = 3, 200  # rows with another box format that make it the file's; good rows that must fit it, too
READ_AHEAD = 4  # rows per thread that are read ahead
NO_REGION = (
    "boxes is empty or missing, polygons and mask, too; the attention reward needs at least one box, polygon or mask; "
    "--regions attention makes some"
)
GRADED = ("choices", "answer_type", "other_answers")  # keys that read_answer decides on
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON can spell it, text files and tokenizers cannot


def check_row(row: dict, folder: DataFolder) -> dict:
    """The example in a row: `images` and `masks` undecoded, `boxes` and `polygons` as written, a list per image.

    `polygons` and `masks` are present only when there are any. Raises DataError for the first problem that shows
    without the pictures.
    """
    row = {key: value for key, value in row.items() if value is not None}
    given, keys = [key for key in ("image", "images") if row.get(key)], ", ".join(key for key in row if key != "id")
    if len(given) != 1:
        raise DataError(f"{' and '.join(given) or 'no picture'} given, keys are: {keys}; give either image or images")
    images = row[given[0]]
    if given == ["image"] and not (isinstance(images, list) and len(images) == 1):
        images = [images]
    if not isinstance(images, list):
        raise DataError(f"images is {images!r:.200}; write a list of pictures, or call it image")
    if isinstance(images[0], list) and given == ["image"]:
        raise DataError(f"image is a list of {len(images[0])} pictures; call it images, or write one picture")

    question = row.get("question")
    if isinstance(question, list) and len(question) == 1:  # the only turn of a conversation
        question = question[0]
    if not isinstance(question, str) or not question.strip():
        turn = "; take one of a list by its number, --fields question=conversations.0.value"
        fix = f"write a text that is not empty{turn if isinstance(question, list) else ''}"
        raise DataError(f"question is {question!r:.200}, keys are: {keys}; {fix}")
    try:
        graded = read_answer(row)
    except ValueError as error:
        raise DataError(str(error)) from error
    row = {key: value for key, value in (row | graded).items() if key not in GRADED or key in graded}
    for text in (row.get("id", ""), question, row["answer"], *graded.get("other_answers", ()), *row.get("choices", ())):
        if HALF_CHARACTER.search(text):
            raise DataError(f"text {text!r:.200} holds half of a character; write the whole one, in UTF-8")

    polygons = polygons_per_image(row.pop("polygons", None), len(images))
    masks = _masks_per_image(row.pop("mask", None), row.pop("masks", None), len(images))
    example = row | {"images": [_resolve("picture", image, folder) for image in images]}
    example |= {"question": question, "answer": row["answer"], "boxes": boxes_per_image(row.get("boxes"), len(images))}
    if any(polygons):
        example["polygons"] = polygons
    if any(masks):
        example["masks"] = [_resolve("mask", mask, folder) if mask else None for mask in masks]
    return example


def _resolve(kind: str, image, folder: DataFolder):
    """The picture or mask out of {"bytes", "path"}; a path as it counts from the data's folder."""
    if isinstance(image, dict):
        given, image = image, image.get("bytes") or image.get("path")
        if not image:
            fix = "a run-length code: write it as a picture" if kind == "mask" else "write the path of a file"
            raise DataError(f'{kind} {given!r:.200} is neither a path nor {{"bytes", "path"}}; {fix}')
    if not isinstance(image, str) or not image:
        return image
    return picture_in(image) or folder.resolve(kind, image)


def _masks_per_image(mask, masks, num_images: int) -> list:
    """The mask of each image as written; None or [] for none."""
    if mask and masks:
        raise DataError("mask and masks given; give either mask or masks")
    if mask and num_images > 1:
        raise DataError(f"mask given, but there are {num_images} images; write masks, a list with one or null for each")
    masks = [mask] if mask else masks or [None] * num_images
    if not isinstance(masks, list):
        raise DataError(f"masks is {masks!r:.200}; write a list of masks, or call it mask")
    if len(masks) != num_images:
        raise DataError(f"masks has {len(masks)} entries, but there are {num_images} images; write one for each image")
    return masks


class _Measures:
    """Sizes of pictures and masks; threads decode each distinct one once."""

    def __init__(self):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = min(cores, MAX_WORKERS)
        self._pool = ThreadPoolExecutor(self.num_workers)
        self._found: dict[tuple, Future | tuple[int, int] | str] = {}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, example: dict) -> list[tuple]:
        """Start to measure the pictures, then the masks, that are new; returns the keys of all for `size`."""
        keys, masks = [], [(measure_mask, mask) for mask in example.get("masks", ()) if mask]
        for measure, image in [*((measure_picture, image) for image in example["images"]), *masks]:
            content = image if isinstance(image, bytes) else repr(image).encode()
            keys.append((measure.__name__, hashlib.sha256(content).digest()))
            if keys[-1] not in self._found:
                self._found[keys[-1]] = self._pool.submit(_size_or_problem, measure, image)
        return keys

    def size(self, key: tuple) -> tuple[int, int]:
        """(width, height) in pixels. Raises DataError for a bad picture."""
        found = self._found[key]
        if isinstance(found, Future):
            found = self._found[key] = found.result()
        if isinstance(found, str):
            raise DataError(found)
        return found


def _size_or_problem(measure: Callable, image) -> tuple[int, int] | str:
    try:
        return measure(image)
    except DataError as error:
        return str(error)  # the error itself would keep the picture in memory


class RegionError(DataError):
    """Regions that do not fit their pictures; formats: those in which they would."""

    formats: set[str] = set()


def other_format(box_format: str, bad: list[set[str]], good: list[set[str]], num_rows: int) -> str | None:
    """The format in which a file's boxes are written, when most rows with bad regions agree on it, else None.

    bad, good   the formats that fit the regions of each bad row, and of some good rows, which must agree, too
    """
    votes, (corners, _, unit) = Counter(chain(*bad)), box_format.partition("_")

    def weight(other: str) -> tuple:  # of equal ones the same unit, then pixels, which small numbers can be, too
        return votes[other], other.partition("_")[2] == unit, "_" not in other, other.startswith(corners)

    best = max(BOX_FORMATS, key=weight)
    many = bool(bad) and 2 * votes[best] > len(bad) and (votes[best] >= MIN_VOTES or 2 * votes[best] > num_rows)
    return best if many and sum(best in formats for formats in good) >= 0.9 * len(good) else None


class Checked(NamedTuple):
    """Indices of good rows, a message for each bad one, the format that the boxes seem to have instead, and the
    messages that say so."""

    chosen: array
    skipped: list[str]
    other_format: str | None
    misfits: set[str]


def check_rows(rows: Rows, box_format: str, limit: int | None, require_boxes: bool) -> Checked:
    """The first `limit` good rows, and what is wrong with each bad row before the last of them.

    Threads decode the pictures of later rows ahead; a problem there counts when its row is reached.
    """
    chosen, skipped, rows_of_ids, bad, good = array("q"), [], {}, {}, []
    with closing(_Measures()) as measures:
        for row, label, example, keys in _read_ahead(rows, measures):
            try:
                if isinstance(example, DataError):
                    raise example
                if example["id"] in rows_of_ids:
                    first = f"{rows.label(rows_of_ids[example['id']])} (id {example['id']!r})"
                    raise DataError(f"{first} has the same id; make every id unique, or leave it out")
                if require_boxes and not any(any(example.get(name, ())) for name in ("boxes", "polygons", "masks")):
                    raise DataError(NO_REGION)
                sizes = _check_regions(example, map(measures.size, keys), box_format)
            except DataError as error:
                skipped.append(f"{label}: {error}")
                if isinstance(error, RegionError):
                    bad[skipped[-1]] = error.formats
            else:
                good += [(example, sizes)] if len(good) < GOOD_VOTES and any(example["boxes"]) else []
                rows_of_ids[example["id"]] = row
                chosen.append(row)
            if len(chosen) == limit:
                break
    votes = [formats_that_fit(*pair) for pair in good] if bad else []
    found = other_format(box_format, list(bad.values()), votes, len(chosen) + len(skipped))
    return Checked(chosen, skipped, found, {message for message, formats in bad.items() if found in formats})


def _read_ahead(rows: Rows, measures: _Measures) -> Iterator[tuple[int, str, dict | DataError, list[tuple]]]:
    """(index, label, example or error, keys) of every row, with the pictures of the next rows being decoded."""
    waiting = deque()
    for row in tqdm(range(len(rows)), desc=f"checking {rows.name}", disable=no_bar(len(rows) <= 200)):
        label = rows.label(row)
        try:
            parsed = rows[row]
            if parsed["id"] != label:
                label += f" (id {parsed['id']!r:.100})"
            example = check_row(parsed, rows.folder)
            waiting.append((row, label, example, measures.begin(example)))
        except DataError as error:
            waiting.append((row, label, error, []))
        if len(waiting) > READ_AHEAD * measures.num_workers:
            yield waiting.popleft()
    yield from waiting


def _check_regions(example: dict, measured: Iterator[tuple[int, int]], box_format: str) -> list[tuple[int, int]]:
    """The sizes of the pictures. Raises DataError for pictures that are too large together, and for bad regions.

    measured   (width, height) of the pictures, then of the masks; raises DataError at one that cannot be decoded
    """
    sizes = list(islice(measured, len(example["images"])))
    area = sum(width * height for width, height in sizes)
    if area > MAX_PIXELS_OF_ROW:  # all pictures of a row are in memory at once
        fix = f"shrink them to {MAX_PIXELS_OF_ROW} or less, or give fewer"
        raise DataError(f"{len(sizes)} pictures of {area} pixels in all; {fix}")
    try:
        fit_regions(example, sizes, box_format)
    except DataError as error:
        raised = RegionError(str(error))
        raised.formats = formats_that_fit(example, sizes)
        raise raised from error
    for mask, size in zip(example.get("masks", ()), sizes, strict=False):
        if mask and (found := next(measured)) != size:
            (width, height), name = found, mask if isinstance(mask, str) else "in memory"
            both = f"{width} x {height} pixels, its picture {size[0]} x {size[1]}"
            fix = "give it the size of the original picture as a viewer shows it"
            raise DataError(f"mask {name!r:.200} has {both}; {fix}")
    return sizes
