"""Boxes in every format, polygons and masks: what they become in pixels, and what of a picture they cover."""

from contextlib import nullcontext

import datasets
import numpy as np
import pytest
from conftest import GOOD, HEIGHT, WIDTH, two, without, write_jsonl
from hypothesis import assume, example, given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image

from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError, load_mask
from sayo.examples.regions import BOX_FORMATS, fit_box, fit_polygon, paint_region, polygons_per_image


def written(box: list, width: int, height: int, box_format: str) -> list:
    """A box of corners in pixels as a file in the format has it."""
    x1, y1, x2, y2 = box
    numbers = np.array(box if box_format.startswith("xyxy") else [x1, y1, x2 - x1, y2 - y1], dtype=float)
    if "_" in box_format:
        numbers = numbers / [width, height, width, height] * (1000 if box_format.endswith("1000") else 1)
    return numbers.tolist()


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_every_format_becomes_pixels_of_corners(folder, box_format):
    box = written([4, 3, 30, 21], WIDTH, HEIGHT, box_format)
    data = write_jsonl(folder, GOOD | {"boxes": [box]}, two([[], [box]], images=["b.png", "a.png"]))
    one, several = load_examples(data, box_format=box_format)
    assert np.allclose(one["boxes"], [[4, 3, 30, 21]])
    assert several["boxes"][0] == [] and np.allclose(several["boxes"][1], [[4, 3, 30, 21]])


@st.composite
def boxes_of_pictures(draw):
    width, height = draw(st.integers(2, 5000)), draw(st.integers(2, 5000))
    (x1, x2), (y1, y2) = (
        sorted(draw(st.lists(st.integers(0, 10 * side), min_size=2, max_size=2, unique=True)))
        for side in (width, height)
    )
    return [x1 / 10, y1 / 10, x2 / 10, y2 / 10], width, height


@given(boxes_of_pictures(), st.sampled_from(BOX_FORMATS))
def test_a_box_survives_being_written_in_any_format(picture, box_format):
    box, width, height = picture
    numbers = written(box, width, height, box_format)
    if max(numbers) <= 1 and not box_format.endswith("normalized"):
        return  # taken for fractions
    assert np.allclose(fit_box(numbers, width, height, box_format), box, rtol=0, atol=1e-6)


NUMBERS = st.one_of(st.integers(-20, 60), st.floats(), st.just(10**400), st.floats(-0.01, 1.1))


@given(st.tuples(*[NUMBERS] * 4).map(list), st.integers(1, 50), st.integers(1, 50), st.sampled_from(BOX_FORMATS))
@example([0, 0, 1, 1], 1, 1, "xyxy")  # one pixel, whole: fractions or not
@example([10**400, 0, 10**400, 0.5], 3, 3, "xywh")
def test_a_box_is_refused_or_lies_in_its_picture(box, width, height, box_format):
    x, y, right, bottom = box
    sides = [1, 1] if box_format.endswith("normalized") else [1000, 1000] if "1000" in box_format else [width, height]
    if box_format.startswith("xywh") and max(map(abs, box)) < 1e9:
        right, bottom = x + right, y + bottom
    try:
        x1, y1, x2, y2 = fit_box(box, width, height, box_format)
    except DataError as error:
        inside = 0 <= x < right <= sides[0] and 0 <= y < bottom <= sides[1]
        assert not inside or "fractions" in str(error) and max(box) <= 1
    else:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        scale = [width / sides[0], height / sides[1]] * 2
        assert np.abs(np.multiply([x, y, right, bottom], scale) - [x1, y1, x2, y2]).max() <= 1 + 1e-6


PUSHED_OUT = [  # format, box, width and height, fitted box; None where rounding does not explain it
    ("xyxy", [-1, -0.5, 41, 30.7], (40, 30), [0, 0, 40, 30]),
    ("xywh", [10, 10, 31, 21], (40, 30), [10, 10, 40, 30]),
    ("xyxy_normalized", [-0.001, 0, 1.001, 1], (40, 30), [0, 0, 40, 30]),
    ("xyxy_normalized", [0, 0, 1.02, 1.03], (40, 30), [0, 0, 40, 30]),  # a pixel is more than a thousandth here
    ("xywh_1000", [500, 500, 501, 501], (40, 30), [20, 15, 40, 30]),
    ("xyxy_normalized", [0, 0, 1.001, 0.5], (4000, 100), [0, 0, 4000, 50]),
    ("xyxy_normalized", [0, 0, 1.002, 0.5], (4000, 100), None),
    ("xyxy", [0, 0, 4004, 50], (4000, 100), None),
]


@pytest.mark.parametrize(("box_format", "box", "size", "fitted"), PUSHED_OUT)
def test_box_that_rounding_pushed_out_is_clipped(box_format, box, size, fitted):
    with nullcontext() if fitted else pytest.raises(DataError, match="outside"):
        assert fit_box(box, *size, box_format) == fitted


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1)])
def test_pictures_of_one_pixel_have_boxes(folder, size):
    Image.new("RGB", size).save(folder / "thin.png")
    row = GOOD | {"image": "thin.png", "boxes": [[0, 0, *size]]}
    example = load_examples(write_jsonl(folder, row))[0]
    assert example["image"].size == size and example["boxes"] == [[0, 0, *size]]
    assert np.asarray(paint_region(size, example["boxes"])).all()


TRIANGLE = [[2, 3], [20, 3], [2, 25]]
FLAT = [2, 3, 20, 3, 2, 25]


WRITTEN = [
    ("points", [TRIANGLE], [TRIANGLE]),
    ("flat", [FLAT], [TRIANGLE]),
    ("mixed", [FLAT, TRIANGLE], [TRIANGLE, TRIANGLE]),
    ("one", TRIANGLE, [TRIANGLE]),
    ("one flat", FLAT, [TRIANGLE]),
    ("wrapped", [[TRIANGLE, TRIANGLE]], [TRIANGLE, TRIANGLE]),
    ("wrapped flat", [[FLAT]], [TRIANGLE]),
    ("of objects", [[FLAT, FLAT], [FLAT], []], [TRIANGLE, TRIANGLE, TRIANGLE]),
    ("points of objects", [[TRIANGLE], [TRIANGLE, FLAT]], [TRIANGLE, TRIANGLE, TRIANGLE]),
    ("clipped", [[[-1, 0], [40.5, 0], [0, 31]]], [[[0, 0], [40, 0], [0, 30]]]),
    ("figure of eight", [[[0, 0], [10, 10], [10, 0], [0, 10]]], [[[0, 0], [10, 10], [10, 0], [0, 10]]]),
]


@pytest.mark.parametrize(("polygons", "expected"), [pytest.param(*case[1:], id=case[0]) for case in WRITTEN])
def test_every_way_to_write_polygons(folder, polygons, expected):
    example = load_examples(write_jsonl(folder, without("boxes") | {"polygons": polygons}))[0]
    assert example["polygons"] == expected and example["boxes"] == [] and "masks" not in example


def test_polygons_nested_deeply_are_refused_without_recursion():
    polygons = [1, 2, 3]
    for _ in range(5000):
        polygons = [polygons]
    with pytest.raises(DataError, match="polygons is nested 5001 lists deep"):
        polygons_per_image(polygons, 1)


@pytest.mark.parametrize(("box_format", "scale"), [("xywh_normalized", [40, 30]), ("xyxy_1000", [0.04, 0.03])])
def test_polygons_are_in_the_unit_of_the_boxes(folder, box_format, scale):
    polygon = (np.array(TRIANGLE) / scale).tolist()
    data = write_jsonl(folder, without("boxes") | {"polygons": [polygon]})
    assert np.allclose(load_examples(data, box_format=box_format)[0]["polygons"], [TRIANGLE])


BOX = (5, 6, 9, 12)


def box_inside(size: tuple[int, int], box) -> np.ndarray:
    """(height, width) booleans by slicing, for a box of integers."""
    inside = np.zeros((size[1], size[0]), dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    return inside


def save_mask(path, size=(WIDTH, HEIGHT), box=BOX, mode="L", color=255, around=0) -> np.ndarray:
    """A mask file with a rectangle, and the region as booleans (height, width)."""
    mask = Image.new(mode, size, around)
    if mode == "P":
        mask.putpalette([0, 0, 0, 128, 0, 0])  # the colors of VOC: 0 is black, 1 dark red
    mask.paste(color, box)
    mask.save(path)
    return box_inside(size, box)


@pytest.mark.parametrize("key", ["mask", "masks"])
@pytest.mark.parametrize("encoded", [False, True])
def test_mask(folder, key, encoded):
    inside = save_mask(folder / "mask.png")
    mask = {"bytes": (folder / "mask.png").read_bytes(), "path": None} if encoded else "mask.png"
    row = without("boxes") | {key: mask if key == "mask" else [mask]}
    data = str(folder / "train.parquet") if encoded else write_jsonl(folder, row)
    if encoded:
        datasets.Dataset.from_list([row]).to_parquet(data)
    examples = load_examples(data)
    undecoded, example = examples.raw(0), examples[0]
    assert undecoded["masks"] == [mask["bytes"] if encoded else str(folder / "mask.png")]
    assert undecoded["images"] == [str(folder / "a.png")]
    assert example["boxes"] == [] and not example.keys() & {"mask", "polygons"}
    (mask,) = example["masks"]
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), inside * 255)


def test_regions_of_several_images_and_of_every_kind(folder):
    inside = save_mask(folder / "mask.png", size=(20, 50))
    for none in (None, []):
        row = two([[[1, 2, 3, 4]], none], polygons=[none, [FLAT, [[0, 0], [5, 0], [5, 5]]]], masks=[none, "mask.png"])
        examples = load_examples(write_jsonl(folder, row))
        example = examples[0]
        assert example["boxes"] == [[[1, 2, 3, 4]], []]
        assert example["polygons"] == [[], [TRIANGLE, [[0, 0], [5, 0], [5, 5]]]]
        assert example["masks"][0] is None and np.array_equal(np.asarray(example["masks"][1]) > 0, inside)
        assert examples.raw(0)["masks"] == [None, str(folder / "mask.png")]
    row = GOOD | {"polygons": [], "masks": [None]}
    assert load_examples(write_jsonl(folder, row))[0].keys() & {"polygons", "masks", "mask"} == set()


MASKS = [  # mode, color of the region, color around it
    ("L", 255, 0), ("1", 1, 0), ("RGB", (0, 0, 1), 0), ("RGBA", (9, 0, 0, 255), 0), ("P", 1, 0),
    ("L", 1, 0), ("I;16", 1, 0),  # labels in 8 and 16 bits
    ("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),  # white all over, transparent around the region
]  # fmt: skip


@pytest.mark.parametrize(("mode", "color", "around"), MASKS)
def test_every_kind_of_mask(tmp_path, mode, color, around):
    inside = save_mask(tmp_path / "mask.png", mode=mode, color=color, around=around)
    assert np.array_equal(np.asarray(load_mask(tmp_path / "mask.png")), inside * 255)


POINTS = st.tuples(*[st.one_of(st.integers(-9, 60), st.floats(), st.just(10**400))] * 2).map(list)


@given(st.lists(POINTS, min_size=1, max_size=6), st.sampled_from(BOX_FORMATS))
def test_a_polygon_is_refused_or_lies_in_its_picture(points, box_format):
    try:
        fitted = fit_polygon(points, WIDTH, HEIGHT, box_format)
    except DataError:
        return
    assert len(fitted) == len(points) >= 3
    assert np.min(fitted) >= 0 and (np.max(fitted, axis=0) <= [WIDTH, HEIGHT]).all()
    assert paint_region((WIDTH, HEIGHT), polygons=[fitted]).getbbox() is not None


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(SIZES, st.data())
def test_boxes_of_integers_paint_their_slices(size, data):
    width, height = size
    boxes, expected = [], np.zeros((height, width), dtype=bool)
    for _ in range(data.draw(st.integers(1, 3))):
        x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        boxes.append([x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))])
        expected |= box_inside(size, boxes[-1])
    region = paint_region(size, boxes)
    assert region.mode == "L" and region.size == size
    assert np.array_equal(np.asarray(region), expected * 255)
    corners = [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]] for x1, y1, x2, y2 in boxes]
    assert np.array_equal(np.asarray(paint_region(size, polygons=corners)), expected * 255)


@given(SIZES, st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8))
def test_polygons_paint_the_pixels_whose_centers_they_hold(size, shares):
    points = np.multiply(shares, size)
    assume(np.ptp(points, axis=0).all())
    painted = np.asarray(paint_region(size, polygons=[points.tolist()])) > 0
    rows, columns = np.mgrid[: size[1], : size[0]]
    centers = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=-1)  # (height * width, 2)
    inside = Outline(points).contains_points(centers).reshape(painted.shape)
    ends = np.roll(points, -1, axis=0)
    along = ends - points  # (n, 2)
    share = ((centers[:, None] - points) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
    nearest = points + share.clip(0, 1)[..., None] * along  # (height * width, n, 2)
    on_edge = (np.linalg.norm(centers[:, None] - nearest, axis=-1).min(1) < 1e-6).reshape(painted.shape)
    assert painted.any()
    if inside[~on_edge].any():
        assert np.array_equal(painted[~on_edge], inside[~on_edge])


def test_nothing_vanishes():
    thin = [{"boxes": [box]} for box in ([3.1, 4.1, 3.2, 4.2], [39.9, 29.9, 40, 30])]
    thin += [{"polygons": [[[3.1, 4.1], [3.2, 4.1], [3.2, 4.2]]]}, {"polygons": [[[39.9, 29.9], [40, 29.9], [40, 30]]]}]
    for regions in [*thin, {"polygons": [[[0, 0.1], [40, 0.1], [40, 0.2]]]}]:
        assert paint_region((WIDTH, HEIGHT), **regions).getbbox() is not None, regions


def test_the_region_is_the_union(tmp_path):
    inside = save_mask(tmp_path / "mask.png", box=(30, 20, 40, 30))
    boxes, polygons = [[0, 0, 5, 5]], [[[10, 0], [20, 0], [20, 10], [10, 10]]]
    expected = inside | box_inside((WIDTH, HEIGHT), boxes[0]) | box_inside((WIDTH, HEIGHT), (10, 0, 20, 10))
    mask = load_mask(tmp_path / "mask.png")
    painted = paint_region((WIDTH, HEIGHT), boxes, polygons, mask)
    assert np.array_equal(np.asarray(painted) > 0, expected)
    assert np.array_equal(np.asarray(mask) > 0, inside)  # what was handed in is as it was


UNPAINTABLE = [
    {"boxes": [[5, 5, 5, 9]]}, {"boxes": [[40, 0, 50, 9]]}, {"polygons": [[[1, 1], [2, 2]]]},
    {"polygons": [[[41, 1], [50, 1], [45, 9]]]}, {"mask": Image.new("L", (HEIGHT, WIDTH))},
]  # fmt: skip


@pytest.mark.parametrize("regions", UNPAINTABLE)
def test_what_cannot_be_painted_is_refused(regions):
    with pytest.raises(ValueError, match="40 x 30|points"):
        paint_region((WIDTH, HEIGHT), **regions)
