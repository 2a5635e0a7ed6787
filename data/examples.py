"""The one form an example has in sayo, and the loader that checks a whole data set before anything long starts.

An example is a dict with these keys; any other key (`kind`, `reasoning`, ...) is passed through, null counts as absent:

    image      a picture, or `images`, a list of them; in a file: a path, or {"bytes", "path"} as `datasets` stores it
    question   text
    answer     text; a number is turned into text. With `choices`: the text of a choice, or its letter A, B, ...
    boxes      the regions that the answer rests on: [[x1, y1, x2, y2], ...] in pixels of the original picture as a
               viewer shows it (EXIF rotation applied), x1 < x2, y1 < y2; for several images one such list for each
    choices    optional list of texts
    id         optional, unique; default "FILE:number", where lines of a .jsonl count from 1, other rows from 0
"""

import hashlib
import io
import json
import math
import re
import string
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import datasets
from PIL import Image, ImageOps
from tqdm import tqdm

from data.scenes import load_scenes

VALID_DATA = (
    "scenes, scenes:validation, scenes:heldout, scenes:newtype, a .jsonl or .parquet file, or a folder or Hub id that "
    "datasets.load_from_disk or datasets.load_dataset reads"
)
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"  # "name" or "owner/name"
MAX_LISTED = 20  # bad rows named in one error message
LONGEST_TO_SHORTEST = 200  # sides of a picture; Qwen's processors refuse more
EDGE_TOLERANCE = 1  # pixels that a box may stick out of its picture through rounding; it is clipped


class DataError(ValueError):
    """Data that cannot be used; the message names the value, what is valid, and the fix."""


# ---------------------------------------------------------------------------------------------------- pictures


def load_picture(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode a picture to RGB, turned as its EXIF orientation says, transparent parts on white.

    `image` is a path (a relative one counts from the working directory), an encoded picture, a PIL picture, or
    {"bytes", "path"}, where the path is used when there are no bytes. 16-bit grayscale is scaled to 8 bits.

    Raises DataError with the path and the reason when there is no such file or Pillow cannot decode all of it.
    """
    content = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    if not content or not isinstance(content, str | Path | bytes | Image.Image):
        raise DataError(f'picture {image!r:.200} is neither a path nor {{"bytes", "path"}}; write the path of a file')
    name = f"{str(content)!r:.200}" if isinstance(content, str | Path) else "in memory"
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        with nullcontext(content) if isinstance(content, Image.Image) else Image.open(source) as opened:
            picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):  # convert() would cut everything above 255 off to white
            picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        elif picture.mode == "F":
            raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
        elif picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return picture.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"picture {name}: there is no such file; correct the path or add the file") from error
    except Exception as error:  # Pillow's decoders raise nearly anything: SyntaxError, struct.error, EOFError, ...
        raise DataError(f"picture {name} cannot be read: {error!s:.200}; replace the file") from error


# -------------------------------------------------------------------------------------------------------- rows


def _parse_row(row) -> dict:
    """The dict of a line of JSON (bytes), of a one-row Arrow table, or of what is a dict already."""
    if not isinstance(row, bytes):
        return row if isinstance(row, dict) else row.to_pylist()[0]
    try:
        parsed = json.loads(row)
    except ValueError as error:
        raise DataError(f"not JSON ({error}): {row[:60]!r}; write one JSON object per line") from error
    if not isinstance(parsed, dict):
        raise DataError(f'not a JSON object: {row[:60]!r}; write {{"image": ..., "question": ..., ...}}')
    return parsed


def _check_row(row: dict, folder: Path) -> dict:
    """The example of one row, pictures still undecoded in `images`, one list of boxes for each in `boxes`.

    Raises DataError for the first thing wrong that shows without the pictures.
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
    answer = str(answer) if _is_number(answer) else answer
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"answer is {answer!r:.200}, keys are: {keys}; write a text that is not empty, or a number")
    if choices is not None:
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"choices is {choices!r:.200}; write a list of texts, or leave it out")
        letters = string.ascii_uppercase[: len(choices)]
        if answer.strip().lower() not in [choice.strip().lower() for choice in (*choices, *letters)]:
            raise DataError(f"answer {answer!r:.200} is not among choices {choices!r:.200}; use one or its letter")

    images = [_resolve(image, folder) for image in images]
    boxes = _boxes_per_image(row.get("boxes"), len(images))
    return row | {"images": images, "question": question, "answer": answer, "boxes": boxes}


def _resolve(image, folder: Path):
    """The picture without {"bytes", "path"} around it, a path made relative to the folder of its data file."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return str(folder / image) if isinstance(image, str) and image else image


def _boxes_per_image(boxes, num_images: int) -> list[list]:
    """One list of boxes for each image; with one image, its list need not be wrapped in another."""
    if not boxes:
        return [[] for _ in range(num_images)]
    if not isinstance(boxes, list):
        raise DataError(f"boxes is {boxes!r:.200}; write a list of boxes, [[x1, y1, x2, y2], ...]")
    nested = all(isinstance(group, list) and all(isinstance(box, list) for box in group) for group in boxes)
    if num_images == 1 and not nested:
        return [boxes]
    if not nested:
        raise DataError(f"boxes is {boxes!r:.200}; with several images, write one list of boxes for each image")
    if len(boxes) != num_images:
        raise DataError(f"boxes has {len(boxes)} lists, but there are {num_images} images; write one for each image")
    return boxes


def _is_number(value) -> bool:
    # Compared with infinity, not math.isfinite: that one fails on very long integers.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _fit_box(box, width: int, height: int) -> list:
    """The box clipped to a width x height picture. Raises DataError unless it is a box within that picture."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
        raise DataError(f"box {box!r:.200} is not four finite numbers; write boxes as [[x1, y1, x2, y2], ...]")
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        raise DataError(f"box {box} has no area; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2, not [x, y, w, h]")
    if 0 <= min(box) and max(box) <= 1:
        raise DataError(f"box {box} looks like fractions; multiply by the picture's {width} x {height} pixels")
    fitted = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
    moved = max(abs(before - after) for before, after in zip(box, fitted, strict=True))
    if moved > EDGE_TOLERANCE or fitted[2] <= fitted[0] or fitted[3] <= fitted[1]:
        raise DataError(
            f"box {box} is outside of its picture of {width} x {height} pixels; write pixels of the original picture "
            "as a viewer shows it, not of a resized copy"
        )
    return fitted


def _fit_boxes(boxes: list[list], sizes: list[tuple[int, int]]) -> list[list]:
    """`_fit_box` for every image, sizes as (width, height) in pixels."""
    return [[_fit_box(box, *size) for box in group] for group, size in zip(boxes, sizes, strict=True)]


# ---------------------------------------------------------------------------------------------------- examples


class Examples(Sequence):
    """A lazy sequence of examples: pictures stay in their files, or encoded, until an example is asked for.

    `examples[i]` is a new dict with the keys listed at the top of this file: `images` is a list of decoded RGB PIL
    pictures; with exactly one, `image` is that picture and `boxes` a flat list, else `boxes` holds a list per image.
    A slice gives a list of such dicts. Raises IndexError for an index outside the sequence.

    name      what it was loaded from
    skipped   one message for each row that was dropped as bad
    """

    def __init__(self, name: str, rows: Sequence, numbers: Sequence[int], folder: Path, limit: int | None = None):
        self.name, self.skipped = name, []
        self._rows, self._numbers, self._folder = rows, numbers, folder
        self._chosen = range(len(rows))[:limit]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.peek(index)
        example["images"] = [load_picture(image) for image in example["images"]]
        example["boxes"] = _fit_boxes(example["boxes"], [image.size for image in example["images"]])
        if len(example["images"]) == 1:
            example["image"], example["boxes"] = example["images"][0], example["boxes"][0]
        return example

    def peek(self, index: int) -> dict:
        """The example with its pictures as they are stored, not decoded, and `boxes` as one list per image."""
        return _check_row(self._parse(self._chosen[index]), self._folder)

    def _label(self, row: int) -> str:
        return f"{Path(self.name).name}:{self._numbers[row]}"

    def _parse(self, row: int) -> dict:
        """The dict of a row with its id, nothing else checked."""
        parsed = _parse_row(self._rows[row])
        given = parsed.get("id")
        return parsed | {"id": self._label(row) if given in (None, "") else str(given)}

    def _check(self, limit: int | None, require_boxes: bool) -> None:
        """Keep the first `limit` good rows; the messages of the bad ones among them go to `skipped`."""
        chosen, sizes, labels = [], {}, {}
        for row in tqdm(range(len(self._rows)), desc=f"checking {self.name}", disable=len(self._rows) <= 200):
            if len(chosen) == limit:
                break
            label = self._label(row)
            try:
                parsed = self._parse(row)
                if parsed["id"] != label:
                    label += f" (id {parsed['id']!r})"
                example = _check_row(parsed, self._folder)
                if example["id"] in labels:
                    raise DataError(f"{labels[example['id']]} has the same id; make every id unique, or leave it out")
                if require_boxes and not any(example["boxes"]):
                    raise DataError("boxes is empty or missing; the attention reward needs at least one box")
                _fit_boxes(example["boxes"], [_measure(image, sizes) for image in example["images"]])
            except DataError as error:
                self.skipped.append(f"{label}: {error}")
            else:
                labels[example["id"]] = label
                chosen.append(row)
        self._chosen = chosen


def _measure(image, sizes: dict) -> tuple[int, int]:
    """(width, height) of a picture in pixels; `sizes` remembers it, so that a picture is decoded once."""
    key = hashlib.sha256(image).digest() if isinstance(image, bytes) else str(image)
    if key not in sizes:
        width, height = load_picture(image).size
        if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
            raise DataError(
                f"picture of {width} x {height} pixels is longer than {LONGEST_TO_SHORTEST} times its width; crop it"
            )
        sizes[key] = width, height
    return sizes[key]


def _open(data: str, split: str) -> Examples:
    """The rows of `data`, unchecked."""
    path = Path(data).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        lines = {number: line for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()}
        return Examples(data, list(lines.values()), list(lines), path.parent)
    if not path.exists() and (path.suffix in (".jsonl", ".parquet") or not re.fullmatch(HUB_ID, data)):
        raise DataError(f"data {data!r}: there is no such file or folder; valid: {VALID_DATA}")
    if path.is_file() and path.suffix != ".parquet":
        raise DataError(f"data {data!r} is a file of another type; valid: {VALID_DATA}")
    try:
        if path.is_file():
            dataset = datasets.Dataset.from_parquet(str(path))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path) if path.exists() else data, split=split)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"unknown split {split!r}; valid ones: {', '.join(dataset)}")
            dataset = dataset[split]
    except Exception as error:  # whatever pyarrow, fsspec and the Hub raise
        what = "cannot be loaded" if path.exists() else "is no file or folder here, and no Hub id that can be loaded"
        raise DataError(f"data {data!r} {what} ({type(error).__name__}: {error}); valid: {VALID_DATA}") from error
    folder = path.parent if path.is_file() else path
    # Arrow rows keep the pictures encoded, where the default format would decode them.
    return Examples(data, dataset.with_format("arrow"), range(len(dataset)), folder)


def load_examples(
    data: str, *, limit: int | None = None, bad_rows: str = "error", require_boxes: bool = True, split: str = "train"
) -> Examples:
    """Open a data set and check every row of it, or as many as it takes to find `limit` good ones.

    Each distinct picture is decoded in full once, although its header would give the size: a truncated file that is
    found in the third hour loses the run, found here it costs seconds.

    data           `scenes`, `scenes:validation`, `scenes:heldout`, `scenes:newtype`; a .jsonl or .parquet file, its
                   picture paths relative to the file; a folder made by `Dataset.save_to_disk`; any other folder or
                   Hub id that `datasets.load_dataset` reads
    bad_rows       "error" raises when there are any, "skip" drops them and lists them in `.skipped`
    require_boxes  whether a row without boxes is bad
    split          of a folder or Hub id that has several

    Raises DataError when the data cannot be opened, when a row is bad and bad_rows is "error", and when no good row
    is left; ValueError for an invalid argument.
    """
    if bad_rows not in ("error", "skip"):
        raise ValueError(f"bad_rows is {bad_rows!r}; valid ones: error, skip")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a positive number of examples, or None for all of them")
    if data.partition(":")[0] == "scenes":
        try:
            scenes = load_scenes(f"scenes:{split}" if data == "scenes" else data)
        except ValueError as error:
            raise DataError(str(error)) from error
        return Examples(data, scenes, range(len(scenes)), Path(), limit)  # drawn by sayo itself, nothing to check
    examples = _open(data, split)
    if not len(examples):
        raise DataError(f"data {data!r} has no rows; write at least one example")
    examples._check(limit, require_boxes)
    if examples.skipped and (bad_rows == "error" or not len(examples)):
        listed, more = examples.skipped[:MAX_LISTED], len(examples.skipped) - MAX_LISTED
        rest = [f"and {more} more"] if more > 0 else []
        hint = "--bad_rows skip drops them" if len(examples) else "no good row is left"
        summary = f"{len(examples.skipped)} bad and {len(examples)} good rows in {data}:"
        raise DataError("\n  ".join([summary, *listed, *rest]) + f"\n{hint}")
    return examples
