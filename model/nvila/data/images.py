"""Reading images: any common file, array or Pillow image becomes an upright 8-bit RGB image, or a typed error.

Files come from users. What a header claims is checked before anything is decoded, formats that run programs or that
nobody sends (EPS, WMF ...) are not opened, and whatever a decoder raises on damaged bytes becomes a `DataError` that
names the file.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

from nvila.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray[Any, Any]"

logger = logging.getLogger(__name__)

# Read by libraries alone. Pillow would hand EPS to Ghostscript and WMF to Windows.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
WHITE = (255, 255, 255)

# All that Pillow's decoders were seen to raise on damaged files, besides its own errors, which are OSErrors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
_LEVELS_16 = 65535
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is read.

    Args:
        max_pixels: Width times height; the default is where Pillow itself begins to warn. Decoding needs about seven
            bytes a pixel.
        max_bytes: Size of the encoded file.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 256 * 2**20

    def check_pixels(self, width: int, height: int, where: str) -> None:
        """Refuse an image of `width` x `height`.

        Raises:
            DataError: It has no pixels or too many.
        """
        if width < 1 or height < 1:
            raise DataError(f"{where} has no pixels ({width}x{height})", "leave empty images out")
        if width * height > self.max_pixels:
            raise DataError(
                f"{where} has {width}x{height} pixels, more than {self.max_pixels:,}",
                "scale it down, or raise max_pixels for files that you trust",
            )


DEFAULT_LIMITS = ImageLimits()


def load_image(
    source: ImageSource, *, max_pixels: int | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Read an image as upright RGB.

    Turned as its EXIF orientation says. 16-bit levels are scaled to 8; transparent pixels are laid on white, because
    formats store any colour, often black, under them. Of an animation the first frame is taken.

    Args:
        source: Pillow image, path, encoded bytes, binary file object, or array: (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) of bytes, of 16-bit levels, or of floats in [0, 1].
        max_pixels: Overrides `limits.max_pixels`.
        limits: Largest image to read; pixels are counted from the header, before anything is decoded.

    Returns:
        An RGB image of the size that the file shows. The source is not changed.

    Raises:
        DataError: The file is missing, empty, damaged, too large, of a format that is not read, or its levels have
            no known range.
    """
    if max_pixels is not None:
        limits = ImageLimits(max_pixels=max_pixels, max_bytes=limits.max_bytes)
    from PIL import Image

    if isinstance(source, Image.Image):
        return _to_rgb(source, describe(source), limits)
    if isinstance(source, (str, os.PathLike)):
        return _decode(_read_file(Path(source), limits), str(source), limits)
    where = describe(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), where, limits)
    if hasattr(source, "read"):
        return _decode(_read_stream(cast("BinaryIO", source), where, limits), where, limits)
    if hasattr(source, "__array__"):
        return _from_array(source, where, limits)
    raise DataError(f"cannot read an image from {where}", "give a path, bytes, a file object, an array or an image")


def image_size(data: bytes, where: str, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return width and height of an encoded image as `load_image` gives it, without decoding its pixels.

    Raises:
        DataError: It is no image, or too large. Damage behind the header goes unseen.
    """
    with _opened(data, where, limits) as image:
        limits.check_pixels(*image.size, where)
        width, height = image.size
        return (height, width) if _orientation(image, where) in _SIDEWAYS else (width, height)


def describe(source: object) -> str:
    """Name a source in messages: its path where it has one, otherwise what it is."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image of {len(source)} bytes"
    name = getattr(source, "name", None) or getattr(source, "filename", None)
    return name if isinstance(name, str) else f"an object of type {type(source).__name__}"


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    """Read a whole file; only regular ones, since a pipe or a device may never end."""
    if not path.is_file():
        known = "is not a regular file" if path.exists() else "does not exist"
        web = str(path).partition(":")[0] in ("http", "https", "data")
        raise DataError(f"{path} {known}", "download it first" if web else "check the path")
    try:
        with path.open("rb") as stream:
            return _read_stream(stream, str(path), limits)
    except OSError as e:
        raise DataError(f"cannot read {path}: {e}", "check its permissions") from e


def _read_stream(stream: BinaryIO, where: str, limits: ImageLimits) -> bytes:
    data = stream.read(limits.max_bytes + 1)
    if not isinstance(data, bytes):
        raise DataError(f"{where} gives text", "open it in binary mode: open(path, 'rb')")
    return data


def _decode(data: bytes, where: str, limits: ImageLimits) -> Image.Image:
    with _opened(data, where, limits) as image:
        return _to_rgb(image, where, limits)


@contextmanager
def _opened(data: bytes, where: str, limits: ImageLimits) -> Iterator[Image.Image]:
    from PIL import Image

    if not data:
        raise DataError(f"{where} is empty", "write or download it again")
    if len(data) > limits.max_bytes:
        raise DataError(f"{where} has more than {limits.max_bytes:,} bytes", "compress it, or raise max_bytes")
    Image.init()
    # Whether Pillow has AVIF, WebP or JPEG 2000 depends on how it was built.
    formats = [name for name in FORMATS if name in Image.OPEN]
    with _decoder_errors(where), Image.open(io.BytesIO(data), formats=formats) as image:
        yield image


@contextmanager
def _decoder_errors(where: str) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as e:
        raise DataError(f"{where} is not an image that can be read", f"formats: {', '.join(FORMATS)}") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(f"{where} is too large: {e}", "scale it down; PIL.Image.MAX_IMAGE_PIXELS is its limit") from e
    except _DECODER_ERRORS as e:
        raise DataError(f"{where} cannot be decoded: {e}", "the file is damaged or cut short; replace it") from e


def _to_rgb(image: Image.Image, where: str, limits: ImageLimits) -> Image.Image:
    limits.check_pixels(*image.size, where)
    with _decoder_errors(where):
        image.load()
        upright = _upright(image, where)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            return _from_levels(upright, where)
        if upright.has_transparency_data:
            return _on_white(upright.convert("RGBA"))
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
        rgb.info = {}  # else its orientation would be applied once more by whoever reads it next
        return rgb


def _on_white(layer: Image.Image) -> Image.Image:
    from PIL import Image

    sheet = Image.new("RGB", layer.size, WHITE)
    sheet.paste(layer, mask=layer.getchannel("A"))
    return sheet


def _upright(image: Image.Image, where: str) -> Image.Image:
    """Return a copy turned as EXIF says; an unreadable orientation is no reason to lose the image.

    Only the orientation is read: Pillow's own function also writes all tags anew, which one bad tag makes fail.
    """
    from PIL import Image

    turns = Image.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    method = methods.get(_orientation(image, where))
    return image.copy() if method is None else image.transpose(method)


def _orientation(image: Image.Image, where: str) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS as e:
        logger.warning("%s: its EXIF data is unreadable and its orientation ignored: %s", where, e)
        return 1
    return found if isinstance(found, int) else 1


def _from_levels(image: Image.Image, where: str) -> Image.Image:
    """Turn a grey image of deep levels into RGB; Pillow's own conversion clips most of its modes at 255."""
    import numpy as np

    levels = np.asarray(image)
    # Pillow reads 16-bit files of some formats into 32-bit integers and keeps the 16-bit range.
    if levels.dtype.kind in "iu" and levels.dtype.itemsize > 2:
        if int(levels.min()) < 0 or int(levels.max()) > _LEVELS_16:
            raise DataError(f"{where} has levels outside 0..{_LEVELS_16}", "save it with 8 or 16 bits a channel")
        levels = levels.astype(np.uint16)
    return _from_bytes(_to_bytes(levels, where))


def _from_array(source: Any, where: str, limits: ImageLimits) -> Image.Image:
    import numpy as np

    array = np.asarray(source)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise DataError(f"{where} has shape {array.shape}", "give (height, width) or (height, width, 1, 3 or 4)")
    limits.check_pixels(array.shape[1], array.shape[0], where)
    image = _from_bytes(_to_bytes(array, where))
    return _to_rgb(image, where, limits) if image.mode != "RGB" else image


def _to_bytes(levels: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """Scale levels of a known range to bytes."""
    import numpy as np

    if levels.dtype == np.uint8:
        return levels
    if levels.dtype == np.bool_:
        return levels.astype(np.uint8) * 255
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2:
        # 65535 = 255 * 257, so white stays white; rounded to the nearest level.
        return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if levels.dtype.kind == "f":
        # Written so that it refuses NaN too, for which every comparison is false.
        if not (levels.min() >= 0 and levels.max() <= 1):
            raise DataError(f"{where} has levels outside [0, 1] or that are no numbers", "scale them, or use bytes")
        return (levels * 255).round().astype(np.uint8)
    raise DataError(f"{where} has levels of type {levels.dtype}", "use uint8, uint16 or floats in [0, 1]")


def _from_bytes(levels: np.ndarray[Any, Any]) -> Image.Image:
    from PIL import Image

    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    image = Image.fromarray(levels)
    return image.convert("RGB") if image.mode == "L" else image


__all__ = ["DEFAULT_LIMITS", "FORMATS", "ImageLimits", "ImageSource", "describe", "image_size", "load_image"]
