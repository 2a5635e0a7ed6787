"""The region that an answer rests on: boxes, polygons and masks as written, fitted to a picture, and painted.

The user declares how boxes and polygons are written, one of BOX_FORMATS; nothing is guessed. A box is two corners
(xyxy) or a corner, width and height (xywh); numbers are pixels of the picture, fractions of its sides (_normalized, 0
to 1) or thousandths (_1000). Fitted regions are in pixels of the picture as a viewer shows it, boxes as corners.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

import numpy as np
from PIL import Image, ImageDraw

from sayo.examples.pictures import DataError

BOX_FORMATS = ("xyxy", "xywh", "xyxy_normalized", "xywh_normalized", "xyxy_1000", "xywh_1000")
FORMS = {"xyxy": ("[x1, y1, x2, y2]", "x1 < x2 and y1 < y2"), "xywh": ("[x, y, w, h]", "w > 0 and h > 0")}
UNITS = {  # the number for a whole side of the picture, None for pixels; what a message says to write
    "": (None, "write pixels of the original picture as a viewer shows it, not of a resized copy"),
    "normalized": (1, "write numbers from 0 to 1"),
    "1000": (1000, "write numbers from 0 to 1000"),
}
# Pixels that a region may stick out of its picture by rounding; it is clipped. In fractions and thousandths at least a
# thousandth of the side, the last digit of most such files.
EDGE_TOLERANCE = 1
LARGEST = 1e9  # larger than any picture; larger integers would overflow in float arithmetic


def is_number(value) -> bool:
    """Whether it is a finite number."""
    # math.isfinite fails on very long integers.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def nesting(value, *kinds: type) -> int:
    """The nesting depth of lists (or of these kinds): 0 for a number, 2 for [[1, 2], [3, 4]]."""
    depth, level = 0, [value]
    while level := [entry for entry in level if isinstance(entry, kinds or list)]:  # too deep to recurse, if hostile
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        depth, level = depth + 1, list(chain.from_iterable(inner))
    return depth


def _one_for_each(name: str, value: list, num_images: int) -> list:
    if len(value) != num_images:
        counts = f"{name} has {len(value)} lists, but there are {num_images} images"
        raise DataError(f"{counts}; write one for each image, not for each object")
    return value


def boxes_per_image(boxes, num_images: int) -> list[list]:
    """A list of boxes per image, [] for none. One image may also have a flat list or a single box. Raises DataError."""
    if not boxes:
        return [[] for _ in range(num_images)]
    if not isinstance(boxes, list):
        raise DataError(f"boxes is {boxes!r:.200}; write a list of boxes, [[x1, y1, x2, y2], ...]")
    if num_images == 1 and len(boxes) == 4 and all(map(is_number, boxes)):
        return [[boxes]]
    if not all(group is None or isinstance(group, list) and all(isinstance(b, list) for b in group) for group in boxes):
        if num_images == 1:
            return [boxes]
        raise DataError(f"boxes is {boxes!r:.200}; with several images, write one list of boxes for each image")
    return [group or [] for group in _one_for_each("boxes", boxes, num_images)]


def polygons_per_image(polygons, num_images: int) -> list[list]:
    """A list of polygons per image, [] for none; a polygon is a list of points [x, y], otherwise unchecked.

    One image may also have a flat list, a single polygon, or a list of polygons per object as in COCO. A polygon may be
    flat as in COCO. Raises DataError.
    """
    if not polygons:
        return [[] for _ in range(num_images)]
    if not isinstance(polygons, list):
        forms = "[[[x, y], [x, y], [x, y], ...], ...] or [[x1, y1, x2, y2, x3, y3, ...], ...]"
        fix = f"write a list of polygons, {forms}; a run-length code: write it as a mask picture"
        raise DataError(f"polygons is {polygons!r:.200}; {fix}")
    if (depth := nesting(polygons)) > 4:  # images or objects, polygons, points, numbers
        raise DataError(f"polygons is nested {depth} lists deep; write [[[x, y], [x, y], [x, y], ...], ...]")
    if num_images == 1 and any(polygons) and all(map(_is_object, polygons)):
        polygons = [[polygon for polygons_of_object in polygons for polygon in polygons_of_object]]
    only = polygons[0] if len(polygons) == 1 else None
    # Lists of two numbers are points, longer ones flat polygons.
    has_polygons = isinstance(only, list) and any(isinstance(entry, list) and len(entry) > 2 for entry in only)
    wrapped = num_images > 1 or len(polygons) == 1 and (only in (None, []) or has_polygons or nesting(only) > 2)
    groups = _one_for_each("polygons", polygons, num_images) if wrapped else [polygons]
    return [_polygons(group) for group in groups]


def _is_object(value) -> bool:
    """Whether it can only be a list of polygons: a list of two numbers is a point, a longer one a flat polygon."""
    return isinstance(value, list) and all(
        isinstance(entry, list) and (len(entry) > 2 if nesting(entry) == 1 else nesting(entry) == 2) for entry in value
    )


def _polygons(group) -> list[list]:
    """The polygons of one image, as lists of points."""
    if not group:
        return []
    if not isinstance(group, list):
        raise DataError(f"polygons of an image are {group!r:.200}; write a list of polygons for each image")
    is_points = all(isinstance(point, list) and len(point) == 2 and nesting(point) == 1 for point in group)
    if is_points or (nesting(group) == 1 and isinstance(group[0], int | float)):
        group = [group]
    return [_points(polygon) for polygon in group]


def _points(polygon) -> list:
    if not isinstance(polygon, list) or not polygon:
        raise DataError(f"polygon {polygon!r:.200} is no list of points; write [[x, y], [x, y], [x, y], ...]")
    if isinstance(polygon[0], list):
        return polygon
    if len(polygon) % 2:
        raise DataError(f"polygon {polygon!r:.200} has {len(polygon)} numbers; write pairs, [x1, y1, x2, y2, x3, y3]")
    return [polygon[i : i + 2] for i in range(0, len(polygon), 2)]


def fit_box(box, width: int, height: int, box_format: str = "xyxy") -> list:
    """The box as [x1, y1, x2, y2] in pixels, clipped to its picture. Raises DataError."""
    corners, _, unit = box_format.partition("_")
    name, (form, rule) = f"box {box!r:.200}", FORMS[corners]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"{name} is not four finite numbers; write boxes as [{form}, ...]")
    fits = [other for other in BOX_FORMATS if _corners(box, width, height, other)]
    _check_fractions(name, box, width, height, box_format, [other for other in fits if other.endswith("normalized")])
    if min(box[2:]) <= 0 if corners == "xywh" else box[2] <= box[0] or box[3] <= box[1]:
        other = "xywh" if corners == "xyxy" else "xyxy"
        same = box_format.replace(corners, other)
        fix = f"give --box_format {same if same in fits or not fits else ' or '.join(fits)} for those"
        raise DataError(f"{name} has no area; write {form} with {rule}, not {FORMS[other][0]}; {fix}")
    if fitted := _corners(box, width, height, box_format):
        return fitted
    hint = f"; in --box_format {' or '.join(fits)} it would be inside" if fits else ""
    raise DataError(f"{name} is outside of its picture of {width} x {height} pixels; {UNITS[unit][1]}{hint}")


def formats_that_fit(example: dict, sizes: Sequence[tuple[int, int]]) -> set[str]:
    """The box formats in which all regions of an example are good."""
    found = set()
    for box_format in BOX_FORMATS:
        with suppress(DataError):
            fit_regions(example, sizes, box_format)
            found.add(box_format)
    return found


def _check_fractions(name: str, numbers: list, width: int, height: int, box_format: str, fits: Sequence = ()) -> None:
    """Raises DataError for numbers from 0 to 1 where they should be pixels or thousandths."""
    corners, _, unit = box_format.partition("_")
    if unit != "normalized" and max(width, height) > 1 and 0 <= min(numbers) and max(numbers) <= 1:
        own = f"{corners}_normalized"  # first
        fix = f"those take --box_format {' or '.join(sorted(fits, key=lambda other: other != own)) or own}"
        raise DataError(f"{name} looks like fractions of the picture's {width} x {height} pixels; {fix}")


def fit_polygon(points: list, width: int, height: int, box_format: str = "xyxy") -> list[list]:
    """The polygon's points [x, y] in pixels, clipped to its picture. Raises DataError."""
    unit, name, size = box_format.partition("_")[2], f"polygon {points!r:.200}", f"{width} x {height} pixels"
    if not all(isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points):
        raise DataError(f"{name} is not made of pairs of finite numbers; write [[x, y], [x, y], ...]")
    if len(points) < 3:
        raise DataError(f"{name} has {len(points)} points; write three or more, a box goes to boxes")
    _check_fractions(name, list(chain.from_iterable(points)), width, height, box_format)
    fitted = _fit_points(points, width, height, unit)
    if fitted is None:
        fix = f"{UNITS[unit][1]}, or give the --box_format that they are in"
        raise DataError(f"{name} is outside of its picture of {size}; {fix}")
    if _on_a_line(fitted):
        raise DataError(f"{name} has no area within its picture of {size}; write the points around the region")
    return fitted


def fit_regions(example: dict, sizes: Sequence[tuple[int, int]], box_format: str) -> dict:
    """The `boxes` and `polygons`, if any, of an example as lists per image, fitted to (width, height) of each image."""
    fitted = {}
    for name, fit in (("boxes", fit_box), ("polygons", fit_polygon)):
        if name in example:
            pairs = zip(example[name], sizes, strict=True)
            fitted[name] = [[fit(region, *size, box_format) for region in group] for group, size in pairs]
    return fitted


def _corners(box: list, width: int, height: int, box_format: str) -> list | None:
    """[x1, y1, x2, y2] in pixels, clipped to the picture; None for a box with no area inside."""
    corners, _, unit = box_format.partition("_")
    x, y, right, bottom = box
    if max(map(abs, box)) < LARGEST and corners == "xywh":
        right, bottom = x + right, y + bottom
    fitted = _fit_points([[x, y], [right, bottom]], width, height, unit)
    if fitted is None or fitted[1][0] <= fitted[0][0] or fitted[1][1] <= fitted[0][1]:
        return None
    return [*fitted[0], *fitted[1]]


def _fit_points(points: list[list], width: int, height: int, unit: str) -> list[list] | None:
    """Points [x, y] in pixels, clipped to the picture; None when rounding does not explain how far one is outside."""
    whole, fitted = UNITS[unit][0], []
    if any(abs(number) >= LARGEST for number in chain.from_iterable(points)):
        return None
    for side, numbers in zip((width, height), zip(*points, strict=True), strict=True):
        pixels = [number if whole is None else number * side / whole for number in numbers]
        tolerance = EDGE_TOLERANCE if whole is None else max(EDGE_TOLERANCE, side / 1000)
        if min(pixels) < -tolerance or max(pixels) > side + tolerance:
            return None
        fitted.append([min(max(number, 0), side) for number in pixels])
    return list(map(list, zip(*fitted, strict=True)))


def _on_a_line(points: list[list]) -> bool:
    """Whether points lie on one line, up to float rounding. (The signed area of a figure of eight is zero, too.)"""
    offsets = np.asarray(points, dtype=float) - points[0]  # (n, 2)
    longest = offsets[np.square(offsets).sum(1).argmax()]
    across = offsets[:, 0] * longest[1] - offsets[:, 1] * longest[0]  # (n,)
    return bool((abs(across) <= 1e-9 * (longest @ longest)).all())


def regions_of(example: dict) -> list[tuple]:
    """(boxes, polygons, mask or None) for each picture of an example."""
    count = len(example["images"])
    boxes, polygons = (example.get(name) or [] for name in ("boxes", "polygons"))
    if count == 1:
        boxes, polygons = [boxes], [polygons]
    empty = [[] for _ in range(count)]
    return list(zip(boxes or empty, polygons or empty, example.get("masks") or [None] * count, strict=True))


def paint_region(
    size: tuple[int, int], boxes: Sequence = (), polygons: Sequence = (), mask: Image.Image | None = None
) -> Image.Image:
    """The union of boxes, polygons and a mask as an "L" picture, 255 inside and 0 elsewhere.

    A pixel is inside when its center is. A region too thin to hold any center paints the pixels that it touches.

    size       (width, height) of the picture
    boxes      [x1, y1, x2, y2] in pixels; the edges are rounded, x2 and y2 are exclusive
    polygons   lists of three or more [x, y] in pixels, filled by the even-odd rule
    mask       a one-channel picture of that size, nonzero inside

    Raises ValueError for a box without area, a polygon of fewer points, either outside of the picture, and a mask of
    another size.
    """
    width, height = size
    inside = np.zeros((height, width), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(f"box {[x1, y1, x2, y2]}: give x1 < x2 and y1 < y2 within its {width} x {height} picture")
        left, top = min(max(0, round(x1)), width - 1), min(max(0, round(y1)), height - 1)
        inside[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))] = True
    for polygon in polygons:
        _paint_polygon(inside, np.asarray(polygon, dtype=float))
    if mask is not None:
        if mask.size != size:
            raise ValueError(f"mask of {mask.width} x {mask.height} pixels for a picture of {width} x {height}")
        inside |= np.asarray(mask.convert("L")) > 0
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _paint_polygon(inside: np.ndarray, points: np.ndarray) -> None:
    """Mark pixels (height, width) whose centers points (n, 2) enclose; Pillow's polygon would paint its border, too."""
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError(f"polygon {points.tolist()}: give three or more points [x, y]")
    size = inside.shape[::-1]
    if (points.max(0) <= 0).any() or (points.min(0) >= size).any():
        raise ValueError(f"polygon {points.tolist()}: give points within its {size[0]} x {size[1]} picture")
    left, top = np.floor(points.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(points.max(0)).astype(int), size)
    crossed = np.zeros((bottom - top, right - left + 1), dtype=bool)  # (rows, columns and one beyond)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        (x1, y1), (x2, y2) = sorted(((x1, y1), (x2, y2)), key=lambda point: point[1])
        rows = np.arange(max(top, math.ceil(y1 - 0.5)), min(bottom, math.ceil(y2 - 0.5)))  # centers in [y1, y2)
        x = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)  # where the edge crosses the rows
        columns = np.ceil(x - 0.5).astype(int).clip(left, right)  # the first center right of it
        crossed[rows - top, columns - left] ^= True
    painted = np.logical_xor.accumulate(crossed, axis=1)[:, :-1]
    inside[top:bottom, left:right] |= painted
    if not painted.any():
        touched, last = Image.new("1", size), np.subtract(size, 1)
        ImageDraw.Draw(touched).polygon([tuple(point) for point in np.floor(points).clip(0, last)], fill=1)
        inside |= np.asarray(touched)
