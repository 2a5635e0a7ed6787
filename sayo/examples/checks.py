"""Turn rows into examples, or say what is wrong with them: from the row alone, then from its pictures."""

import hashlib
import os
import re
import string
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice

from tqdm import tqdm

from sayo.examples.pictures import MAX_PIXELS, DataError, DataFolder, measure_mask, measure_picture
from sayo.examples.regions import boxes_per_image, fit_regions, is_number, polygons_per_image
from sayo.examples.rows import Rows
from sayo.grader.grader import answer_problem

MAX_WORKERS = 8  # threads that decode pictures, each with a whole one in memory
MAX_PIXELS_OF_ROW = 4 * MAX_PIXELS  # area of all pictures in a row; two gigabytes as RGB
READ_AHEAD = 4  # rows per thread that are read ahead
NO_REGION = (
    "boxes is empty or missing, polygons and mask, too; the attention reward needs at least one box, polygon or mask; "
    "--regions attention makes some"
)
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
    images = [row["image"]] if given == ["image"] else row["images"]
    if not isinstance(images, list):
        raise DataError(f"images is {images!r:.200}; write a list of pictures, or call it image")

    question, answer, choices = row.get("question"), row.get("answer"), row.get("choices")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question is {question!r:.200}, keys are: {keys}; write a text that is not empty")
    answer = str(answer) if is_number(answer) else answer
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"answer is {answer!r:.200}, keys are: {keys}; write a text that is not empty, or a number")
    if choices is not None:
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"choices is {choices!r:.200}; write a list of texts, or leave it out")
        letters = string.ascii_uppercase[: len(choices)]
        if len(letters) < len(choices):
            raise DataError(f"choices has {len(choices)} entries; give at most {len(letters)}, one for each letter")
        if answer.strip().lower() not in [choice.strip().lower() for choice in (*choices, *letters)]:
            raise DataError(f"answer {answer!r:.200} is not among choices {choices!r:.200}; use one or its letter")
    if problem := answer_problem(answer, row.get("answer_type"), choices):
        raise DataError(problem)
    for text in (row.get("id", ""), question, answer, *(choices or [])):
        if HALF_CHARACTER.search(text):
            raise DataError(f"text {text!r:.200} holds half of a character; write the whole one, in UTF-8")

    polygons = polygons_per_image(row.pop("polygons", None), len(images))
    masks = _masks_per_image(row.pop("mask", None), row.pop("masks", None), len(images))
    example = row | {"images": [_resolve("picture", image, folder) for image in images]}
    example |= {"question": question, "answer": answer, "boxes": boxes_per_image(row.get("boxes"), len(images))}
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
    return folder.resolve(kind, image) if isinstance(image, str) and image else image


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


def check_rows(rows: Rows, box_format: str, limit: int | None, require_boxes: bool) -> tuple[array, list[str]]:
    """The indices of the first `limit` good rows, and a message for each bad row before the last of them.

    Threads decode the pictures of later rows ahead; a problem there counts when its row is reached.
    """
    chosen, skipped, rows_of_ids = array("q"), [], {}
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
                _check_regions(example, map(measures.size, keys), box_format)
            except DataError as error:
                skipped.append(f"{label}: {error}")
            else:
                rows_of_ids[example["id"]] = row
                chosen.append(row)
            if len(chosen) == limit:
                break
    return chosen, skipped


def _read_ahead(rows: Rows, measures: _Measures) -> Iterator[tuple[int, str, dict | DataError, list[tuple]]]:
    """(index, label, example or error, keys) of every row, with the pictures of the next rows being decoded."""
    waiting = deque()
    for row in tqdm(range(len(rows)), desc=f"checking {rows.name}", disable=len(rows) <= 200):
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


def _check_regions(example: dict, measured: Iterator[tuple[int, int]], box_format: str) -> None:
    """Raises DataError for pictures that are too large together, and for regions that do not fit them.

    measured   (width, height) of the pictures, then of the masks; raises DataError at one that cannot be decoded
    """
    sizes = list(islice(measured, len(example["images"])))
    area = sum(width * height for width, height in sizes)
    if area > MAX_PIXELS_OF_ROW:  # all pictures of a row are in memory at once
        fix = f"shrink them to {MAX_PIXELS_OF_ROW} or less, or give fewer"
        raise DataError(f"{len(sizes)} pictures of {area} pixels in all; {fix}")
    fit_regions(example, sizes, box_format)
    for mask, size in zip(example.get("masks", ()), sizes, strict=False):
        if mask and (found := next(measured)) != size:
            (width, height), name = found, mask if isinstance(mask, str) else "in memory"
            both = f"{width} x {height} pixels, its picture {size[0]} x {size[1]}"
            fix = "give it the size of the original picture as a viewer shows it"
            raise DataError(f"mask {name!r:.200} has {both}; {fix}")
