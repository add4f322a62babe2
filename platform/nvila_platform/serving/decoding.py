"""Encoded images and videos to plain RGB, with every size checked before the work that it bounds.

Runs in a worker process (see `decode_worker`): what reads bytes of strangers does not share memory with the model.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.data.video import Video

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
VIDEO_FORMATS = ("MP4", "MOV", "WebM", "Matroska", "AVI")
_MICROSECONDS = 1_000_000


def decode_image(data: bytes, limits: Limits) -> Image:
    """Decode a still image to RGB, upright, composited on white.

    Raises:
        ApiError: The image is too large, damaged, animated or of another format.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(data) > limits.max_image_bytes:
        raise image_too_large(limits)
    try:
        with warnings.catch_warnings():
            # PIL's own size check warns at a limit of its own; ours is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as header:
                _check_header(header, limits)
                header.verify()
            # verify() leaves the object unusable, so the pixels come from a second one.
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as e:
        raise _too_many_pixels(limits) from e
    except MemoryError as e:
        raise ApiError(413, "image_too_large", "the image needs too much memory to decode; scale it down") from e
    except ApiError:
        raise
    except UnidentifiedImageError as e:
        message = f"the data is not an image this server reads; use {', '.join(IMAGE_FORMATS)}"
        raise ApiError(400, "invalid_image", message) from e
    except Exception as e:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files: all are the sender's.
        raise ApiError(400, "invalid_image", "the image is damaged or incomplete; encode it again") from e


def decode_video(data: bytes, limits: Limits, *, num_frames: int, fps: float = 0.0) -> Video:
    """Sample the frames of a video.

    Args:
        data: The encoded file.
        limits: Bounds on bytes, length and frame size.
        num_frames: Frames to sample; the most there may be when `fps` is given.
        fps: Frames a second to sample; 0 spreads them evenly.

    Raises:
        ApiError: The video is too large or too long, damaged or of another format.
    """
    from nvila.data.images import ImageLimits
    from nvila.data.video import load_video
    from nvila.errors import NvilaError

    if len(data) > limits.max_video_bytes:
        raise video_too_large(limits)
    if not _is_video(data):
        message = f"the data is not a video this server reads; use {', '.join(VIDEO_FORMATS)}"
        raise ApiError(400, "invalid_video", message)
    try:
        _check_container(data, limits)
        video = load_video(
            data,
            num_frames=num_frames,
            fps=fps,
            max_side=limits.max_frame_side,
            limits=ImageLimits(max_pixels=limits.max_image_pixels, max_bytes=limits.max_video_bytes),
        )
        # A header may say nothing of the length, or too little.
        if video.duration > limits.max_video_seconds:
            raise _too_long(limits)
        return video
    except ApiError:
        raise
    except MemoryError as e:
        raise ApiError(413, "video_too_large", "the video needs too much memory to decode; scale it down") from e
    except (NvilaError, Exception) as e:
        # As with images: whatever a decoder raises on these bytes is about these bytes.
        raise ApiError(400, "invalid_video", "the video is damaged, empty or of a kind that is not read") from e


def image_too_large(limits: Limits) -> ApiError:
    """The refusal of an image with too many bytes."""
    message = f"an image may have at most {limits.max_image_bytes} bytes; send a smaller one"
    return ApiError(413, "image_too_large", message)


def video_too_large(limits: Limits) -> ApiError:
    """The refusal of a video with too many bytes."""
    message = f"a video may have at most {limits.max_video_bytes} bytes; send a shorter or smaller one"
    return ApiError(413, "video_too_large", message)


def _check_header(image: Image, limits: Limits) -> None:
    if image.width * image.height > limits.max_image_pixels:
        raise _too_many_pixels(limits)
    if image.width < 1 or image.height < 1:
        raise ApiError(400, "invalid_image", "the image is empty")
    if getattr(image, "is_animated", False):
        raise ApiError(400, "invalid_image", "animated images are not supported; send one frame")


def _too_many_pixels(limits: Limits) -> ApiError:
    message = f"an image may have at most {limits.max_image_pixels} pixels; scale it down"
    return ApiError(413, "image_too_large", message)


def _too_long(limits: Limits) -> ApiError:
    return ApiError(413, "video_too_long", f"a video may last at most {limits.max_video_seconds:g} s; cut it")


def _is_video(data: bytes) -> bool:
    """Tell by the first bytes; a playlist, which makes the reader open further files, has none of these."""
    return data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3" or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")


def _check_container(data: bytes, limits: Limits) -> None:
    import av

    options = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": "file"}
    with av.open(io.BytesIO(data), "r", container_options=options, metadata_errors="replace") as container:
        streams: list[Any] = list(container.streams.video)
        lengths = [container.duration / _MICROSECONDS] if container.duration else []
        lengths += [float(one.duration * one.time_base) for one in streams if one.duration and one.time_base]
        if lengths and max(lengths) > limits.max_video_seconds:
            raise _too_long(limits)
        for stream in streams:
            context = stream.codec_context
            if context is not None and context.width * context.height > limits.max_image_pixels:
                message = f"a frame may have at most {limits.max_image_pixels} pixels; scale the video down"
                raise ApiError(413, "video_too_large", message)


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
