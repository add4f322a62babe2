"""Images from requests: `data:` URIs with bounded bytes and pixels, brought to plain RGB.

Everything here reads bytes of strangers. Sizes are checked before the work they bound: the length of the text before
base64, the size in the image's header before its pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import TYPE_CHECKING

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_HEADER = re.compile(r"data:(?P<type>[A-Za-z0-9.+/-]*)(?P<options>(;[A-Za-z0-9=._-]+)*),")
_LONGEST_HEADER = 256
_SHOWN = 40


def load_image(url: str, limits: Limits, *, param: str) -> Image:
    """Decode the image of one `image_url` part to RGB, upright, composited on white.

    Args:
        url: A base64 `data:` URI.
        limits: Bounds on bytes and pixels.
        param: Path of the request field, for the error.

    Raises:
        ApiError: The URI is of another kind, too large, or not a still image we read.
    """
    return decode_image(_data_of(url, limits, param), limits, param=param)


def decode_image(data: bytes, limits: Limits, *, param: str) -> Image:
    """Decode encoded image bytes as `load_image` does.

    Raises:
        ApiError: The image is too large, damaged, animated or of another format.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_bytes(len(data), limits, param)
    try:
        with warnings.catch_warnings():
            # PIL's own size check warns at a limit of its own; ours is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as header:
                _check_header(header, limits, param)
                header.verify()
            # verify() leaves the object unusable, so the pixels come from a second one.
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as e:
        raise _too_many_pixels(limits, param) from e
    except ApiError:
        raise
    except UnidentifiedImageError as e:
        message = f"the data is not an image this server reads; use {', '.join(_FORMATS)}"
        raise ApiError(400, "invalid_image", message, param=param) from e
    except Exception as e:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files: all are the sender's.
        raise ApiError(400, "invalid_image", "the image is damaged or incomplete; encode it again", param=param) from e


def _data_of(url: str, limits: Limits, param: str) -> bytes:
    if url[:5].lower() != "data:":
        scheme = url.split(":", 1)[0].lower() if ":" in url[:_SHOWN] else ""
        if scheme in ("http", "https"):
            message = "this server does not fetch remote images; send the image itself as a data: URI"
            raise ApiError(400, "remote_image", message, param=param)
        message = f"an image must be a data: URI with base64 data, got {url[:_SHOWN]!r}"
        raise ApiError(400, "invalid_image", message, param=param)
    match = _HEADER.match(url, 0, _LONGEST_HEADER)
    if match is None or ";base64" not in match["options"].lower():
        message = "the data: URI must read data:image/png;base64,... (the type of your image, then base64)"
        raise ApiError(400, "invalid_image", message, param=param)
    if not match["type"].lower().startswith("image/"):
        message = f"the data: URI holds {match['type'][:_SHOWN] or 'no type'}, not an image"
        raise ApiError(400, "invalid_image", message, param=param)
    _check_bytes((len(url) - match.end()) * 3 // 4 - 2, limits, param)
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as e:
        raise ApiError(400, "invalid_image", "the data: URI is not valid base64", param=param) from e


def _check_bytes(size: int, limits: Limits, param: str) -> None:
    if size > limits.max_image_bytes:
        message = f"an image may have at most {limits.max_image_bytes} bytes; send a smaller one"
        raise ApiError(413, "image_too_large", message, param=param)


def _check_header(image: Image, limits: Limits, param: str) -> None:
    if image.width * image.height > limits.max_image_pixels:
        raise _too_many_pixels(limits, param)
    if image.width < 1 or image.height < 1:
        raise ApiError(400, "invalid_image", "the image is empty", param=param)
    if getattr(image, "is_animated", False):
        raise ApiError(400, "invalid_image", "animated images are not supported; send one frame", param=param)


def _too_many_pixels(limits: Limits, param: str) -> ApiError:
    message = f"an image may have at most {limits.max_image_pixels} pixels; scale it down"
    return ApiError(413, "image_too_large", message, param=param)


def _to_rgb(image: Image) -> Image:
    from PIL import Image as Images

    if image.mode.startswith("I"):
        # 16-bit greyscale: convert() would clip everything above 255 to white.
        import numpy as np

        image = Images.fromarray((np.asarray(image).clip(0, 0xFFFF) // 257).astype(np.uint8), mode=None)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Images.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")
