"""Picture and mask files: where they may lie, and what is in them, decoded and turned as a viewer shows them."""

import io
import os
import re
import shlex
import stat
import threading
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sayo.settings import UserError

LONGEST_TO_SHORTEST = 200  # ratio of the sides; Qwen's processors refuse more
MAX_PIXELS = 178_956_970  # Pillow's own limit; it warns from half of that
LARGE = 2**25  # pixels; only one picture of this size is decoded at a time, to bound memory
# Pillow reads more formats, among them EPS, by running Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS += ("AVIF", "JPEG2000", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Modes that always convert to RGB, so measuring need not try.
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L", "I;16N")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")  # http://, file://, hf://, zip://, data:image/png;base64,...
MAX_REMEMBERED = 10_000  # folders whose real path is cached
MAX_NAMED = 3  # folders in a hint; of more, only the one that holds them all

# A larger picture is a DataError here; the warning would only be noise.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_decoding_large = threading.Lock()


class DataError(UserError):
    """Data that cannot be used; the message names the value, what is valid, and the fix."""


def load_picture(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode the first frame of a picture to RGB, with its EXIF orientation applied and transparency on white.

    `image` is a path (relative to the working directory), an encoded picture, a PIL picture, or {"bytes", "path"},
    whose path counts when there are no bytes. 16-bit grayscale is scaled to 8 bits. Raises DataError with the path and
    the reason when there is no such file, or when Pillow cannot decode all of it.
    """
    return _read(image, "picture", lambda opened: _to_rgb(ImageOps.exif_transpose(opened)))


def measure_picture(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels as load_picture returns it, with its DataErrors, at a fraction of the cost.

    Only decoding all of a file shows that it is truncated; a JPEG is decoded in gray at an eighth of its size. Raises
    DataError also for a picture that is too long for its width.
    """
    width, height = _read(image, "picture", _measure)
    if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
        size = f"picture of {width} x {height} pixels"
        raise DataError(f"{size} is longer than {LONGEST_TO_SHORTEST} times its width; crop it")
    return width, height


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
                return use(opened)
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


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # convert() would clip everything above 255 to white
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    elif picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def _measure(opened: Image.Image) -> tuple[int, int]:
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
    turned = opened.format != "TIFF" and opened.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (height, width) if turned else (width, height)


def _to_mask(opened: Image.Image) -> Image.Image:
    if opened.format in ("JPEG", "MPO"):
        raise ValueError("JPEG leaves gray specks on black, which would count as region; save it as PNG")
    picture = ImageOps.exif_transpose(opened)
    if picture.mode not in ("1", "L", "F") and not picture.mode.startswith("I"):
        picture = picture.convert("RGBA")
    pixels = np.asarray(picture)  # (height, width) or (height, width, 4)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].any(-1) & (pixels[..., 3] > 0)
    return Image.fromarray((pixels != 0).astype(np.uint8) * 255)


class DataFolder:
    """The folder that relative paths in a dataset count from, and the folders that its files must lie in.

    A link counts as the file it points to. A snapshot in the Hub's cache is allowed to link into the `blobs` beside it.

    path      the dataset's own folder
    allowed   further folders (--allowed_folders)
    caches    where `datasets` keeps what it downloads or unpacks
    """

    def __init__(self, path: Path, allowed: Iterable[str] = (), caches: Iterable[str] = ()):
        self.path = path
        own = path.absolute()
        roots = [own, *map(os.path.expanduser, allowed), *caches]
        for inner in (own, *own.parents):
            blobs = inner.parent.parent / "blobs"
            if inner.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
                roots.append(blobs)
        self._refused: dict[str, None] = {}
        self._real_folder = lru_cache(MAX_REMEMBERED)(os.path.realpath)
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def resolve(self, kind: str, path: str) -> str:
        """The full path of a file. Raises DataError, beginning with `kind`, when it lies outside."""
        if ADDRESS.match(path):
            raise DataError(f"{kind} {path!r:.100} is not a file; save it as one and write its path")
        try:
            full = os.path.join(self.path, path)
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
