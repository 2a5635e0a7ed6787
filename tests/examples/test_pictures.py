"""Every kind of picture becomes RGB, turned as a viewer shows it."""

import base64
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
from PIL import ExifTags, Image, PngImagePlugin

from sayo.examples.load import load_examples
from sayo.examples.pictures import MAX_PIXELS, DataError, load_mask, load_picture, measure_picture, picture_size


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


def gray_tiff(pixels: list[int], bits: int = 32) -> bytes:
    """A 4 x 4 picture of these pixels, then zeros."""
    if bits == 32:
        return encode(Image.fromarray(np.array([*pixels, *[0] * (16 - len(pixels))], np.int32).reshape(4, 4)), "TIFF")
    packed = int("".join(f"{pixel:0{bits}b}" for pixel in [*pixels, *[0] * (16 - len(pixels))]), 2).to_bytes(2 * bits)
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(packed)}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("lime", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


PICTURES = [  # kind, encoded picture, RGB of the pixels (0, 0), (1, 0), (2, 0), tolerance
    ("palette", painted("P", [1], transparency=0), [(255, 255, 255), (200, 0, 0), (255, 255, 255)], 0),
    ("RGBA", painted("RGBA", [(200, 0, 0, 255), (0, 0, 0, 128)]), [(255,) * 3, (200, 0, 0), (127,) * 3], 1),
    ("gray and alpha", painted("LA", [(90, 255)]), [(255, 255, 255), (90, 90, 90), (255, 255, 255)], 0),
    ("16-bit PNG", painted("I;16", [65535, 128 * 257]), [(0, 0, 0), (255, 255, 255), (128, 128, 128)], 1),
    ("16-bit TIFF", painted("I;16", [65535, 128 * 257], "TIFF"), [(0,) * 3, (255,) * 3, (128,) * 3], 1),
    ("32-bit TIFF of 8 bits", gray_tiff([0, 255, 128]), [(0,) * 3, (255,) * 3, (128,) * 3], 0),
    ("32-bit TIFF of 16 bits", gray_tiff([0, 65535, 128 * 257]), [(0,) * 3, (255,) * 3, (128,) * 3], 1),
    ("12-bit TIFF", gray_tiff([0, 4095, 2048], 12), [(0,) * 3, (255,) * 3, (127,) * 3], 1),
    ("dark 16-bit PNG", painted("I;16", [255, 257]), [(0,) * 3, (0,) * 3, (1,) * 3], 0),
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
    *[(gray_tiff(pixels), "32-bit pixels.*8 or 16 bits") for pixels in ([0, 65536], [-1, 255])],
    *[(image, "floating-point.*8 or 16 bits") for image in (FLOATS, encode(FLOATS, "TIFF"))],
]


@pytest.mark.parametrize(("image", "words"), UNLOADABLE)
def test_picture_that_cannot_be_loaded(image, words):
    for read in (load_picture, measure_picture):
        with pytest.raises(DataError, match=words):
            read(image)


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


ENDED = {  # JPEGs as cameras and programs write them
    "one scan": {}, "gray": {}, "progressive": {"progressive": True}, "colors as they are": {"subsampling": 0},
    "restart marks": {"restart_marker_rows": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDED)
def test_a_jpeg_without_its_end_mark_is_whole_and_one_that_lacks_pixels_is_not(tmp_path, kind):
    noise = Image.effect_noise((83, 61), 60)
    file = encode(noise if kind == "gray" else noise.convert("RGB"), "JPEG", **ENDED[kind])
    for cut in (1, 2):
        (tmp_path / "a.jpg").write_bytes(file[:-cut])
        for source in (file[:-cut], tmp_path / "a.jpg"):
            assert load_picture(source) == load_picture(file) and measure_picture(source) == (83, 61)
    scans = [found.start() for found in re.finditer(b"\xff\xda", file)]  # the files of these settings have no thumbnail
    lacking = [file[:-cut] for cut in (*range(4, 90, 5), *range(100, 1000, 97))] + [file[:scan] for scan in scans]
    lacking += [file[: len(file) // 2] + bytes(20), file[:-200] + bytes(9)] if "restart" in kind else []
    for damaged in lacking:
        assert "cannot be read" in verdict(load_picture, damaged) and "cannot be read" in verdict(
            measure_picture, damaged
        )


def with_text(count: int, size: int, **options) -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(count):
        info.add_text(f"key {number}", "x" * size, **options)
    return encode(NOISE, "PNG", pnginfo=info)


JUNK_EXIF = b"Exif\0\0" + b"x" * 2_000_000
METADATA = {  # encoded picture, whether it is read
    "a workflow": (with_text(1, 3_000_000, zip=True), True), "many texts": (with_text(3000, 10_000), True),
    "a color profile": (encode(NOISE, "PNG", icc_profile=bytes(range(250)) * 20_000), True),
    "a color profile, JPEG": (encode(NOISE, "JPEG", icc_profile=bytes(range(250)) * 10_000), True),
    "XMP, WebP": (encode(NOISE.convert("RGB"), "WEBP", xmp=b"x" * 3_000_000), True),
    "damaged EXIF, WebP": (encode(NOISE.convert("RGB"), "WEBP", exif=JUNK_EXIF), True),
    "a description, TIFF": (encode(NOISE, "TIFF", description="d" * 3_000_000), True),
    "a bomb of text": (with_text(1, 80_000_000, zip=True), False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", METADATA)
def test_a_picture_with_much_beside_it_is_read(kind):
    file, is_read = METADATA[kind]
    for read in (load_picture, measure_picture):
        assert (verdict(read, file) == "good") == is_read
    assert is_read or "MAX_TEXT" in verdict(load_picture, file)


def test_a_large_picture_is_the_same_in_strips(monkeypatch):
    """For every mode and orientation; only a strip of the picture is in memory more than once."""
    cases = [case[1] for case in PICTURES] + [png(9, 7, 7)]
    for orientation in VIEWERS:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        cases.append(encode(Image.effect_noise((37, 23), 90).convert("RGBA"), "PNG", exif=exif))
    pairs = [(load_picture, case) for case in cases]
    pairs += [(load_mask, case) for case in cases if not case.startswith(b"\xff\xd8")]  # no JPEG
    whole = [read(case).tobytes() for read, case in pairs]
    monkeypatch.setattr("sayo.examples.pictures.STRIP", 7)
    assert [read(case).tobytes() for read, case in pairs] == whole


def test_a_large_picture_takes_bounded_memory(tmp_path):
    """24 megapixels with transparency, 3 kB on the disk: 8 bytes a pixel, where it was 20."""
    side = 4900
    palette = [(b"PLTE", bytes(6)), (b"tRNS", b"\0\xff")]
    (tmp_path / "a.png").write_bytes(png(side, side, side, color=3, chunks=palette))
    code = "import resource, sys\nfrom sayo.examples import pictures\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ngetattr(pictures, sys.argv[1])(sys.argv[2])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    for read in ("load_picture", "load_mask"):
        command = [sys.executable, "-c", code, read, str(tmp_path / "a.png")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(run.stdout) * 1024 < 10 * side**2


def data_address(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def test_pictures_in_base64(folder):
    """As text, with line ends, without the padding, as an address, in a list, under bytes, and as a mask."""
    files = [FILES["PNG"], FILES["JPEG"], FILES["WebP"], FILES["GIF"], FILES["TIFF"], encode(NOISE, "BMP")]
    for file in files:
        plain = base64.b64encode(file).decode()
        for text in (plain, base64.encodebytes(file).decode(), plain.rstrip("="), data_address(file, "any")):
            for image in (text, [text], {"bytes": text, "path": None}):
                (example,) = load_examples(write_jsonl(folder, GOOD | {"image": image, "boxes": [[1, 1, 9, 9]]}))
                assert example["image"] == load_picture(file)
    mask = data_address((folder / "a.png").read_bytes())
    (example,) = load_examples(write_jsonl(folder, GOOD | {"mask": mask}))
    assert example["masks"][0].getextrema() == (255, 255)
    (folder / "iVBORw0KGgo").write_bytes(FILES["PNG"])  # a name
    assert len(load_examples(write_jsonl(folder, GOOD | {"image": "iVBORw0KGgo"}))) == 1


def png(width: int, height: int, rows: int, color: int = 0, chunks: list = ()) -> bytes:
    """A 1-bit PNG of any size, all black, that holds only so many of its rows; nothing of that size is in memory."""
    packer, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
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
