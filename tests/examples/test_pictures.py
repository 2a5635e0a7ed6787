"""Every kind of picture becomes RGB, turned as a viewer shows it."""

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import GOOD, HEIGHT, WIDTH, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sayo.examples.load import load_examples
from sayo.examples.pictures import MAX_PIXELS, DataError, load_picture, measure_picture, picture_size


def corner_picture(size=(WIDTH, HEIGHT)) -> Image.Image:
    """Black with a white square at the top left."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    return picture


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# What a viewer does with the stored picture, as NumPy says it; rows come first.
VIEWERS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", VIEWERS)
def test_every_orientation_is_shown_as_a_viewer_does(folder, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(corner_picture(), kind, exif=exif)
    assert picture_size(file) == measure_picture(file) == load_picture(file).size
    (folder / "turned").write_bytes(file)
    shown = VIEWERS[orientation](np.asarray(corner_picture()))  # (height, width, 3)
    rows, columns = shown[..., 0].any(1).nonzero()[0], shown[..., 0].any(0).nonzero()[0]
    box = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
    height, width = shown.shape[:2]
    Image.fromarray(shown).save(folder / "mask.png")
    corner_picture().save(folder / "turned.png", exif=exif)
    row = GOOD | {"image": "turned", "boxes": [box, [0, 0, width, height]]}
    example, turned = load_examples(write_jsonl(folder, row | {"mask": "mask.png"}, row | {"mask": "turned.png"}))
    assert np.array_equal(np.asarray(turned["masks"][0]), shown[..., 0])
    assert example["image"].size == (width, height)
    assert np.abs(np.asarray(example["image"], dtype=int) - shown).max() < 100
    inside = np.asarray(example["image"].crop(box))
    assert inside.mean() > 250 and np.asarray(example["image"], dtype=int).sum() < 1.05 * inside.sum()
    assert np.array_equal(np.asarray(example["masks"][0]), shown[..., 0])
    with pytest.raises(DataError, match=f"{width} x {height}"):
        load_examples(write_jsonl(folder, row | {"boxes": [[0, 0, height, width]]}))


def painted(mode: str, pixels: list, kind: str = "PNG", **options) -> bytes:
    """A 4 x 4 picture, all zeros but for the pixels (1, 0), (2, 0), ...; a palette is black and dark red."""
    picture = Image.new(mode, (4, 4), (0,) * len(mode) if mode in ("LA", "RGBA") else 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 0, 0])
    for x, pixel in enumerate(pixels, 1):
        picture.putpixel((x, 0), pixel)
    return encode(picture, kind, **options)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("lime", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


PICTURES = [  # kind, encoded picture, RGB of the pixels (0, 0), (1, 0), (2, 0), tolerance
    ("palette", painted("P", [1], transparency=0), [(255, 255, 255), (200, 0, 0), (255, 255, 255)], 0),
    ("RGBA", painted("RGBA", [(200, 0, 0, 255), (0, 0, 0, 128)]), [(255,) * 3, (200, 0, 0), (127,) * 3], 1),
    ("gray and alpha", painted("LA", [(90, 255)]), [(255, 255, 255), (90, 90, 90), (255, 255, 255)], 0),
    ("16-bit PNG", painted("I;16", [65535, 128 * 257]), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("16-bit TIFF", painted("I;16", [65535, 128 * 257], "TIFF"), [(0,) * 3, (255,) * 3, (128,) * 3], 1),
    ("gray", encode(Image.new("L", (4, 4), 77), "PNG"), [(77, 77, 77)] * 3, 0),
    ("1 bit", encode(Image.new("1", (4, 4), 1), "PNG"), [(255, 255, 255)] * 3, 0),
    ("CMYK", encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 3, 4),
    ("GIF", encode(Image.new("RGB", (4, 4), "lime"), "GIF"), [(0, 255, 0)] * 3, 0),
    ("animated GIF", animated("GIF"), [(0, 255, 0)] * 3, 0),
    ("animated PNG", animated("PNG"), [(0, 255, 0)] * 3, 0),
    ("animated WebP", animated("WEBP"), [(0, 255, 0)] * 3, 4),
    ("WebP", encode(Image.new("RGB", (4, 4), "red"), "WEBP", lossless=True), [(255, 0, 0)] * 3, 0),
    ("progressive JPEG", encode(Image.new("RGB", (4, 4), "red"), "JPEG", progressive=True), [(255, 0, 0)] * 3, 4),
    ("gray JPEG", encode(Image.new("L", (4, 4), 77), "JPEG"), [(77, 77, 77)] * 3, 1),
    ("CMYK TIFF", encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)] * 3, 0),
    ("LAB TIFF", encode(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"), [(255, 255, 255)] * 3, 2),
    ("BMP", encode(Image.new("RGB", (4, 4), "red"), "BMP"), [(255, 0, 0)] * 3, 0),
]


@pytest.mark.parametrize(("encoded", "colors", "tolerance"), [pytest.param(*case[1:], id=case[0]) for case in PICTURES])
def test_every_kind_of_picture_becomes_rgb(tmp_path, encoded, colors, tolerance, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "picture"
    path.write_bytes(encoded)
    for source in ("picture", path, encoded, {"bytes": encoded, "path": None}, {"bytes": None, "path": str(path)}):
        picture = load_picture(source)
        assert picture.mode == "RGB"
        seen = [picture.getpixel((x, 0)) for x in range(3)]
        off = [abs(a - b) for pixel, color in zip(seen, colors, strict=True) for a, b in zip(pixel, color, strict=True)]
        assert max(off) <= tolerance, seen
        assert measure_picture(source) == picture.size == (4, 4)


def test_an_opened_picture_is_copied_and_stays_open():
    for mode in ("RGB", "RGBA"):
        original = Image.new(mode, (4, 4))
        load_picture(original).putpixel((0, 0), (9, 9, 9))
        assert original == Image.new(mode, (4, 4))
    with Image.open(io.BytesIO(animated("GIF"))) as picture:
        assert load_picture(picture).getpixel((0, 0)) == (0, 255, 0)
        picture.seek(1)
        assert load_picture(picture).getpixel((0, 0)) == (0, 0, 255)


FLOATS = Image.new("F", (4, 4), 0.5)
UNLOADABLE = [
    ("gone.png", "gone.png.*no such file"),
    ({"bytes": b"nonsense", "path": None}, "in memory cannot be read: cannot identify"),
    *[(image, f"picture {re.escape(repr(image))}.*path") for image in ({"bytes": None, "path": None}, "", None)],
    *[(image, "floating-point.*8 or 16 bits") for image in (FLOATS, encode(FLOATS, "TIFF"))],
]


@pytest.mark.parametrize(("image", "words"), UNLOADABLE)
def test_picture_that_cannot_be_loaded(image, words):
    with pytest.raises(DataError, match=words):
        load_picture(image)


NOISE = Image.effect_noise((40, 30), 90)
FILES = {
    "JPEG": encode(Image.effect_noise((161, 83), 90), "JPEG"),
    "progressive JPEG": encode(Image.effect_noise((161, 83), 90).convert("RGB"), "JPEG", progressive=True),
    "WebP": encode(NOISE.convert("RGB"), "WEBP"),
    "TIFF": encode(NOISE, "TIFF", compression="tiff_lzw"),
} | {kind: encode(NOISE, kind) for kind in ("PNG", "GIF")}


def verdict(read, file: bytes) -> str:
    try:
        read(file)
    except DataError as error:
        return str(error)
    return "good"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@given(st.sampled_from(list(FILES)), st.floats(0, 1))
def test_measuring_finds_the_truncated_files_that_loading_does(kind, share):
    file = FILES[kind][: 1 + int(share * (len(FILES[kind]) - 1))]
    assert verdict(measure_picture, file) == verdict(load_picture, file)
    if share < 0.9:
        assert verdict(measure_picture, file) != "good"


@given(st.sampled_from(list(FILES)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=5))
def test_measuring_finds_the_damaged_files_that_loading_does(kind, changes):
    file = bytearray(FILES[kind])
    for place, byte in changes:
        file[place % len(file)] = byte
    read = {"measured": verdict(measure_picture, bytes(file)), "loaded": verdict(load_picture, bytes(file))}
    assert (read["measured"] == "good") <= (read["loaded"] == "good"), read


def png(width: int, height: int, rows: int) -> bytes:
    """A 1-bit PNG of any size, all black, that holds only so many of its rows; nothing of that size is in memory."""
    packer, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    parts = [(struct.pack(">I", len(body)), name + body) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(size + part + struct.pack(">I", zlib.crc32(part)) for size, part in parts)


def test_large_pictures_are_read_up_to_the_limit():
    width = int(MAX_PIXELS**0.5)
    assert measure_picture(png(width, width, width)) == (width, width)


@pytest.mark.parametrize("side", [13_500, 60_000])
def test_decompression_bomb_is_one_clear_error(tmp_path, side):
    """In a process of its own: pytest has its own filters of warnings."""
    (tmp_path / "bomb.png").write_bytes(png(side, side, 1))
    for read in ("load_picture", "measure_picture"):
        code = f"from sayo.examples import pictures\ntry: pictures.{read}({str(tmp_path / 'bomb.png')!r})\n"
        code += "except pictures.DataError as error: print(error)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stderr == ""
        assert re.search(f"bomb.png' is too large: .*{side**2}.* shrink it to {MAX_PIXELS}", run.stdout), run.stdout
