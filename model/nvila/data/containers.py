"""Video containers: which frames a file really has, and chosen frames of it without decoding the rest.

What a header says about frame count, rate and length is never believed. The packets are listed first, without decoding
them, which gives the true number of frames, the moment of each and where decoding may start. Then only the stretches
that hold chosen frames are decoded, one frame in memory at a time.

A frame is known by its label: its time stamp in units of the stream, or its ordinal in streams without usable stamps.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from nvila.data.images import ImageLimits
from nvila.errors import CapabilityError, DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FileSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"

# Playlists and other formats that make the reader open further files or addresses are left out.
_FORMATS = (
    "3g2,3gp,aac,apng,asf,avi,flac,flv,gif,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp3,mp4,mpeg,mpegts,mpegvideo,ogg,"
    "wav,webm"
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames of a file in the order in which they are shown.

    Args:
        labels: Label of every frame, rising.
        keys: Labels at which decoding may start, rising.
        unit_s: Seconds of one step of a label.
        last_s: Seconds for which the last frame is shown.
        ordinal: Whether labels are ordinals.
    """

    labels: Sequence[int]
    keys: Sequence[int]
    unit_s: Fraction
    last_s: float
    ordinal: bool = False

    def time(self, label: int) -> float:
        """Moment of a frame in seconds from the first."""
        return float((label - self.labels[0]) * self.unit_s)

    @property
    def times(self) -> list[float]:
        """Moment of every frame in seconds from the first."""
        return [self.time(label) for label in self.labels]

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.time(self.labels[-1]) + self.last_s if self.labels else 0.0


class VideoFile:
    """An open video file; use as a context manager.

    Args:
        source: Path, encoded bytes, or binary file object that can seek.
        where: Name in messages.
        limits: Largest frame.
        default_rate: Frames a second of a stream that carries neither time stamps nor a rate.

    Raises:
        DataError: The file is no video that can be read.
        CapabilityError: PyAV is not installed.
    """

    def __init__(self, source: FileSource, where: str, limits: ImageLimits, default_rate: float) -> None:
        self._source = io.BytesIO(source) if isinstance(source, bytes) else source
        self._where = where
        self._limits = limits
        self._default_rate = default_rate
        self._container: InputContainer | None = None
        self._open()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def scan(self) -> Timeline:
        """List the frames by their packets, or by decoding them where packets carry no usable stamps."""
        stamps, keys, last = [], [], 0
        for packet in self._packets():
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                return self.scan_decoded(ordinal=True)
            stamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
            last = packet.duration or 0
        if len(set(stamps)) != len(stamps):
            return self.scan_decoded(ordinal=True)
        unit = self._stream.time_base or Fraction(1, 1)
        return Timeline(sorted(stamps), sorted(keys), unit, float(last * unit) or self._gap(stamps, unit))

    def scan_decoded(self, *, ordinal: bool) -> Timeline:
        """List the frames that decode, one after the other from the start. Slow, and always right."""
        labels = [label for label, _ in self.frames(ordinal=ordinal)]
        rate = Fraction(self._rate).limit_denominator(1_000_000)
        unit = 1 / rate if ordinal else self._stream.time_base or Fraction(1, 1)
        return Timeline(labels, labels[:1], unit, float(unit) if ordinal else self._gap(labels, unit), ordinal)

    def frames(
        self, start: int | None = None, *, ordinal: bool = False, wanted: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Decode frames with their labels; damaged ones are left out.

        Args:
            start: Label of the key frame to start at; None is the start of the file.
            ordinal: Whether labels are ordinals.
            wanted: Tells the labels that matter; others may be skipped where no frame depends on them.
        """
        import av

        if start is None or not self._seek(start):
            self._open()
        codec = self._stream.codec_context
        count = 0
        for packet in self._packets():
            if wanted is not None and packet.pts is not None:
                codec.skip_frame = "DEFAULT" if wanted(packet.pts) else "NONREF"
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                label = count if ordinal else frame.pts
                count += 1
                if label is not None and not frame.is_corrupt:
                    yield label, frame

    def pick(self, timeline: Timeline, wanted: Sequence[int], *, seek: bool = True) -> Iterator[tuple[int, VideoFrame]]:
        """Yield the frame of every wanted label, or the next one that decodes; fewer where the file's end is damaged.

        Args:
            timeline: Frames of the file.
            wanted: Labels, rising.
            seek: Whether to jump to key frames; otherwise the file is decoded from its start.
        """
        chosen = frozenset(wanted).__contains__
        seek = seek and not timeline.ordinal

        def stream(start: int | None) -> Iterator[tuple[int, VideoFrame]]:
            return self.frames(start, ordinal=timeline.ordinal, wanted=None if timeline.ordinal else chosen)

        # Going back is cheaper than opening again, which decodes some frames to learn about the stream.
        frames = stream(timeline.keys[0] if seek and timeline.keys else None)
        jumped = seek
        current: tuple[int, VideoFrame] | None = None
        for target in wanted:
            key_index = bisect_right(timeline.keys, target) - 1
            position = current[0] if current else timeline.labels[0]
            if seek and key_index >= 0 and timeline.keys[key_index] > position:
                frames, current, jumped = stream(timeline.keys[key_index]), None, True
            while current is None or current[0] < target:
                following = next(frames, None)
                if jumped and following is not None and following[0] > target:
                    # The container jumps inexactly (MPEG-TS): go on without it.
                    seek, jumped, frames = False, False, stream(None)
                    continue
                if following is None:
                    return
                current, jumped = following, False
            yield current

    @property
    def _container_open(self) -> InputContainer:
        assert self._container is not None
        return self._container

    @property
    def _rate(self) -> float:
        # Raw streams state a made-up average; the guess looks at what the codec says.
        rate = self._stream.guessed_rate or self._stream.average_rate
        return float(rate) if rate else self._default_rate

    def _gap(self, stamps: Sequence[int], unit: Fraction) -> float:
        """Seconds for which the last frame is shown when its packet does not say: as long as the others on average."""
        if len(stamps) < 2:
            return 1 / self._rate
        return float((max(stamps) - min(stamps)) * unit) / (len(stamps) - 1)

    def _packets(self) -> Iterator[Any]:
        """Yield packets until the end or until the container is damaged."""
        import av

        try:
            yield from self._container_open.demux(self._stream)
        except av.FFmpegError:
            return

    def _seek(self, label: int) -> bool:
        import av

        try:
            self._container_open.seek(label, stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _open(self) -> None:
        """Open, or open anew at the start: not every container can seek back."""
        try:
            import av
        except ImportError as e:
            raise CapabilityError("reading videos needs PyAV", "pip install 'nvila[model]'") from e
        self._close()
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        source: Any = self._source
        if isinstance(source, (str, os.PathLike)):
            # The prefix keeps a name such as "concat:a|b" from being taken for a protocol.
            source = f"file:{Path(source)}"
        else:
            source.seek(0)
        try:
            self._container = av.open(source, "r", container_options=options, metadata_errors="replace")
        except av.FFmpegError as e:
            raise DataError(
                f"{self._where} is not a video that can be read: {e.strerror}",
                "the file may be cut short or of another kind; convert it to mp4",
            ) from e
        self._stream = self._video_stream(self._container)
        self._stream.thread_type = "AUTO"

    def _video_stream(self, container: InputContainer) -> VideoStream:
        from av.stream import Disposition

        streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if not streams:
            held = ", ".join(sorted({one.type for one in container.streams})) or "nothing"
            raise DataError(f"{self._where} has no video, only {held}", "give a file with a picture")
        stream = streams[0]
        if stream.codec_context is None:
            raise DataError(f"{self._where} uses a video codec that is not known", "convert it to mp4 with H.264")
        self._limits.check_pixels(stream.codec_context.width, stream.codec_context.height, f"{self._where}, a frame of")
        return stream

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


__all__ = ["FileSource", "Timeline", "VideoFile"]
