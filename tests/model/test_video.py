from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from nvila.data.containers import VideoFile
from nvila.data.images import DEFAULT_LIMITS, ImageLimits
from nvila.data.video import Video, load_video
from nvila.errors import CapabilityError, ConfigError, DataError

SIZE = (64, 48)
STEP = 5  # levels from one frame to the next: codecs are lossy, these steps are not lost


def write_video(
    target: Path | io.BytesIO,
    num_frames: int = 40,
    *,
    codec: str = "libx264",
    format: str | None = None,
    rate: int = 10,
    size: tuple[int, int] = SIZE,
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    **options: str,
) -> Any:
    """A video whose frame i is a flat grey of level 5 i, brighter in its left half; a key frame every 12 frames."""
    with av.open(str(target) if isinstance(target, Path) else target, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = 12
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(num_frames):
            picture = np.full((size[1], size[0], 3), STEP * index % 200, np.uint8)
            picture[:, : size[0] // 2] += 40
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target


def shown(video: Video) -> list[int]:
    """Which frames of `write_video` these are, by their grey level."""
    return [round(float(frame[:, -8:].mean()) / STEP) for frame in video.frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")
    return path


CONTAINERS = [
    ("a.mp4", "libx264"),
    ("a.mov", "libx264"),
    ("a.mkv", "libx264"),
    ("a.webm", "libvpx"),
    ("b.webm", "libvpx-vp9"),
    ("a.avi", "mpeg4"),
    ("a.ts", "libx264"),
    ("a.h264", "libx264"),
    ("a.gif", "gif"),
]


@pytest.mark.parametrize(("name", "codec"), CONTAINERS)
def test_even_sampling_of_every_container(name: str, codec: str, tmp_path: Path) -> None:
    video = load_video(write_video(tmp_path / name, codec=codec), num_frames=8)
    tolerance = {"gif": 2, "mpeg4": 1}.get(codec, 0)  # few greys, coarse greys
    expected = [0, 6, 11, 17, 22, 28, 33, 39]
    assert max(abs(a - b) for a, b in zip(shown(video), expected, strict=True)) <= tolerance
    assert video.timestamps == pytest.approx([index / 10 for index in expected])
    assert video.duration == pytest.approx(4.0)
    assert (video.size, len(video)) == (SIZE, 8)


@pytest.mark.parametrize(("name", "codec"), CONTAINERS)
def test_seeking_gives_the_pixels_of_decoding_everything(name: str, codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, codec=codec)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for num_frames in (3, 40):
        video = load_video(path, num_frames=num_frames)
        indices = np.round(np.linspace(0, 39, num_frames)).astype(int)
        np.testing.assert_array_equal(video.frames, np.stack([every[index] for index in indices]))


def test_few_frames_of_a_long_file_decode_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mp4", 240, size=(32, 32))
    decoded = []
    original = VideoFile.frames

    def counted(self: VideoFile, *args: Any, **kwargs: Any) -> Any:
        for item in original(self, *args, **kwargs):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(VideoFile, "frames", counted)
    load_video(path, num_frames=3)
    assert 3 <= len(decoded) <= 3 * 12


def test_sampling_at_a_rate_keeps_the_times_and_stops_at_the_limit(clip: Path) -> None:
    video = load_video(clip, num_frames=100, fps=2.0)
    assert shown(video) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert video.timestamps == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5])
    assert shown(load_video(clip, num_frames=3, fps=2.0)) == [0, 5, 10]


def test_sampling_faster_than_the_file_repeats_what_is_on_screen(clip: Path) -> None:
    video = load_video(clip, num_frames=6, fps=30.0)
    assert shown(video) == [0, 0, 0, 1, 1, 1]
    assert video.timestamps == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1])


def test_variable_rate_is_sampled_by_time_not_by_count(tmp_path: Path) -> None:
    # Ten frames in the first second, then one a second.
    path = write_video(tmp_path / "vfr.mkv", 15, pts=[*range(10), 10, 20, 30, 40, 50])
    video = load_video(path, num_frames=6, fps=1.0)
    assert shown(video) == [0, 10, 11, 12, 13, 14]
    assert video.timestamps == pytest.approx([0, 1, 2, 3, 4, 5])
    assert shown(load_video(path, num_frames=3)) == [0, 7, 14]


def test_first_frame_is_at_zero_whatever_the_clock_of_the_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", 10, pts=range(1000, 1010))
    video = load_video(path, num_frames=2)
    assert video.timestamps == pytest.approx((0.0, 0.9))
    assert video.duration == pytest.approx(1.0)


def test_short_clip_repeats_frames(tmp_path: Path) -> None:
    assert shown(load_video(write_video(tmp_path / "short.mp4", 3), num_frames=8)) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert shown(load_video(write_video(tmp_path / "one.mp4", 1), num_frames=2, fps=0.0)) == [0, 0]


def test_bytes_and_file_objects_are_files_too(clip: Path) -> None:
    expected = load_video(clip, num_frames=4)
    for source in (clip.read_bytes(), io.BytesIO(clip.read_bytes()), str(clip)):
        np.testing.assert_array_equal(load_video(source, num_frames=4).frames, expected.frames)


def test_frames_are_scaled_while_decoding(clip: Path) -> None:
    video = load_video(clip, num_frames=2, max_side=32)
    assert video.frames.shape == (2, 24, 32, 3)
    assert shown(video) == [0, 39]
    assert load_video(clip, num_frames=1, max_side=500).size == SIZE


@pytest.mark.parametrize(("degrees", "size", "bright"), [(90, (48, 64), "bottom"), (-90, (48, 64), "top")])
def test_frames_are_turned_as_the_camera_was_held(
    degrees: int, size: tuple[int, int], bright: str, tmp_path: Path
) -> None:
    video = load_video(write_video(tmp_path / "turned.mp4", 5, rotation=degrees), num_frames=1)
    assert video.size == size
    top, bottom = float(video.frames[0, :16].mean()), float(video.frames[0, -16:].mean())
    assert (top > bottom) == (bright == "top")


def test_frame_count_in_the_header_is_not_believed(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.avi", codec="mpeg4").read_bytes())
    position = data.index(b"vids") + 32  # length of the stream in its header
    assert int.from_bytes(data[position : position + 4], "little") == 40
    data[position : position + 4] = (4000).to_bytes(4, "little")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 4000
    assert shown(load_video(bytes(data), num_frames=3)) == [0, 20, 39]


def test_rate_of_zero_in_the_header_is_not_believed(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.avi", codec="mpeg4").read_bytes())
    for field in (data.index(b"avih") + 8, data.index(b"vids") + 24):  # microseconds a frame, frames a second
        data[field : field + 4] = bytes(4)
    video = load_video(bytes(data), num_frames=3)
    assert shown(video) == [0, 20, 39]
    assert 0 < video.timestamps[1] < video.timestamps[2] < video.duration


def test_file_that_stops_early_gives_what_it_has(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", noise_reduction="0").read_bytes()
    video = load_video(whole[: len(whole) * 2 // 3], num_frames=4)
    assert shown(video)[0] == 0
    assert 10 < shown(video)[-1] < 39
    assert list(video.timestamps) == sorted(set(video.timestamps))


def test_undecodable_tail_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = spoilt(write_video(tmp_path / "a.mov", codec="mjpeg"), range(24, 40))
    with caplog.at_level(logging.WARNING):
        video = load_video(data, num_frames=4)
    assert "its end is damaged" in caplog.text
    assert shown(video) == [0, 8, 15, 23]
    assert video.duration == pytest.approx(2.4)


def test_damage_in_the_middle_is_bridged_by_the_next_frame(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = spoilt(write_video(tmp_path / "a.mov", codec="mjpeg"), range(12, 24))
    with caplog.at_level(logging.WARNING):
        video = load_video(data, num_frames=14)
    assert "cannot be decoded; the next ones are used" in caplog.text
    assert shown(video) == [0, 3, 6, 9, 24, 24, 24, 24, 24, 27, 30, 33, 36, 39]
    assert video.timestamps[4:9] == pytest.approx([2.4] * 5)


def test_file_of_damaged_frames_alone_is_refused(tmp_path: Path) -> None:
    data = spoilt(write_video(tmp_path / "a.mp4"), range(40))
    with pytest.raises(DataError, match="no frame that can be decoded"):
        load_video(data)


def spoilt(path: Path, frames: range) -> bytes:
    """The file with the packets of some frames overwritten by zeros."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size and packet.pos is not None and packet.pts is not None:
                index = round(float(packet.pts * packet.time_base) * 10)
                if index in frames:
                    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(data)


def test_file_without_frames_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "none.mkv", 0)
    with pytest.raises(DataError, match=r"none\.mkv"):
        load_video(path)


def write_sound(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 8000, 0
        if picture is not None:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
            container.mux(picture.encode(None))
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sound\.m4a has no video, only audio"):
        load_video(write_sound(tmp_path / "sound.m4a"))


def test_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"song\.mp4 has no video"):
        load_video(write_sound(tmp_path / "song.mp4", cover=True))


def test_files_that_are_no_videos_are_named(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"no video at all " * 100)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:500])
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{clip}\n#EXT-X-ENDLIST\n")
    (tmp_path / "folder").mkdir()
    cases = {
        "empty.mp4": "is empty",
        "text.mp4": "is not a video that can be read",
        "cut.mp4": "is not a video that can be read",
        "list.m3u8": "is not a video that can be read",
        "absent.mp4": "does not exist",
        "folder": "holds no images",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=f"{name} {message}") as caught:
            load_video(tmp_path / name)
        assert caught.value.hint
    with pytest.raises(DataError, match="is not a regular file"):
        load_video("/dev/zero")
    with pytest.raises(DataError, match="no bytes"):
        load_video(b"")
    with pytest.raises(DataError, match="object of type int"):
        load_video(3)  # type: ignore[arg-type]


def test_frame_larger_than_the_limit_is_refused(clip: Path) -> None:
    with pytest.raises(DataError, match=r"64x48 pixels, more than 1,000"):
        load_video(clip, limits=ImageLimits(max_pixels=1000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"fps": -1.0}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_side": 0}, "max_side is 0"),
        ({"frame_rate": 0.0}, "frame_rate is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_video([np.zeros((2, 2, 3), np.uint8)], **arguments)


def test_directory_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for index in range(12):
        Image.new("RGB", (8, 6), (STEP * index,) * 3).save(tmp_path / f"frame_{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = load_video(tmp_path, num_frames=12)
    assert shown(video) == list(range(12))
    assert video.timestamps == tuple(range(12))
    assert video.duration == 12
    sampled = load_video(tmp_path, num_frames=99, fps=1.0, frame_rate=4.0)
    assert shown(sampled) == [0, 4, 8]
    assert sampled.timestamps == (0.0, 1.0, 2.0)


def test_only_chosen_files_of_a_directory_are_opened(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"")
    for index in (0, 4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    assert len(load_video(tmp_path, num_frames=2)) == 2
    with pytest.raises(DataError, match=r"frame 2 of .*2\.png is empty"):
        load_video(tmp_path, num_frames=3)


def test_sequences_of_arrays_and_images_are_videos() -> None:
    arrays = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 6, 8, 3), STEP, np.uint8)
    sources: list[Any] = [arrays, list(arrays), tuple(Image.fromarray(one) for one in arrays)]
    for source in sources:
        video = load_video(source, num_frames=4, frame_rate=5.0)
        assert shown(video) == [0, 3, 6, 9]
        assert video.timestamps == pytest.approx((0.0, 0.6, 1.2, 1.8))
    assert load_video(list(arrays), num_frames=1, max_side=4).frames.shape == (1, 3, 4, 3)


def test_frames_of_other_sizes_take_the_size_of_the_first() -> None:
    video = load_video([np.zeros((6, 8, 3), np.uint8), np.full((12, 10, 3), 200, np.uint8)], num_frames=2)
    assert video.frames.shape == (2, 6, 8, 3)
    assert video.frames[1].min() == 200


def test_bad_sequences_name_the_frame() -> None:
    with pytest.raises(DataError, match="has no frames"):
        load_video([])
    with pytest.raises(DataError, match=r"frame 1 of .*no numbers"):
        load_video([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), np.nan)], num_frames=2)


def test_video_checks_its_shapes() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    assert Video(frames, (0.0, 1.0), 2.0).size == (6, 4)
    with pytest.raises(DataError, match="2 frames have 1 timestamps"):
        Video(frames, (0.0,), 2.0)
    wrong_frames: list[Any] = [frames[0], frames[:0], frames.astype(np.float32), frames[..., :2]]
    for wrong in wrong_frames:
        with pytest.raises(DataError, match="are no video"):
            Video(wrong, (0.0, 1.0), 2.0)


def test_stream_without_clock_counts_frames_at_its_rate(tmp_path: Path) -> None:
    with VideoFile(write_video(tmp_path / "a.h264"), "a.h264", DEFAULT_LIMITS, 1.0) as file:
        timeline = file.scan()
    assert timeline.ordinal
    assert list(timeline.labels) == list(range(40))


@pytest.mark.parametrize("format", ["mp4", "matroska", "gif", "mpegts"])
def test_damaged_bytes_give_a_video_or_a_data_error(format: str) -> None:
    buffer = io.BytesIO()
    write_video(buffer, 14, format=format, codec="gif" if format == "gif" else "libx264", size=(32, 32))
    whole, noise = buffer.getvalue(), np.random.default_rng(4)
    for _ in range(25):
        data = bytearray(whole)
        for position in noise.integers(0, len(data), 8):
            data[position] = noise.integers(0, 256)
        # Anything but a DataError fails the test.
        with suppress(DataError):
            video = load_video(bytes(data), num_frames=3, limits=ImageLimits(max_pixels=10**6))
            assert len(video) == 3
            assert list(video.timestamps) == sorted(video.timestamps)


def test_missing_library_names_the_extra_to_install(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CapabilityError, match="needs PyAV"):
        load_video(clip)
