"""Writing small videos, for data sets that are made on the spot."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nvila.errors import CapabilityError

if TYPE_CHECKING:
    from PIL import Image


def encode_video(frames: Iterable[Image.Image], *, rate: int) -> bytes:
    """Encode images of one size as MP4.

    Args:
        frames: RGB images.
        rate: Frames a second.

    Raises:
        CapabilityError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as e:
        raise CapabilityError("writing videos needs the package av", "pip install 'nvila[model]'") from e
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.pix_fmt = "yuv420p"
        # One thread and constant quality: the bytes are the same everywhere.
        stream.thread_count = 1
        stream.options = {"qscale": "2"}
        for number, frame in enumerate(frames):
            if number == 0:
                stream.width, stream.height = frame.size
            picture = av.VideoFrame.from_image(frame)  # type: ignore[no-untyped-call]  # av leaves it untyped
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


__all__ = ["encode_video"]
