"""A few worker processes that decode media, each replaced when it takes too long, too much memory, or dies."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nvila_platform.serving.decode_worker import arguments, receive, receive_header, send_message
from nvila_platform.serving.errors import RETRY_AFTER_S, ApiError
from nvila_platform.serving.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.data.video import Video

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
# What a decoder needs of the environment; keys and passwords of the server are not among it.
_PASSED_ON = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


class DecoderPool:
    """Decodes images and videos outside this process.

    Args:
        limits: Bounds of one decoding, and how many go on at once.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.decode_workers, thread_name_prefix="decode")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False
        self._held_bytes = 0

    def warm_up(self) -> None:
        """Start the workers, so that the first request does not wait for them."""
        for _ in range(self._limits.decode_workers):
            self._threads.submit(self._start)

    async def image(self, data: bytes) -> Image:
        """Decode one image to RGB.

        Raises:
            ApiError: It cannot be used, or decoding it takes too much.
        """
        from PIL import Image

        answer, pixels, held = await self._run({"kind": "image"}, data)
        with held:
            width, height = _sizes(answer, "size", 2)
            if len(pixels) != width * height * 3:
                raise _failed("image")
            image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
            weakref.finalize(image, held.release)
        return image

    async def video(self, data: bytes, *, num_frames: int, fps: float = 0.0) -> Video:
        """Sample the frames of one video.

        Raises:
            ApiError: It cannot be used, or decoding it takes too much.
        """
        import numpy as np

        from nvila.data.video import Video

        answer, pixels, held = await self._run({"kind": "video", "num_frames": num_frames, "fps": fps}, data)
        with held:
            shape = _sizes(answer, "shape", 4)
            if len(pixels) != shape[0] * shape[1] * shape[2] * 3:
                raise _failed("video")
            frames = np.frombuffer(pixels, np.uint8).reshape(shape)
            moments = tuple(float(moment) for moment in answer["timestamps"])
            video = Video(frames=frames, timestamps=moments, duration=float(answer["duration"]))
            weakref.finalize(frames, held.release)
        return video

    def close(self) -> None:
        """End the workers; what they decode is given up."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, header: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray, _Reservation]:
        held = _Reservation(self._reserve, self._release)
        work = self._threads.submit(self._decode, header, data, held)
        try:
            answer, pixels = await asyncio.wrap_future(work)
        except BaseException:
            # Whoever asked may have left while the thread goes on, and reserves memory later.
            work.add_done_callback(lambda _: held.release())
            raise
        return answer, pixels, held

    def _decode(self, header: Mapping[str, Any], data: bytes, held: _Reservation) -> tuple[dict[str, Any], bytearray]:
        worker = self._take()
        try:
            answer, pixels = worker.decode(header, data, self._limits.decode_timeout_s, held.take)
        except ApiError:
            # Its pixels are still in the socket.
            worker.end()
            raise
        except TimeoutError as e:
            worker.end()
            kind = header["kind"]
            message = f"decoding the {kind} took over {self._limits.decode_timeout_s:g} s; send a smaller one"
            raise ApiError(413, f"{kind}_too_large", message) from e
        except (EOFError, OSError) as e:
            # Also what is seen when the system killed it for its memory.
            worker.end()
            logger.warning("a decoder ended on an input of %d bytes", len(data))
            raise _failed(header["kind"]) from e
        self._give_back(worker)
        if "code" in answer:
            raise ApiError(int(answer["status"]), str(answer["code"]), str(answer["message"]))
        return answer, pixels

    def _reserve(self, size: int) -> None:
        """Count pixels that are about to be taken in; they are counted off when their last user has gone."""
        with self._lock:
            if self._held_bytes + size > self._limits.max_decoded_bytes:
                message = "the images and videos of other requests fill the memory set aside for them; try again"
                raise ApiError(429, "media_memory_full", message, retry_after_s=RETRY_AFTER_S)
            self._held_bytes += size

    def _release(self, size: int) -> None:
        with self._lock:
            self._held_bytes -= size

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self._limits)

    def _start(self) -> None:
        worker = _Worker(self._limits)
        try:
            worker.ready(_START_TIMEOUT_S)
        except (EOFError, OSError) as e:
            worker.end()
            logger.warning("a decoder did not start: %s", e)
        else:
            self._give_back(worker)

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.end()


class _Reservation:
    """Memory that one decoding may have taken; leaving its `with` block by an error gives it back."""

    def __init__(self, reserve: Callable[[int], None], release: Callable[[int], None]) -> None:
        self._reserve = reserve
        self._release = release
        self._size = 0

    def __enter__(self) -> _Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.release()

    def take(self, size: int) -> None:
        """Count `size` bytes; see `DecoderPool._reserve`."""
        self._reserve(size)
        self._size = size

    def release(self) -> None:
        """Count them off; nothing is left for a second time."""
        size, self._size = self._size, 0
        self._release(size)


class _Worker:
    """One process and the socket to it."""

    def __init__(self, limits: Limits) -> None:
        self._channel, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nvila_platform.serving.decode_worker",
                    str(theirs.fileno()),
                    arguments(limits),
                ],
                env={**environment, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        frames = limits.max_frames * limits.max_frame_side**2
        self._most_bytes = 3 * max(limits.max_image_pixels, frames)
        self._ready = False

    def ready(self, timeout_s: float) -> None:
        """Wait until it has said that it is ready."""
        if not self._ready:
            receive_header(self._channel, time.monotonic() + timeout_s)
            self._ready = True

    def decode(
        self, header: Mapping[str, Any], data: bytes, timeout_s: float, reserve: Callable[[int], None]
    ) -> tuple[dict[str, Any], bytearray]:
        """Let it decode one file; `reserve` is asked before its pixels are taken in.

        Raises:
            TimeoutError: It takes too long.
            EOFError: It has ended.
            OSError: Likewise.
        """
        self.ready(_START_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        self._channel.settimeout(timeout_s)
        send_message(self._channel, {**header, "bytes": len(data)}, data)
        answer = receive_header(self._channel, deadline)
        if "code" in answer:
            return answer, bytearray()
        length = math.prod(int(size) for size in answer.get("size") or answer.get("shape") or [])
        length *= 3 if "size" in answer else 1
        if not 0 < length <= self._most_bytes:
            # A worker that says so is not ours any more.
            raise EOFError("a decoded file is larger than can be")
        reserve(length)
        return answer, receive(self._channel, length, deadline)

    def end(self) -> None:
        """End the process at once."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _sizes(answer: Mapping[str, Any], name: str, count: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in answer[name])
    if len(sizes) != count or min(sizes) < 1:
        raise _failed("image" if count == 2 else "video")
    return sizes


def _failed(kind: str) -> ApiError:
    return ApiError(400, f"invalid_{kind}", f"the {kind} cannot be decoded; encode it again")
