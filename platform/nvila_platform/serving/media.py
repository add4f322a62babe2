"""From the media of a request to decoded pictures: where they are, how many there may be, who decodes them.

A medium is a `data:` URI, an https address of a host on the list, or a reference into the media store. Sizes are
checked before the work they bound: the length of the text before base64, counted bytes while fetching, the size in a
header before its pixels.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.fetching import MediaDoor
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.media_store import SCHEME, MediaStore, read_reference

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.data.video import Video

Medium: TypeAlias = "Image | Video"

_T = TypeVar("_T")
_HEADER = re.compile(r"data:(?P<type>[A-Za-z0-9.+/-]*)(?P<options>(;[A-Za-z0-9=._-]+)*),")
_LONGEST_HEADER = 256
_SHOWN = 40
# Below this many characters, decoding base64 takes less time than handing it to a thread.
_SMALL = 64 * 1024
_DEFAULT_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSource:
    """One image or video of a request, not loaded yet.

    Args:
        kind: What it is; `frames` is a video that comes as a list of images.
        urls: Where it is; several for `frames`.
        param: Path of the request field, for errors.
        num_frames: Frames to sample of a video.
        fps: Frames a second to sample of a video, or at which `frames` were taken; 0 for neither.
    """

    kind: str
    urls: tuple[str, ...]
    param: str
    num_frames: int = _DEFAULT_FRAMES
    fps: float = 0.0

    @property
    def num_images(self) -> int:
        """Images that it brings along."""
        return 0 if self.kind == "video" else len(self.urls)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for media that are the same after loading."""
        return (self.kind, self.urls, self.num_frames, self.fps)


@dataclass(slots=True)
class LoadedMedia:
    """Decoded media and what they cost on the way in."""

    media: list[Medium] = field(default_factory=list)
    encoded_bytes: int = 0


class MediaIntake:
    """Loads the media of requests.

    Args:
        limits: Bounds.
        decoder: Decodes outside this process.
        door: Fetches from other hosts; None refuses all.
        store: Holds what references name; None refuses them.
    """

    def __init__(
        self, limits: Limits, decoder: DecoderPool, *, door: MediaDoor | None = None, store: MediaStore | None = None
    ) -> None:
        self._limits = limits
        self._decoder = decoder
        self._door = door
        self._store = store

    def check(self, sources: Sequence[MediaSource]) -> None:
        """Count before anything is read.

        Raises:
            ApiError: There are too many media, or too many frames.
        """
        limits = self._limits
        images = sum(one.num_images for one in sources)
        videos = [one for one in sources if one.kind != "image"]
        frames = sum(one.num_frames for one in videos)
        for count, most, what in (
            (images, limits.max_images, "images"),
            (len(videos), limits.max_videos, "videos"),
            (frames, limits.max_frames, "frames"),
        ):
            if count > most:
                message = f"the request holds {count} {what}, at most {most} are allowed"
                raise ApiError(400, f"too_many_{what}", message, param="messages")

    async def load(self, sources: Sequence[MediaSource]) -> LoadedMedia:
        """Fetch and decode media; equal ones once.

        Raises:
            ApiError: One cannot be used.
        """
        self.check(sources)
        loaded = LoadedMedia()
        distinct = {one.identity: one for one in sources}
        media = dict(zip(distinct, await in_order([self._one(one, loaded) for one in distinct.values()]), strict=True))
        loaded.media = [media[one.identity] for one in sources]
        return loaded

    async def _one(self, source: MediaSource, loaded: LoadedMedia) -> Medium:
        if source.kind == "video":
            data = await self._bytes(source.urls[0], "video", source.param)
            loaded.encoded_bytes += len(data)
            return await _at(source.param, self._decoder.video(data, num_frames=source.num_frames, fps=source.fps))
        images = []
        for number, url in enumerate(source.urls):
            param = source.param if source.kind == "image" else f"{source.param}[{number}]"
            data = await self._bytes(url, "image", param)
            loaded.encoded_bytes += len(data)
            images.append(await _at(param, self._decoder.image(data)))
        if source.kind == "image":
            return images[0]
        return await _at(source.param, asyncio.to_thread(_as_video, images, source, self._limits.max_frame_side))

    async def _bytes(self, url: str, kind: str, param: str) -> bytes:
        most = self._limits.max_image_bytes if kind == "image" else self._limits.max_video_bytes
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            read = lambda: data_of(url, kind, most)  # noqa: E731  # shorter than a function of its own
            return await _at(param, asyncio.to_thread(read)) if len(url) > _SMALL else _now(param, read)
        if scheme.startswith(SCHEME):
            return await _at(param, asyncio.to_thread(read_reference, self._store, url, most))
        if scheme.startswith(("https:", "http:")):
            if self._door is None:
                message = f"this server does not fetch remote {kind}s; send the {kind} itself as a data: URI"
                raise ApiError(400, f"remote_{kind}", message, param=param)
            return await self._door.fetch(url, most=most, param=param)
        message = f"a medium must be a data: URI with base64 data, an https address or store:PATH, got {url[:_SHOWN]!r}"
        raise ApiError(400, f"invalid_{kind}", message, param=param)


def data_of(url: str, kind: str, most: int) -> bytes:
    """Return the bytes of a base64 `data:` URI.

    Raises:
        ApiError: It is of another kind, too large, or not base64.
    """
    match = _HEADER.match(url, 0, _LONGEST_HEADER)
    if match is None or ";base64" not in match["options"].lower():
        message = f"the data: URI must read data:{kind}/...;base64,... (the type of your {kind}, then base64)"
        raise ApiError(400, f"invalid_{kind}", message)
    if not match["type"].lower().startswith(f"{kind}/"):
        article = "an image" if kind == "image" else "a video"
        raise ApiError(
            400, f"invalid_{kind}", f"the data: URI holds {match['type'][:_SHOWN] or 'no type'}, not {article}"
        )
    if (len(url) - match.end()) * 3 // 4 - 2 > most:
        message = f"the {kind} may have at most {most} bytes; send a smaller one"
        raise ApiError(413, f"{kind}_too_large", message)
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as e:
        raise ApiError(400, f"invalid_{kind}", "the data: URI is not valid base64") from e


def _as_video(images: list[Image], source: MediaSource, max_side: int) -> Video:
    from nvila.data.video import load_video

    return load_video(images, num_frames=source.num_frames, frame_rate=source.fps or 1.0, max_side=max_side)


async def in_order(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all at once and return their results in order; the first error ends the others.

    Raises:
        ApiError: Of the first that failed.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _at(param: str, work: Awaitable[_T]) -> _T:
    try:
        return await work
    except ApiError as e:
        raise _placed(e, param) from e


def _now(param: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except ApiError as e:
        raise _placed(e, param) from e


def _placed(error: ApiError, param: str) -> ApiError:
    return ApiError(error.status, error.code, error.message, param=param, retry_after_s=error.retry_after_s)
