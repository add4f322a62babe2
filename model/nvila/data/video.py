"""Reading videos: sampled frames with their times, from files, directories of frames and arrays.

Memory is bounded by the frames that are kept, whatever the length of the file: frames are decoded one at a time,
scaled while they are converted, and written straight into the result.
"""

from __future__ import annotations

import logging
import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from nvila.data.containers import FileSource, Timeline, VideoFile
from nvila.data.images import DEFAULT_LIMITS, ImageLimits, ImageSource, describe, load_image
from nvila.errors import ConfigError, DataError
from nvila.vision.temporal import fps_times, frame_indices

if TYPE_CHECKING:
    import numpy as np
    from av.video.frame import VideoFrame
    from PIL import Image

    Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

VideoSource: TypeAlias = "FileSource | Sequence[ImageSource] | np.ndarray[Any, Any]"

logger = logging.getLogger(__name__)

_FRAME_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
# A sampled moment that falls on a frame's own must not land on the one before by rounding of floats.
_BOUNDARY_S = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Sampled frames of one video.

    Args:
        frames: RGB bytes of shape (T, height, width, 3).
        timestamps: Moment of every frame in seconds from the start, T of them, never falling.
        duration: Length of the whole video in seconds.

    Raises:
        DataError: The shapes do not fit, or there are no frames.
    """

    frames: Pixels
    timestamps: tuple[float, ...]
    duration: float

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = getattr(self.frames, "shape", ())
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or str(self.frames.dtype) != "uint8":
            raise DataError(f"frames of shape {shape} are no video", "give bytes of shape (frames, height, width, 3)")
        if len(self.timestamps) != shape[0]:
            raise DataError(f"{shape[0]} frames have {len(self.timestamps)} timestamps", "give one for every frame")

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        return self.frames.shape[2], self.frames.shape[1]


def load_video(
    source: VideoSource,
    *,
    num_frames: int = 8,
    fps: float = 0.0,
    max_side: int | None = None,
    frame_rate: float = 1.0,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Video:
    """Sample the frames of a video.

    Evenly from the first frame to the last, as the released models were trained, or at a rate from the start. Which
    frame is shown at a moment follows from the time stamps, so that a variable rate is sampled correctly. A short
    clip gives some frames more than once. Damage is passed over where frames around it can be read, with a warning.

    Args:
        source: Video file as a path, bytes or binary file object; directory of frames, taken in the order of the
            numbers in their names; or sequence of images as `load_image` takes them, of one array (T, H, W, 3) too.
        num_frames: Frames to sample; the most there may be when `fps` is given.
        fps: Frames a second to sample; 0 samples evenly.
        max_side: Scale frames down so that no side is longer, in pixels; None keeps their size.
        frame_rate: Frames a second of sources that do not know: directories, sequences, raw streams.
        limits: Largest frame to read.

    Returns:
        The frames, each with its time; the size of the first one holds for all.

    Raises:
        DataError: The source is missing, damaged beyond reading, has no picture or no frames.
        ConfigError: A number is out of range.
        CapabilityError: PyAV is not installed.

    Example:
        >>> import numpy as np
        >>> load_video(np.zeros((4, 2, 2, 3), np.uint8), num_frames=2, frame_rate=2.0).timestamps
        (0.0, 1.5)
    """
    _check_numbers(num_frames, fps, max_side, frame_rate)
    where = describe(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            source = _frame_files(path)
        elif not path.is_file():
            raise DataError(
                f"{path} {'is not a regular file' if path.exists() else 'does not exist'}", "check the path"
            )
        elif path.stat().st_size == 0:
            raise DataError(f"{path} is empty", "write or download it again")
    elif isinstance(source, (bytes, bytearray, memoryview)):
        source, where = bytes(source), f"a video of {len(source)} bytes"
        if not source:
            raise DataError("the video has no bytes", "write or download it again")
    sampling = _Sampling(num_frames, fps, max_side, limits)
    if isinstance(source, (str, os.PathLike, bytes)) or hasattr(source, "read"):
        return _from_file(cast("FileSource", source), where, sampling, frame_rate)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _from_stills(cast("Sequence[ImageSource]", source), where, sampling, frame_rate)
    raise DataError(f"cannot read a video from {where}", "give a path, bytes, a file object or a sequence of frames")


@dataclass(frozen=True, slots=True)
class _Sampling:
    num_frames: int
    fps: float
    max_side: int | None
    limits: ImageLimits

    def choose(self, times: Sequence[float], duration: float, where: str) -> list[int]:
        """Choose frames, given the moment of each; the result never falls."""
        if not times:
            raise DataError(f"{where} has no frames", "leave it out, or record it again")
        if self.fps == 0:
            return frame_indices(len(times), self.num_frames)
        moments = fps_times(duration, self.fps, self.num_frames)
        return [max(0, bisect_right(times, moment + _BOUNDARY_S) - 1) for moment in moments]

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Size of a frame after scaling."""
        if self.max_side is None or max(width, height) <= self.max_side:
            return width, height
        scale = self.max_side / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


def _check_numbers(num_frames: int, fps: float, max_side: int | None, frame_rate: float) -> None:
    if num_frames < 1:
        raise ConfigError(f"num_frames is {num_frames}", "use 1 or more")
    if not 0 <= fps < math.inf:
        raise ConfigError(f"fps is {fps}", "use a positive rate, or 0 for even sampling")
    if max_side is not None and max_side < 1:
        raise ConfigError(f"max_side is {max_side}", "use a length in pixels, or None to keep the size")
    if not 0 < frame_rate < math.inf:
        raise ConfigError(f"frame_rate is {frame_rate}", "use the positive rate at which the frames were taken")


def _from_file(source: FileSource, where: str, sampling: _Sampling, frame_rate: float) -> Video:
    with VideoFile(source, where, sampling.limits, frame_rate) as file:
        timeline = file.scan()
        video = _read(file, timeline, where, sampling, seek=True)
        if video is None:
            logger.warning("%s: its end is damaged; sampling what can be read", where)
            timeline = file.scan_decoded(ordinal=timeline.ordinal)
            if not timeline.labels:
                raise DataError(f"{where} has no frame that can be decoded", "the file is damaged; replace it")
            video = _read(file, timeline, where, sampling, seek=False)
        if video is None:
            raise DataError(f"{where} gives different frames every time it is read", "convert it to mp4")
        return video


def _read(file: VideoFile, timeline: Timeline, where: str, sampling: _Sampling, *, seek: bool) -> Video | None:
    """Decode the chosen frames; None when the file ends before the last of them."""
    import numpy as np

    labels = [timeline.labels[index] for index in sampling.choose(timeline.times, timeline.duration, where)]
    wanted = sorted(set(labels))
    frames: Pixels | None = None
    shown: list[int] = []
    for label, (decoded, frame) in zip(wanted, file.pick(timeline, wanted, seek=seek), strict=False):
        sampling.limits.check_pixels(frame.width, frame.height, f"{where}, a frame of")
        picture = _to_rgb(frame, sampling)
        if frames is None:
            frames = np.empty((len(labels), *picture.shape), np.uint8)
        # Repeats are written at once; labels rise, so they stand together.
        count = labels.count(label)
        frames[len(shown) : len(shown) + count] = _fit(picture, frames.shape[1:3])
        shown += [decoded] * count
    if frames is None or len(shown) < len(labels):
        return None
    moved = sum(decoded != label for decoded, label in zip(shown, labels, strict=True))
    if moved:
        logger.warning("%s: %d of %d frames cannot be decoded; the next ones are used", where, moved, len(labels))
    return Video(frames, tuple(timeline.time(label) for label in shown), timeline.duration)


def _to_rgb(frame: VideoFrame, sampling: _Sampling) -> Pixels:
    """Convert and scale in one pass, and turn as the recorder held the camera."""
    import numpy as np

    width, height = sampling.target_size(frame.width, frame.height)
    picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    quarter_turns = round(frame.rotation / 90) % 4
    return cast("Pixels", np.rot90(picture, quarter_turns) if quarter_turns else picture)


def _fit(picture: Pixels, size: tuple[int, ...]) -> Pixels:
    """Resize a frame whose size changed on the way to the size of the first."""
    if picture.shape[:2] == size:
        return picture
    import numpy as np
    from PIL import Image

    resized = Image.fromarray(np.ascontiguousarray(picture)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _frame_files(directory: Path) -> list[Path]:
    """List the images of a directory, 2 before 10."""
    files = [path for path in directory.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"{directory} holds no images", f"write frames as {', '.join(sorted(_FRAME_SUFFIXES))}")
    return sorted(files, key=lambda path: [int(part) if part.isdecimal() else part for part in _parts(path.name)])


def _parts(name: str) -> list[str]:
    """Split a name into text and numbers, alternating and beginning with text, so that names compare."""
    return re.split(r"([0-9]+)", name)


def _from_stills(stills: Sequence[ImageSource], where: str, sampling: _Sampling, frame_rate: float) -> Video:
    import numpy as np

    times = [index / frame_rate for index in range(len(stills))]
    duration = len(stills) / frame_rate
    chosen = sampling.choose(times, duration, where)
    frames: Pixels | None = None
    last: tuple[int, Image.Image] | None = None
    for slot, index in enumerate(chosen):
        if last is None or last[0] != index:
            last = index, _still(stills[index], index, where, sampling)
        picture = np.asarray(last[1])
        if frames is None:
            frames = np.empty((len(chosen), *picture.shape), np.uint8)
        frames[slot] = _fit(picture, frames.shape[1:3])
    assert frames is not None
    return Video(frames, tuple(times[index] for index in chosen), duration)


def _still(source: ImageSource, index: int, where: str, sampling: _Sampling) -> Image.Image:
    from PIL import Image

    try:
        image = load_image(source, limits=sampling.limits)
    except DataError as e:
        raise DataError(f"frame {index} of {where}: {e.message}", e.hint) from e
    size = sampling.target_size(*image.size)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


__all__ = ["Video", "VideoSource", "load_video"]
