"""Every kind of picture becomes RGB, turned as a viewer shows it."""

import io
import json

import pytest
from conftest import GOOD, HEIGHT, WIDTH, write_jsonl
from PIL import Image

from data.examples import DataError, load_examples, load_picture

# ----------------------------------------------------------------------------------------------------- pictures


def corner_picture(size=(WIDTH, HEIGHT)) -> Image.Image:
    """Black with a white square at the top left."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    return picture


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_exif_rotation_decides_size_and_boxes(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left; a viewer turns it right, so the stored top left is shown at the top right
    (folder / "turned.jpg").write_bytes(encode(corner_picture(), "JPEG", exif=exif))
    row = GOOD | {"image": "turned.jpg", "boxes": [[20, 0, 30, 10], [0, 0, 30, 40]]}
    example = load_examples(write_jsonl(folder, row))[0]
    assert example["image"].size == (HEIGHT, WIDTH)
    assert min(example["image"].getpixel((25, 4))) > 200
    assert max(example["image"].getpixel((4, 4))) < 50
    with pytest.raises(DataError, match="30 x 40"):
        load_examples(write_jsonl(folder, row | {"boxes": [[0, 0, 40, 30]]}))


def palette_with_transparency() -> bytes:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    return encode(picture, "PNG", transparency=0)


def half_transparent() -> bytes:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 255))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    return encode(picture, "PNG")


def gray_with_alpha() -> bytes:
    picture = Image.new("LA", (4, 4), (0, 0))
    picture.putpixel((1, 0), (90, 255))
    return encode(picture, "PNG")


def gray_16_bit(kind: str) -> bytes:
    picture = Image.new("I;16", (4, 4), 0)
    picture.putpixel((1, 0), 65535)
    picture.putpixel((2, 0), 128 * 257)
    return encode(picture, kind)


PICTURES = [
    # kind, encoded picture, RGB of the pixels (0, 0), (1, 0), (2, 0) and how far off they may be
    ("palette", palette_with_transparency(), [(255, 255, 255), (200, 0, 0), (255, 255, 255)], 0),
    ("RGBA", half_transparent(), [(255, 255, 255), (200, 0, 0), (127, 127, 127)], 1),
    ("gray and alpha", gray_with_alpha(), [(255, 255, 255), (90, 90, 90), (255, 255, 255)], 0),
    ("16-bit PNG", gray_16_bit("PNG"), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("16-bit TIFF", gray_16_bit("TIFF"), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("gray", encode(Image.new("L", (4, 4), 77), "PNG"), [(77, 77, 77)] * 3, 0),
    ("1 bit", encode(Image.new("1", (4, 4), 1), "PNG"), [(255, 255, 255)] * 3, 0),
    ("CMYK", encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 3, 4),
    ("GIF", encode(Image.new("RGB", (4, 4), "lime"), "GIF"), [(0, 255, 0)] * 3, 0),
]


@pytest.mark.parametrize(("encoded", "colors", "tolerance"), [pytest.param(*case[1:], id=case[0]) for case in PICTURES])
def test_every_kind_of_picture_becomes_rgb(tmp_path, encoded, colors, tolerance):
    (tmp_path / "picture").write_bytes(encoded)
    path = tmp_path / "picture"
    for source in (path, str(path), encoded, {"bytes": encoded, "path": None}, {"bytes": None, "path": str(path)}):
        picture = load_picture(source)
        assert picture.mode == "RGB"
        seen = [picture.getpixel((x, 0)) for x in range(3)]
        off = [abs(a - b) for pixel, color in zip(seen, colors, strict=True) for a, b in zip(pixel, color, strict=True)]
        assert max(off) <= tolerance, seen


def test_decoded_picture_is_copied_not_changed():
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert load_picture(picture).getpixel((0, 0)) == (255, 255, 255)
    assert picture.mode == "RGBA"
    original = Image.new("RGB", (4, 4))
    load_picture(original).putpixel((0, 0), (9, 9, 9))
    assert original.getpixel((0, 0)) == (0, 0, 0)


def test_opened_picture_stays_open(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "two.gif") as picture:
        assert load_picture(picture).getpixel((0, 0)) == (255, 0, 0)
        picture.seek(1)
        assert load_picture(picture).getpixel((0, 0)) == (0, 0, 255)


def test_relative_path_counts_from_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_picture("a.png").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("gone.png", ["gone.png", "no such file"]),
        ({"bytes": b"nonsense", "path": None}, ["in memory", "cannot be read", "cannot identify"]),
        ({"bytes": None, "path": None}, ["picture {'bytes': None", "path"]),
        ("", ["picture ''", "path"]),
        (None, ["picture None", "path"]),
        (Image.new("F", (4, 4)), ["floating-point", "8 or 16 bits"]),
    ],
)
def test_picture_that_cannot_be_loaded(image, words):
    with pytest.raises(DataError) as raised:
        load_picture(image)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_picture_that_no_processor_takes_is_named(tmp_path):
    """Qwen's processors refuse sides of more than 200 to 1, and said so in the middle of a run."""
    Image.new("RGB", (1000, 3)).save(tmp_path / "long.png")
    row = {"image": "long.png", "question": "Where?", "answer": "there", "boxes": [[0, 0, 5, 2]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="1000 x 3 pixels.*200"):
        load_examples(str(tmp_path / "rows.jsonl"))
