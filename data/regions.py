"""The region that an answer rests on: boxes, polygons and masks as they are written, fitted to a picture, painted.

Boxes and polygons are written in one of BOX_FORMATS, which the user declares and nothing here guesses: corners (xyxy)
or a corner, width and height (xywh); in pixels of the picture, in fractions of its sides (_normalized, 0 to 1), or in
thousandths of them (_1000). Polygons are points in the same unit. What comes out is pixels of the picture as a viewer
shows it, corners for boxes.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from data.pictures import DataError

BOX_FORMATS = ("xyxy", "xywh", "xyxy_normalized", "xywh_normalized", "xyxy_1000", "xywh_1000")
UNITS = {"": None, "normalized": 1, "1000": 1000}  # what stands for a whole side of the picture; None is its pixels
# How far a region may stick out of its picture through rounding; it is clipped. In pixels; where a side is 1 or 1000
# and not counted in pixels, a thousandth of it counts when that is more, the last digit of most such files.
EDGE_TOLERANCE = 1
LARGEST = 1e9  # beyond every picture; larger integers would overflow where they meet floats

# --- as written: one entry for each image ------------------------------------------------------------------------


def is_number(value) -> bool:
    # Compared with infinity, not math.isfinite: that one fails on very long integers.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _depth(value) -> int:
    """How many lists are around the innermost numbers: 0 for a number, 2 for [[1, 2], [3, 4]]."""
    depth, level = 0, [value]
    while lists := [entry for entry in level if isinstance(entry, list)]:  # no recursion: hostile files nest deeply
        depth, level = depth + 1, [inner for entry in lists for inner in entry]
    return depth


def _one_for_each(name: str, value: list, num_images: int) -> list:
    if len(value) != num_images:
        raise DataError(
            f"{name} has {len(value)} lists, but there are {num_images} images; write one for each image, not for each "
            "object"
        )
    return value


def boxes_per_image(boxes, num_images: int) -> list[list]:
    """One list of boxes for each image, [] where it has none.

    With one image its list need not be wrapped in another, and four numbers are one box. Raises DataError.
    """
    if not boxes:
        return [[] for _ in range(num_images)]
    if not isinstance(boxes, list):
        raise DataError(f"boxes is {boxes!r:.200}; write a list of boxes, [[x1, y1, x2, y2], ...]")
    if num_images == 1 and len(boxes) == 4 and all(map(is_number, boxes)):
        return [[boxes]]
    nested = all(
        group is None or isinstance(group, list) and all(isinstance(box, list) for box in group) for group in boxes
    )
    if num_images == 1 and not nested:
        return [boxes]
    if not nested:
        raise DataError(f"boxes is {boxes!r:.200}; with several images, write one list of boxes for each image")
    return [group or [] for group in _one_for_each("boxes", boxes, num_images)]


def polygons_per_image(polygons, num_images: int) -> list[list]:
    """One list of polygons for each image, each a list of points [x, y], nothing else checked; [] where it has none.

    With one image its list need not be wrapped in another, and there may be a list of polygons for each object, as COCO
    has them. A polygon is a list of points or flat as in COCO, and one polygon need not be wrapped in a list. Raises
    DataError.
    """
    if not polygons:
        return [[] for _ in range(num_images)]
    if not isinstance(polygons, list):
        raise DataError(
            f"polygons is {polygons!r:.200}; write a list of polygons, [[[x, y], [x, y], [x, y], ...], ...] or "
            "[[x1, y1, x2, y2, x3, y3, ...], ...]; a run-length code: write it as a mask picture"
        )
    if (depth := _depth(polygons)) > 4:  # images or objects, polygons, points, numbers
        raise DataError(f"polygons is nested {depth} lists deep; write [[[x, y], [x, y], [x, y], ...], ...]")
    if num_images == 1 and any(polygons) and all(map(_is_object, polygons)):
        polygons = [[polygon for polygons_of_object in polygons for polygon in polygons_of_object]]
    only = polygons[0] if len(polygons) == 1 else None
    # Lists of two numbers are points, longer ones flat polygons.
    has_polygons = isinstance(only, list) and any(isinstance(entry, list) and len(entry) > 2 for entry in only)
    wrapped = num_images > 1 or len(polygons) == 1 and (only in (None, []) or has_polygons or _depth(only) > 2)
    groups = _one_for_each("polygons", polygons, num_images) if wrapped else [polygons]
    return [_polygons(group) for group in groups]


def _is_object(value) -> bool:
    """Whether it can only be a list of polygons: lists of two numbers would be points, longer ones flat polygons."""
    return isinstance(value, list) and all(
        isinstance(entry, list) and (len(entry) > 2 if _depth(entry) == 1 else _depth(entry) == 2) for entry in value
    )


def _is_point(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _depth(value) == 1


def _polygons(group) -> list[list]:
    """The polygons of one image, as lists of points."""
    if not group:
        return []
    if not isinstance(group, list):
        raise DataError(f"polygons of an image are {group!r:.200}; write a list of polygons for each image")
    if _depth(group) == 1 and isinstance(group[0], int | float) or all(map(_is_point, group)):
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


# --- fitted to a picture -----------------------------------------------------------------------------------------


def fit_box(box, width: int, height: int, box_format: str = "xyxy") -> list:
    """The box as [x1, y1, x2, y2] in pixels, clipped to its width x height picture. Raises DataError if it is none."""
    corners, _, unit = box_format.partition("_")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        wanted = "[x1, y1, x2, y2]" if corners == "xyxy" else "[x, y, w, h]"
        raise DataError(f"box {box!r:.200} is not four finite numbers; write boxes as [{wanted}, ...]")
    other = "_".join(filter(None, ("xywh" if corners == "xyxy" else "xyxy", unit)))
    if corners == "xywh" and min(box[2:]) <= 0:
        raise DataError(
            f"box {box!r:.200} has no area; write [x, y, w, h] with w > 0 and h > 0, or give --box_format {other} for "
            "[x1, y1, x2, y2]"
        )
    if corners == "xyxy" and (box[2] <= box[0] or box[3] <= box[1]):
        raise DataError(
            f"box {box!r:.200} has no area; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2, not [x, y, w, h]; those "
            f"take --box_format {other}"
        )
    if unit != "normalized" and max(width, height) > 1 and 0 <= min(box) and max(box) <= 1:
        raise DataError(
            f"box {box} looks like fractions of the picture's {width} x {height} pixels; those take "
            f"--box_format {corners}_normalized"
        )
    fitted = _corners(box, width, height, box_format)
    if fitted is None:
        inside = [other for other in BOX_FORMATS if _corners(box, width, height, other)]
        hint = f"; in --box_format {' or '.join(inside)} it would be inside" if inside else ""
        raise DataError(
            f"box {box!r:.200} is outside of its picture of {width} x {height} pixels; {_valid_numbers(unit)}{hint}"
        )
    return fitted


def fit_polygon(points: list, width: int, height: int, box_format: str = "xyxy") -> list[list]:
    """The polygon's points [x, y] in pixels, clipped to its width x height picture. Raises DataError if it is none."""
    if not all(isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points):
        raise DataError(f"polygon {points!r:.200} is not made of pairs of finite numbers; write [[x, y], [x, y], ...]")
    if len(points) < 3:
        raise DataError(f"polygon {points!r:.200} has {len(points)} points; write three or more, a box goes to boxes")
    numbers = [number for point in points for number in point]
    corners, _, unit = box_format.partition("_")
    if unit != "normalized" and max(width, height) > 1 and 0 <= min(numbers) and max(numbers) <= 1:
        raise DataError(
            f"polygon {points!r:.200} looks like fractions of the picture's {width} x {height} pixels; those take "
            f"--box_format {corners}_normalized"
        )
    fitted = _fit_points(points, width, height, unit)
    if fitted is None:
        raise DataError(
            f"polygon {points!r:.200} is outside of its picture of {width} x {height} pixels; {_valid_numbers(unit)}, "
            "or give the --box_format that they are in"
        )
    if _on_a_line(fitted):
        raise DataError(
            f"polygon {points!r:.200} has no area within its picture of {width} x {height} pixels; write the points "
            "around the region"
        )
    return fitted


def fit_regions(example: dict, sizes: Sequence[tuple[int, int]], box_format: str) -> dict:
    """The `boxes` and, if it has them, the `polygons` of an example as lists per image, fitted to the images' sizes."""
    fits = {"boxes": fit_box, "polygons": fit_polygon}
    return {
        name: [
            [fit(region, *size, box_format) for region in group]
            for group, size in zip(example[name], sizes, strict=True)
        ]
        for name, fit in fits.items()
        if name in example
    }


def _corners(box: list, width: int, height: int, box_format: str) -> list | None:
    """[x1, y1, x2, y2] in pixels, clipped to the picture; None for a box that is outside or has no area in there."""
    corners, _, unit = box_format.partition("_")
    x, y, right, bottom = box
    if max(map(abs, box)) < LARGEST and corners == "xywh":
        right, bottom = x + right, y + bottom
    fitted = _fit_points([[x, y], [right, bottom]], width, height, unit)
    if fitted is None or fitted[1][0] <= fitted[0][0] or fitted[1][1] <= fitted[0][1]:
        return None
    return [*fitted[0], *fitted[1]]


def _fit_points(points: list[list], width: int, height: int, unit: str) -> list[list] | None:
    """Points [x, y] in pixels, clipped to the picture; None when one is further out than rounding explains."""
    whole, fitted = UNITS[unit], []
    for point in points:
        fitted.append([])
        for number, side in zip(point, (width, height), strict=True):
            if abs(number) >= LARGEST:
                return None
            pixels = number if whole is None else number * side / whole
            tolerance = EDGE_TOLERANCE if whole is None else max(EDGE_TOLERANCE, side / 1000)
            if not -tolerance <= pixels <= side + tolerance:
                return None
            fitted[-1].append(min(max(pixels, 0), side))
    return fitted


def _on_a_line(points: list[list]) -> bool:
    """Whether points lie on one line, up to float rounding; the area of a figure of eight could be zero, too."""
    offsets = np.asarray(points, dtype=float) - points[0]  # (n, 2)
    longest = offsets[np.square(offsets).sum(1).argmax()]
    across = offsets[:, 0] * longest[1] - offsets[:, 1] * longest[0]  # (n,)
    return bool((abs(across) <= 1e-9 * (longest @ longest)).all())


def _valid_numbers(unit: str) -> str:
    if UNITS[unit] is None:
        return "write pixels of the original picture as a viewer shows it, not of a resized copy"
    return f"write numbers from 0 to {UNITS[unit]}"


# --- painted -----------------------------------------------------------------------------------------------------


def regions_of(example: dict) -> list[tuple]:
    """(boxes, polygons, mask or None) of each picture of an example."""
    count = len(example["images"])
    boxes, polygons = (example.get(name) or [] for name in ("boxes", "polygons"))
    if count == 1:
        boxes, polygons = [boxes], [polygons]
    empty = [[] for _ in range(count)]
    return list(zip(boxes or empty, polygons or empty, example.get("masks") or [None] * count, strict=True))


def paint_region(
    size: tuple[int, int], boxes: Sequence = (), polygons: Sequence = (), mask: Image.Image | None = None
) -> Image.Image:
    """The union of boxes, polygons and a mask of one picture as an "L" picture, 255 inside and 0 elsewhere.

    A pixel is inside where its center is. Whatever is too thin to hold a center paints the pixels that it touches, so
    that nothing vanishes.

    size       (width, height) of the picture
    boxes      [x1, y1, x2, y2] in pixels; the edges are rounded, x2 and y2 are exclusive like the end of a slice
    polygons   lists of three or more [x, y] in pixels, filled by the even-odd rule
    mask       a one-channel picture of that size, not 0 inside

    Raises ValueError for a box without area, a polygon of fewer points, either wholly outside of the picture, and a
    mask of another size.
    """
    width, height = size
    region = Image.new("L", size)
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(
                f"box {[x1, y1, x2, y2]}: give x1 < x2 and y1 < y2 in pixels of its {width} x {height} picture"
            )
        left, top = round(x1), round(y1)
        # Pillow's rectangle includes its last pixel; a box, like a slice, does not. At least one pixel is painted.
        right, bottom = max(left + 1, round(x2)) - 1, max(top + 1, round(y2)) - 1
        left, top = min(left, width - 1), min(top, height - 1)
        ImageDraw.Draw(region).rectangle((left, top, max(left, right), max(top, bottom)), fill=255)
    for polygon in polygons:
        _paint_polygon(region, np.asarray(polygon, dtype=float))
    if mask is not None:
        if mask.size != size:
            raise ValueError(f"mask of {mask.width} x {mask.height} pixels for a picture of {width} x {height}")
        region = ImageChops.lighter(region, mask.convert("L").point(lambda value: 255 if value else 0))
    return region


def _paint_polygon(region: Image.Image, points: np.ndarray) -> None:
    """Paint the pixels whose centers are in the polygon, points (n, 2); Pillow's own polygon paints its border too."""
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError(f"polygon {points.tolist()}: give three or more points [x, y]")
    (left, top), (right, bottom) = points.min(0), points.max(0)
    if right <= 0 or bottom <= 0 or left >= region.width or top >= region.height:
        raise ValueError(
            f"polygon {points.tolist()}: give points in pixels of its {region.width} x {region.height} picture"
        )
    left, top = max(0, math.floor(left)), max(0, math.floor(top))
    right, bottom = min(region.width, math.ceil(right)), min(region.height, math.ceil(bottom))
    crossed = np.zeros((bottom - top, right - left + 1), dtype=bool)  # (rows, columns and one beyond)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        (x1, y1), (x2, y2) = sorted(((x1, y1), (x2, y2)), key=lambda point: point[1])
        rows = np.arange(max(top, math.ceil(y1 - 0.5)), min(bottom, math.ceil(y2 - 0.5)))  # centers in [y1, y2)
        x = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)  # where the edge crosses those rows
        columns = np.ceil(x - 0.5).astype(int).clip(left, right)  # the first center that is not left of it
        crossed[rows - top, columns - left] ^= True
    inside = np.logical_xor.accumulate(crossed, axis=1)[:, :-1]
    if inside.any():
        region.paste(255, (left, top), Image.fromarray(inside.astype(np.uint8) * 255))
    else:
        last = (region.width - 1, region.height - 1)
        ImageDraw.Draw(region).polygon([tuple(point) for point in np.floor(points).clip(0, last)], fill=255)
