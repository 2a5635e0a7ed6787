"""Picture and mask files: where they may lie, and what is in them, decoded and turned as a viewer shows them."""

import base64
import hashlib
import io
import os
import re
import shlex
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sayo.settings import UserError

LONGEST_TEXT = 2**26  # bytes of text in a PNG
LONGEST_TO_SHORTEST = 200  # ratio of the sides; Qwen's processors refuse more
MAX_PIXELS = 178_956_970  # Pillow's own limit; it warns from half of that
STRIP = 2**22  # pixels that are converted at a time
LARGE = 2**25  # pixels; only one picture of this size is decoded at a time, to bound memory
# Pillow reads more formats, among them EPS, by running Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS += ("AVIF", "JPEG2000", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Modes that always convert to RGB, so measuring need not try.
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
BASE64 = re.compile(
    r"data:image/[\w.+-]+;base64,|(?=iVBORw0KGgo|/9j/|UklGR|R0lGOD|Qk[0-3]|SUkq|TU0A)"
)  # or a picture's start
JPEG_END = b"\xff\xd9"
# Bytes that a decoder takes for pixels.
JPEG_FILLERS = [hashlib.shake_256(seed).digest(2000).replace(b"\xff", b"") for seed in (b"1", b"2", b"3")]
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")  # http://, file://, hf://, zip://, data:image/png;base64,...
MAX_REMEMBERED = 10_000  # folders whose real path is cached
MAX_NAMED = 3  # folders in a hint; of more, only the one that holds them all

# A larger picture is a DataError here; the warning would only be noise.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Generators write their workflow into a PNG; Pillow refuses a megabyte of text or of color profile.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = LONGEST_TEXT
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_decoding_large = threading.Lock()


class DataError(UserError):
    """Data that cannot be used; the message names the value, what is valid, and the fix."""


def load_picture(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode the first frame of a picture to RGB, with its EXIF orientation applied and transparency on white.

    `image` is a path (relative to the working directory), an encoded picture, a PIL picture, or {"bytes", "path"},
    whose path counts when there are no bytes. Grayscale of 12, 16 or 32 bits is scaled to 8 bits. At most 12 bytes per
    pixel are in memory. Raises DataError with the path and the reason when there is no such file, or when Pillow cannot
    decode all of it.
    """
    return _read(image, "picture", _to_rgb)


def measure_picture(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels as load_picture returns it, with its DataErrors, at a fraction of the cost.

    Only decoding all of a file shows that it is truncated; a JPEG is decoded in gray at an eighth of its size. Raises
    DataError also for a picture that is too long for its width.
    """
    return _read(image, "picture", _measure)


def picture_size(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels from the header alone, for pictures that were measured before."""
    return _read(image, "picture", _size_as_shown)


def load_mask(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode a mask to "L", 0 where it is black or fully transparent and 255 elsewhere, with EXIF orientation applied.

    Raises DataError like load_picture, and for a JPEG.
    """
    return _read(image, "mask", _to_mask)


def measure_mask(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels as load_mask returns it, with its DataErrors. An all-black mask is one, too."""
    mask = load_mask(image)
    if mask.getbbox() is None:
        raise DataError(f"mask {_name(_content(image))} is black all over; paint the region white, or write null")
    return mask.size


def picture_in(text: str) -> bytes | None:
    """The picture that a text holds in base64, or as a data: address; None where it is a path."""
    start = BASE64.match(text)
    encoded = "".join(text[start.end() :].split()) if start else ""
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True) if len(encoded) > 40 else None
    except ValueError:
        return None


def _content(image):
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image


def _name(content) -> str:
    return f"{str(content)!r:.200}" if isinstance(content, str | Path) else "in memory"


def _read(image, kind: str, use):
    """use(opened picture); every error becomes a DataError that begins with `kind`."""
    content = _content(image)
    if not content or not isinstance(content, str | Path | bytes | Image.Image):
        raise DataError(f'{kind} {image!r:.200} is neither a path nor {{"bytes", "path"}}; write the path of a file')
    name = _name(content)
    try:
        with nullcontext(content) if isinstance(content, Image.Image) else open_picture(content) as opened:
            area = opened.width * opened.height
            if area > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {opened.width} x {opened.height} = {area} pixels")
            with _decoding_large if area > LARGE else nullcontext():
                try:
                    return use(opened)
                except OSError:
                    if not (ended := _ended_jpeg(content, opened)):
                        raise
                with open_picture(ended) as opened:
                    return use(opened)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{kind} {name}: there is no such file; correct the path or add the file") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{kind} {name} is too large: {error}; shrink it to {MAX_PIXELS} pixels or less") from error
    except UnidentifiedImageError as error:  # its message holds an address for what is in memory
        fix = f"replace the file by a picture in one of {', '.join(FORMATS[:7])}"
        raise DataError(f"{kind} {name} cannot be read: cannot identify its format; {fix}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything: SyntaxError, struct.error, EOFError, ...
        raise DataError(f"{kind} {name} cannot be read: {error!s:.200}; replace the file") from error


def open_picture(content: str | Path | bytes) -> Image.Image:
    """The picture in a file or in bytes, not yet decoded."""
    if not isinstance(content, bytes):
        mode = os.stat(content).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a pipe or a terminal may never end
            raise ValueError("it is a pipe or a device")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)


def _ended_jpeg(content, opened: Image.Image) -> bytes | None:
    """A JPEG with its end mark, if that is all that its file lacks; viewers do not miss it."""
    if opened.format not in ("JPEG", "MPO") or isinstance(content, Image.Image):
        return None
    data = (content if isinstance(content, bytes) else Path(content).read_bytes()).rstrip(b"\xff")
    if data.endswith(b"\0\0\0\0") or not _has_all_scans(data):
        return None
    restarts, digests = re.findall(rb"\xff([\xd0-\xd7])", data), set()
    mark = bytes((0xFF, 0xD0 + (restarts[-1][0] + 1) % 8)) if restarts else b""
    for end in (b"", *JPEG_FILLERS, mark + JPEG_FILLERS[0]):  # where pixels are missing, it becomes some
        digest = hashlib.sha256()
        with open_picture(data + end + JPEG_END) as picture:
            for box in _strips(picture.size):
                digest.update(picture.crop(box).tobytes())
        digests.add(digest.digest())
    return data + JPEG_END if len(digests) == 1 else None


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG have the last bit of all coefficients; a progressive one can end after any scan."""
    marker, place, whole, components = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])"), 2, set(), 0
    while found := marker.search(data, place):
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        segment = data[found.end() + 2 : place]
        if found[1] in (b"\xc0", b"\xc1", b"\xc2"):
            components = segment[5]
        elif found[1] == b"\xda" and len(segment) >= 6:
            names, (first, last, bits) = segment[1:-3:2], segment[-3:]
            whole |= {(name, place) for name in names for place in range(first, last + 1) if bits % 16 == 0}
    return components > 0 and len(whole) == 64 * components


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _by_strips(mode: str, picture: Image.Image, convert: Callable) -> Image.Image:
    """convert(picture), of which only a strip is in memory more than once; turned by its EXIF orientation."""
    picture.load()  # Pillow turns a TIFF by itself
    if _orientation(picture) != 1:
        picture = ImageOps.exif_transpose(picture)
    converted = Image.new(mode, picture.size)
    for box in _strips(picture.size):
        converted.paste(convert(picture.crop(box)), box)
    return converted


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    white = _white(picture) if picture.mode.startswith("I") else 255

    def convert(part: Image.Image) -> Image.Image:
        if part.mode.startswith("I"):  # convert() would clip everything above 255 to white
            part = part.convert("I").point(lambda value: value * (255 / white)).convert("L")
        elif part.has_transparency_data:
            layer = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return part.convert("RGB")

    return _by_strips("RGB", picture, convert)


def _white(picture: Image.Image) -> int:
    """The value of white in gray pixels of more than 8 bits, which for 32 bits no file declares."""
    bits = picture.tag_v2.get(258, (16,))[0] if picture.format == "TIFF" else 16
    if bits != 32:
        return 4095 if bits == 12 else 65535
    lowest, highest = picture.getextrema()
    if lowest < 0 or highest > 65535:
        raise ValueError(f"32-bit pixels of {lowest} to {highest} have no fixed range; save it with 8 or 16 bits")
    return 255 if highest <= 255 else 65535


def _measure(opened: Image.Image) -> tuple[int, int]:
    if max(opened.size) > LONGEST_TO_SHORTEST * min(opened.size):
        size = f"picture of {opened.width} x {opened.height} pixels"
        raise DataError(f"{size} is longer than {LONGEST_TO_SHORTEST} times its width; crop it")
    jpeg_size = opened.size if opened.format in ("JPEG", "MPO") else None  # draft changes opened.size
    if jpeg_size:
        opened.draft("L", tuple(max(1, side // 8) for side in jpeg_size))
    opened.load()
    if opened.mode not in PLAIN_MODES:
        _to_rgb(opened)
    return _size_as_shown(opened, jpeg_size)


def _size_as_shown(opened: Image.Image, size: tuple[int, int] | None = None) -> tuple[int, int]:
    width, height = size or opened.size
    # Pillow turns a TIFF itself and reports the size after that.
    turned = opened.format != "TIFF" and _orientation(opened) in TURNED
    return (height, width) if turned else (width, height)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata in no order; a viewer shows the picture as it is
        return 1


def _to_mask(opened: Image.Image) -> Image.Image:
    if opened.format in ("JPEG", "MPO"):
        raise ValueError("JPEG leaves gray specks on black, which would count as region; save it as PNG")

    def convert(part: Image.Image) -> Image.Image:
        if part.mode not in ("1", "L", "F") and not part.mode.startswith("I"):
            part = part.convert("RGBA")
        pixels = np.asarray(part)  # (height, width) or (height, width, 4)
        if pixels.ndim == 3:
            pixels = pixels[..., :3].any(-1) & (pixels[..., 3] > 0)
        return Image.fromarray((pixels != 0).astype(np.uint8) * 255)

    return _by_strips("L", opened, convert)


class DataFolder:
    """The folder that relative paths in a dataset count from, and the folders that its files must lie in.

    A link counts as the file it points to. A snapshot in the Hub's cache is allowed to link into the `blobs` beside it.

    path      the dataset's own folder
    allowed   further folders (--allowed_folders)
    caches    where `datasets` keeps what it downloads or unpacks
    """

    def __init__(self, path: Path, allowed: Iterable[str] = (), caches: Iterable[str] = ()):
        self.path, self._places = path, [path]
        own = path.absolute()
        roots = [own, *map(os.path.expanduser, allowed), *caches]
        for inner in (own, *own.parents):
            blobs = inner.parent.parent / "blobs"
            if inner.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
                roots.append(blobs)
        self._refused: dict[str, None] = {}
        self._real_folder = lru_cache(MAX_REMEMBERED)(os.path.realpath)
        self._roots = tuple(os.path.realpath(root) for root in roots)

    @classmethod
    def of_file(cls, path: Path, allowed: Iterable[str] = ()) -> "DataFolder":
        """The folder of a data file and, where the file is a link, that of the file itself."""
        real = Path(os.path.realpath(path)).parent
        if not path.is_symlink() or real == Path(os.path.realpath(path.parent)):
            return cls(path.parent, allowed)
        folder = cls(path.parent, allowed, [str(real)])
        folder._places.append(real)
        return folder

    def resolve(self, kind: str, path: str) -> str:
        """The full path of a file. Raises DataError, beginning with `kind`, when it lies outside."""
        if ADDRESS.match(path):
            raise DataError(f"{kind} {path!r:.100} is not a file; save it as one and write its path")
        try:
            spelled = dict.fromkeys((path, path.replace("\\", "/")))  # as Windows writes it
            full, *others = (os.path.join(place, name) for name in spelled for place in self._places)
            if others and not os.path.exists(full):
                full = next(filter(os.path.exists, others), full)
            real = self._real(full)
        except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
            raise DataError(f"{kind} {path!r:.200} cannot be read: {error!s:.200}; correct the path") from error
        if not any(real == root or real.startswith(os.path.join(root, "")) for root in self._roots):
            self._refused[os.path.dirname(real)] = None
            to = f" (it is {real!r:.200})" if real != path else ""
            raise DataError(
                f"{kind} {path!r:.200}{to} lies outside of {str(self.path)!r:.200}; move it there, or, where you trust "
                "the data, allow its folder by --allowed_folders"
            )
        return full

    def _real(self, full: str) -> str:
        """os.path.realpath, with the real paths of folders cached."""
        folder, name = os.path.split(full)
        if name in ("", ".", ".."):
            return os.path.realpath(full)
        real = os.path.join(self._real_folder(folder), name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def hint(self) -> str:
        """The flag that allows every file that was refused; "" when none was."""
        folders = list(self._refused)
        if len(folders) > MAX_NAMED and (common := os.path.commonpath(folders)) != os.path.dirname(common):
            folders = [common]
        return f"--allowed_folders {shlex.join(folders[:MAX_NAMED])}" if folders else ""
