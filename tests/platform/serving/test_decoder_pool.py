"""Decoding outside the server's process: what comes back, what a worker may not do, and what happens when it dies."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from nvila.data.video import load_video
from nvila_platform.serving import decoder_pool, decoding
from nvila_platform.serving.decode_worker import receive
from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits

LIMITS = Limits(decode_workers=1, max_video_seconds=60, max_frame_side=100)


def png(width: int = 30, height: int = 20) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(out, "PNG")
    return out.getvalue()


def clip(seconds: int, width: int = 64, rate: int = 4, kind: str = "mp4") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream("mpeg4" if kind != "webm" else "libvpx", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for number in range(seconds * rate):
            pixels = np.full((48, width, 3), number * 7 % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(LIMITS)
    yield made
    made.close()


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [one for one in children if "nvila_platform.serving.decode_worker" in " ".join(one.cmdline())]


def test_an_image_comes_back_as_it_would_be_decoded_here(pool: DecoderPool) -> None:
    data = png()
    image = asyncio.run(pool.image(data))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_a_video_comes_back_as_it_would_be_sampled_here(pool: DecoderPool, kind: str) -> None:
    data = clip(4, kind=kind)
    video = asyncio.run(pool.video(data, num_frames=5))
    expected = load_video(data, num_frames=5, max_side=100)
    assert np.array_equal(video.frames, expected.frames)
    assert (video.timestamps, video.duration) == (expected.timestamps, expected.duration)


def test_large_frames_are_scaled_while_they_are_decoded(pool: DecoderPool) -> None:
    assert asyncio.run(pool.video(clip(1, width=400), num_frames=2)).size == (100, 12)


@pytest.mark.parametrize(
    ("data", "code"), [(clip(61, rate=1), "video_too_long"), (b"\0\0\0\x20ftypisom", "invalid_video")]
)
def test_a_refusal_comes_back_and_the_worker_goes_on(pool: DecoderPool, data: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(pool.video(data, num_frames=2))
    assert caught.value.code == code
    (before,) = workers()
    asyncio.run(pool.image(png()))
    assert [one.pid for one in workers()] == [before.pid]


def test_a_video_is_measured_where_its_header_says_nothing_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_check_container", lambda *_args: None)
    with pytest.raises(ApiError) as caught:
        decoding.decode_video(clip(61, rate=1), Limits(max_video_seconds=60), num_frames=4)
    assert (caught.value.status, caught.value.code) == (413, "video_too_long")


def test_a_worker_that_dies_is_replaced(pool: DecoderPool) -> None:
    asyncio.run(pool.image(png()))
    (worker,) = workers()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ApiError) as caught:
        asyncio.run(pool.image(png()))
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")
    assert asyncio.run(pool.image(png())).size == (30, 20)


def test_one_that_takes_too_long_is_ended() -> None:
    pool = DecoderPool(Limits(decode_workers=1, decode_timeout_s=0.5))
    try:
        asyncio.run(pool.image(png()))
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ApiError) as caught:
            asyncio.run(pool.image(png()))
        assert (caught.value.status, caught.value.code) == (413, "image_too_large")
        assert time.monotonic() - began < 5.0
        assert not psutil.pid_exists(worker.pid)
    finally:
        pool.close()


def test_one_that_needs_too_much_memory_refuses_and_goes_on() -> None:
    pool = DecoderPool(Limits(decode_workers=1, decode_memory_bytes=30 * 2**20))
    try:
        with pytest.raises(ApiError) as caught:
            asyncio.run(pool.image(png_of_one_colour(4000)))
        assert caught.value.code in ("image_too_large", "invalid_image")
        assert asyncio.run(pool.image(png())).size == (30, 20)
    finally:
        pool.close()


def test_pixels_of_all_requests_together_are_bounded() -> None:
    pool = DecoderPool(Limits(decode_workers=1, max_decoded_bytes=5000))
    try:
        first = asyncio.run(pool.image(png()))
        asyncio.run(pool.image(png()))  # nobody holds it
        gc.collect()
        second = asyncio.run(pool.image(png()))
        with pytest.raises(ApiError) as caught:
            asyncio.run(pool.image(png()))
        assert (caught.value.status, caught.value.code) == (429, "media_memory_full")
        del first, second
        gc.collect()
        assert asyncio.run(pool.image(png())).size == (30, 20)
    finally:
        pool.close()


def test_whoever_leaves_while_it_is_decoded_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = DecoderPool(Limits(decode_workers=1, max_decoded_bytes=2000))
    reserved, left = threading.Event(), threading.Event()

    def receive_late(*args: Any) -> bytearray:
        reserved.set()
        assert left.wait(30)
        return receive(*args)

    async def leave() -> None:
        asking = asyncio.ensure_future(pool.image(png()))
        assert await asyncio.to_thread(reserved.wait, 60)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        left.set()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(decoder_pool, "receive", receive_late)
            asyncio.run(leave())
            assert asyncio.run(pool.image(png())).size == (30, 20)
        gc.collect()
        assert pool._held_bytes == 0
    finally:
        left.set()
        pool.close()


def test_a_worker_that_dies_with_the_pixels_keeps_no_memory(pool: DecoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive_nothing(*_args: Any) -> bytearray:
        raise EOFError("the other side has gone")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_pool, "receive", receive_nothing)
        with pytest.raises(ApiError):
            asyncio.run(pool.image(png()))
    assert pool._held_bytes == 0


def test_a_worker_has_no_secrets_and_can_open_nothing(pool: DecoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_S3_SECRET_KEY", "secret")
    asyncio.run(pool.image(png()))
    (worker,) = workers()
    assert "NVILA_S3_SECRET_KEY" not in worker.environ()
    assert worker.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_AS)[1] < 8 * 2**30


def test_closing_ends_the_workers(pool: DecoderPool) -> None:
    asyncio.run(pool.image(png()))
    (worker,) = workers()
    pool.close()
    assert not psutil.pid_exists(worker.pid)


def png_of_one_colour(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return out.getvalue()
