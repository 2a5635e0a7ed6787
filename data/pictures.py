"""Pictures and masks as people have them: decoded, turned as a viewer shows them, or only measured and checked."""

import io
import os
import stat
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

LONGEST_TO_SHORTEST = 200  # sides of a picture; Qwen's processors refuse more
MAX_PIXELS = 178_956_970  # area of a picture; Pillow's own limit, at half of which it warns
LARGE = 2**25  # pixels; threads decode such pictures one at a time, or several would not fit in memory
# Formats of photographs, drawings and masks; Pillow knows more, and opens EPS by running Ghostscript on it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS += ("AVIF", "JPEG2000", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Modes that load_picture turns into RGB whatever their pixels are, so that measuring need not try.
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L", "I;16N")

# A picture beyond MAX_PIXELS is a DataError here, a warning in addition would only be noise.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_decoding_large = threading.Lock()


class DataError(ValueError):
    """Data that cannot be used; the message names the value, what is valid, and the fix."""


def load_picture(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode a picture to RGB, turned as its EXIF orientation says, transparent parts on white; one frame.

    `image` is a path (a relative one counts from the working directory), an encoded picture, a PIL picture, or
    {"bytes", "path"}, where the path is used when there are no bytes. 16-bit grayscale is scaled to 8 bits.

    Raises DataError with the path and the reason when there is no such file or Pillow cannot decode all of it.
    """
    return _read(image, "picture", lambda opened: _to_rgb(ImageOps.exif_transpose(opened)))


def measure_picture(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels of what load_picture gives, and its DataError, at a fraction of the cost.

    All of the file is decoded, because only that finds a truncated one, but a JPEG at an eighth of its size and in
    gray. Raises DataError for a picture that is too long for its width, too.
    """
    width, height = _read(image, "picture", _measure)
    if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
        raise DataError(
            f"picture of {width} x {height} pixels is longer than {LONGEST_TO_SHORTEST} times its width; crop it"
        )
    return width, height


def picture_size(image: str | Path | bytes | dict) -> tuple[int, int]:
    """What measure_picture gives, from the header alone: for pictures that were measured before."""
    return _read(image, "picture", _size_as_shown)


def load_mask(image: str | Path | bytes | Image.Image | dict) -> Image.Image:
    """Decode a mask to "L": 255 where it is neither black nor wholly transparent, 0 elsewhere; turned by EXIF.

    Raises DataError like load_picture, and for a JPEG.
    """
    return _read(image, "mask", _to_mask)


def measure_mask(image: str | Path | bytes | dict) -> tuple[int, int]:
    """(width, height) in pixels of what load_mask gives. Raises its DataError, and one for a mask that is all black."""
    mask = load_mask(image)
    if mask.getbbox() is None:
        raise DataError(f"mask {_name(_content(image))} is black all over; paint the region white, or write null")
    return mask.size


def _content(image):
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image


def _name(content) -> str:
    return f"{str(content)!r:.200}" if isinstance(content, str | Path) else "in memory"


def _read(image, kind: str, use):
    """What `use` makes of the opened picture; whatever goes wrong there becomes a DataError that begins with `kind`."""
    content = _content(image)
    if not content or not isinstance(content, str | Path | bytes | Image.Image):
        raise DataError(f'{kind} {image!r:.200} is neither a path nor {{"bytes", "path"}}; write the path of a file')
    name = _name(content)
    try:
        with nullcontext(content) if isinstance(content, Image.Image) else open_picture(content) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                area = f"{opened.width} x {opened.height} = {opened.width * opened.height}"
                raise Image.DecompressionBombError(f"it has {area} pixels")
            with _decoding_large if opened.width * opened.height > LARGE else nullcontext():
                return use(opened)
    except FileNotFoundError as error:
        raise DataError(f"{kind} {name}: there is no such file; correct the path or add the file") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{kind} {name} is too large: {error}; shrink it to {MAX_PIXELS} pixels or less") from error
    except UnidentifiedImageError as error:  # its message shows an object's address for what is in memory
        raise DataError(
            f"{kind} {name} cannot be read: cannot identify its format; replace the file by a picture in one of "
            f"{', '.join(FORMATS[:7])}"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything: SyntaxError, struct.error, EOFError, ...
        raise DataError(f"{kind} {name} cannot be read: {error!s:.200}; replace the file") from error


def open_picture(content: str | Path | bytes) -> Image.Image:
    """The picture in a file or in bytes, its pixels not yet decoded."""
    if not isinstance(content, bytes):
        mode = os.stat(content).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a pipe or a terminal may never end
            raise ValueError("it is a pipe or a device")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # convert() would cut everything above 255 off to white
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    elif picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def _measure(opened: Image.Image) -> tuple[int, int]:
    size = None
    if opened.format in ("JPEG", "MPO"):
        size = opened.size  # draft changes it
        opened.draft("L", (max(1, size[0] // 8), max(1, size[1] // 8)))
    opened.load()
    if opened.mode not in PLAIN_MODES:
        _to_rgb(opened)
    return _size_as_shown(opened, size or opened.size)


def _size_as_shown(opened: Image.Image, size: tuple[int, int] | None = None) -> tuple[int, int]:
    width, height = size or opened.size
    # Pillow turns a TIFF by itself, and says the size after that.
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
