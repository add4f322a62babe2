"""`python -m nvila_platform.serving.decode_worker FD LIMITS`: decodes images and videos that arrive on a socket.

A message is a JSON header, its length before it in four bytes, and the bytes that the header announces. Nothing is
pickled in either direction: a worker that a hostile file took over can answer with wrong pixels and with nothing else.

Once everything is imported, the process gives up its rights: no new files or sockets, no file growth, no core dump,
and no more memory than one decoding may take.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits

if TYPE_CHECKING:
    from nvila.data.video import Video

_LENGTH = struct.Struct(">I")
_LONGEST_HEADER = 64 * 1024


def send_message(channel: socket.socket, header: Mapping[str, Any], *payloads: Any) -> None:
    """Write one message.

    Args:
        channel: A connected socket.
        header: Anything JSON can hold; must tell the reader how long the payload is.
        *payloads: Bytes that follow it.
    """
    text = json.dumps(header).encode()
    channel.sendall(_LENGTH.pack(len(text)) + text)
    for payload in payloads:
        channel.sendall(payload)


def receive_header(channel: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Read the header of the next message.

    Args:
        channel: A connected socket.
        deadline: When to give up, on the monotonic clock.

    Raises:
        EOFError: The other side has gone, or sends something else.
        TimeoutError: The time is over.
    """
    (length,) = _LENGTH.unpack(receive(channel, _LENGTH.size, deadline))
    if length > _LONGEST_HEADER:
        raise EOFError("a header is too long")
    try:
        header = json.loads(receive(channel, length, deadline))
    except ValueError as e:
        raise EOFError("a header is not JSON") from e
    if not isinstance(header, dict):
        raise EOFError("a header is no object")
    return header


def receive(channel: socket.socket, length: int, deadline: float | None = None) -> bytearray:
    """Read exactly `length` bytes.

    Raises:
        EOFError: The other side has gone.
        TimeoutError: The time is over.
    """
    data = bytearray(length)
    view = memoryview(data)
    while view:
        if deadline is not None:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
        count = channel.recv_into(view)
        if not count:
            raise EOFError("the other side has gone")
        view = view[count:]
    return data


def main(argv: list[str]) -> None:
    """Serve decodings until the other side closes the socket."""
    channel = socket.socket(fileno=int(argv[0]))
    limits = Limits(**json.loads(argv[1]))
    _warm_up()
    _give_up_rights(limits)
    send_message(channel, {"ready": True})
    while True:
        try:
            header = receive_header(channel)
            data = bytes(receive(channel, header["bytes"]))
        except EOFError:
            return
        try:
            answer, pixels = _decode(header, data, limits)
        except ApiError as e:
            answer, pixels = {"status": e.status, "code": e.code, "message": e.message}, b""
        send_message(channel, answer, pixels)


def arguments(limits: Limits) -> str:
    """Return the limits as the worker reads them."""
    return json.dumps(asdict(limits))


def _decode(header: Mapping[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], Any]:
    from nvila_platform.serving.decoding import decode_image, decode_video

    if header["kind"] == "image":
        image = decode_image(data, limits)
        return {"size": list(image.size), "encoded": len(data)}, image.tobytes()
    video: Video = decode_video(data, limits, num_frames=header["num_frames"], fps=header["fps"])
    described = {"shape": list(video.frames.shape), "timestamps": video.timestamps, "duration": video.duration}
    return described, video.frames.reshape(-1).data


def _warm_up() -> None:
    """Import and open everything that decoding needs, while files can still be opened."""
    import io

    import av
    import av.logging
    import numpy as np
    from PIL import Image, ImageOps  # noqa: F401  # imported for what comes later

    import nvila.data.video  # noqa: F401
    import nvila_platform.serving.decoding
    from nvila_platform.serving.decoding import IMAGE_FORMATS

    # The library's messages quote metadata of the file.
    av.logging.set_level(av.logging.PANIC)
    Image.init()
    for kind in IMAGE_FORMATS:
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, kind)
        nvila_platform.serving.decoding.decode_image(out.getvalue(), Limits())
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as clip:
        stream = clip.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
    nvila_platform.serving.decoding.decode_video(out.getvalue(), Limits(), num_frames=1)


def _give_up_rights(limits: Limits) -> None:
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    memory = held + limits.decode_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Every descriptor that a new file or socket could get is above the limit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


if __name__ == "__main__":
    main(sys.argv[1:])
