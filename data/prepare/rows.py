"""Turns one row of a public dataset into one example: checks its texts, boxes and picture, or drops the row."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags

from sayo.examples.pictures import TURNED, DataError, measure_picture, open_picture
from sayo.examples.regions import is_number

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # other formats: their name in lower case


class Dropped(Exception):
    """A row that cannot become an example, with the reason that the report counts and what was found."""

    def __init__(self, reason: str, detail: object = ""):
        try:
            detail = str(detail)
        except RecursionError:
            detail = "nested too deeply to be shown"
        super().__init__(reason, detail)
        # Pillow's messages hold addresses of objects, which differ from run to run.
        self.reason, self.detail = reason, re.sub(" at 0x[0-9a-f]+", "", detail)[:200]


class Picture(NamedTuple):
    """A picture that can be decoded: size in pixels as a viewer shows it, EXIF orientation, suffix of its format."""

    width: int
    height: int
    orientation: int = 1
    suffix: str = ".jpg"


def text(value, name: str) -> str:
    """The value as stripped text. Raises Dropped("no NAME") unless it is a text or a number."""
    if is_number(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Dropped(f"no {name}", repr(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character, a text file cannot hold it
        raise Dropped(f"{name} that is not text", repr(value)) from error
    return value.strip()


def as_shown(boxes: list, width: int, height: int, picture: Picture) -> list:
    """Boxes of a picture that was annotated as width x height, in pixels of the picture as a viewer shows it.

    They differ when an annotation tool ignored an EXIF orientation that turns the picture by 90 degrees: width and
    height are then swapped. Raises Dropped for any other difference in size.
    """
    if (width, height) == picture[:2]:
        return boxes
    if (height, width) != picture[:2] or picture.orientation not in TURNED:
        found = f"{picture.width} x {picture.height}, annotated as {width!r} x {height!r}"
        raise Dropped("picture of another size than annotated", found)
    mirrored_x, mirrored_y = picture.orientation in (6, 7), picture.orientation in (7, 8)
    turned = []
    for x1, y1, x2, y2 in boxes:
        left, right = (picture.width - y2, picture.width - y1) if mirrored_x else (y1, y2)
        top, bottom = (picture.height - x2, picture.height - x1) if mirrored_y else (x1, x2)
        turned.append([left, top, right, bottom])
    return turned


def fit_boxes(boxes: list, width: int, height: int, tolerance: float) -> list[list]:
    """The distinct boxes, clipped to a width x height picture and rounded to a hundredth of a pixel.

    A box may exceed the picture by `tolerance` of a side, or by a pixel if that is more. One bad box drops the row,
    because the region would be incomplete without it. Raises Dropped.
    """
    if not boxes:
        raise Dropped("no box")
    if not isinstance(boxes, list):
        raise Dropped("box is not four numbers", boxes)
    fitted = []
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_number(edge) for edge in box):
            raise Dropped("box is not four numbers", box)
        x1, y1, x2, y2 = (edge if isinstance(edge, int) else round(edge, 2) for edge in box)
        if x2 <= x1 or y2 <= y1:
            raise Dropped("box without area", list(box))
        clipped = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
        beyond_x, beyond_y = max(clipped[0] - x1, x2 - clipped[2]), max(clipped[1] - y1, y2 - clipped[3])
        empty = clipped[2] <= clipped[0] or clipped[3] <= clipped[1]
        if empty or beyond_x > max(1, tolerance * width) or beyond_y > max(1, tolerance * height):
            raise Dropped("box outside of its picture", f"{list(box)} of {width} x {height}")
        if max(clipped) <= 1:  # the loader would read fractions, and no visual token is that small
            raise Dropped("box of one pixel", list(box))
        if clipped not in fitted:
            fitted.append(clipped)
    return fitted


def inspect_picture(content: Path | bytes | None) -> Picture:
    """Decode a picture once. Raises Dropped if it is missing or damaged."""
    # Not Path.is_file, here and in the sources: it raises OSError for a name that is too long.
    if not content or (isinstance(content, Path) and not os.path.isfile(content)):
        raise Dropped("picture missing", content)
    try:
        width, height = measure_picture(content)
    except DataError as error:
        raise Dropped("picture unreadable", error) from error
    with open_picture(content) as opened:
        suffix = SUFFIXES.get(opened.format, f".{opened.format.lower()}")
        return Picture(width, height, opened.getexif().get(ExifTags.Base.Orientation, 1), suffix)
