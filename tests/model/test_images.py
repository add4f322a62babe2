from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from nvila.data.images import DEFAULT_LIMITS, ImageLimits, load_image
from nvila.errors import DataError

ORIENTATION = 0x0112


def file_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "bytearray", "file", "image", "array"])
def test_every_kind_of_source_gives_the_same_image(kind: str, tmp_path: Path) -> None:
    picture = gradient()
    path = tmp_path / "a.png"
    path.write_bytes(file_bytes(picture))
    source: Any = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "file": io.BytesIO(path.read_bytes()),
        "image": picture,
        "array": np.asarray(picture),
    }[kind]
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(pixels(loaded), pixels(picture))


@pytest.mark.parametrize(
    "format", ["AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PPM", "TGA", "TIFF", "WEBP"]
)
def test_common_formats_are_read(format: str) -> None:
    loaded = load_image(file_bytes(Image.new("RGB", (16, 16), (250, 3, 5)), format))
    assert (loaded.mode, loaded.size) == ("RGB", (16, 16))
    assert np.abs(pixels(loaded).astype(int) - (250, 3, 5)).max() <= 8


def test_result_is_the_callers_own() -> None:
    picture = gradient()
    loaded = load_image(picture)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    loaded = load_image(file_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels(loaded).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    levels = np.array([[0, 128, 257, 32768, 65280, 65535]], dtype=np.uint16)
    loaded = load_image(file_bytes(Image.fromarray(levels), format))
    assert pixels(loaded)[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]
    assert pixels(loaded)[0, :, 0].tolist() == pixels(loaded)[0, :, 2].tolist()


def test_palette_and_bilevel_images_become_colours() -> None:
    loaded = load_image(
        file_bytes(Image.new("RGB", (4, 4), (200, 30, 40)).convert("P", palette=Image.Palette.ADAPTIVE))
    )
    assert loaded.getpixel((2, 2)) == (200, 30, 40)
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_opaque_ones_keep_their_colour(mode: str) -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    layer.putpixel((1, 0), (80, 80, 80, 255))
    options: dict[str, Any] = {}
    picture = layer.convert(mode) if mode != "P" else Image.new("P", (2, 1), 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 80, 80, 80])
        picture.putpixel((1, 0), 1)
        options["transparency"] = 0
    loaded = load_image(file_bytes(picture, **options))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (80, 80, 80)]


def test_half_transparent_pixel_is_mixed_with_white() -> None:
    assert load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_image_is_turned_as_exif_says(format: str) -> None:
    picture = Image.new("RGB", (16, 8), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held upright: turn by 90 degrees clockwise
    loaded = load_image(file_bytes(picture, format, exif=exif, quality=95))
    assert loaded.size == (8, 16)
    top, bottom = pixels(loaded)[2, 4].astype(int), pixels(loaded)[13, 4].astype(int)
    assert np.abs(top - (255, 0, 0)).max() <= 12
    assert np.abs(bottom - (0, 0, 255)).max() <= 12
    assert load_image(loaded).size == (8, 16)  # not turned again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation: int) -> None:
    picture = gradient()
    picture.getexif()[ORIENTATION] = orientation
    data = file_bytes(picture, exif=picture.getexif())
    with Image.open(io.BytesIO(data)) as stored:
        np.testing.assert_array_equal(pixels(load_image(data)), pixels(ImageOps.exif_transpose(stored)))


def test_unreadable_exif_loses_the_orientation_only(caplog: pytest.LogCaptureFixture) -> None:
    assert load_image(file_bytes(gradient(), exif=b"Exif\0\0garbage")).size == (24, 16)
    assert "orientation ignored" in caplog.text


def test_orientation_survives_a_damaged_tag_beside_it() -> None:
    tags = struct.pack(">HHII", 0x011A, 2, 6, 38) + struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4) + b"maker\0"
    assert load_image(file_bytes(gradient(), "JPEG", exif=exif)).size == (16, 24)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = file_bytes(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(load_image(data))[3, 3].astype(int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_are_images_too(size: tuple[int, int]) -> None:
    assert load_image(file_bytes(Image.new("RGB", size, (1, 2, 3)))).size == size


def test_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(9500, 9500))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match=r"bomb\.png has 9500x9500") as e:
        load_image(path)
    assert "max_pixels" in e.value.hint
    path.write_bytes(png_claiming(40000, 40000))
    with pytest.raises(DataError, match=r"bomb\.png is too large"):
        load_image(path)
    path.write_bytes(png_claiming(101, 100))
    with pytest.raises(DataError, match="101x100 pixels, more than 10,000"):
        load_image(path, max_pixels=10_000)


def test_limits_hold_for_every_kind_of_source() -> None:
    limits = ImageLimits(max_pixels=99)
    picture = Image.new("RGB", (10, 10))
    sources: list[Any] = [picture, np.asarray(picture), file_bytes(picture)]
    for source in sources:
        with pytest.raises(DataError, match="10x10 pixels, more than 99"):
            load_image(source, limits=limits)
        assert load_image(source, limits=limits, max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="more than 20 bytes"):
        load_image(io.BytesIO(file_bytes(gradient())), limits=ImageLimits(max_bytes=20))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = file_bytes(gradient(64, 64))
    jpeg = file_bytes(gradient(64, 64), "JPEG")
    cases = {
        "empty.png": (b"", "is empty"),
        "cut.png": (whole[: len(whole) // 2], "cannot be decoded"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "header.png": (whole[:20], "is not an image|cannot be decoded"),
        "text.png": (b"hello", "is not an image"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} ({message})") as caught:
            load_image(tmp_path / name)
        assert caught.value.hint


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "TGA", "ICO"])
def test_damaged_bytes_give_an_image_or_a_data_error(format: str) -> None:
    noise = np.random.default_rng(3)
    whole = file_bytes(gradient(32, 32), format)
    for _ in range(60):
        data = bytearray(whole[: noise.integers(1, len(whole) + 1)])
        for position in noise.integers(0, len(data), 6):
            data[position] = noise.integers(0, 256)
        # Anything but a DataError fails the test.
        with suppress(DataError):
            assert load_image(bytes(data), max_pixels=10**6).mode == "RGB"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "absent.png", "does not exist"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            load_image(source)
    with pytest.raises(DataError, match="download it first"):
        load_image("https://example.org/a.png")


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("permission denied")

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.png: permission denied"):
        load_image(tmp_path / "a.png")


def test_sources_of_other_types_are_refused() -> None:
    with pytest.raises(DataError, match="object of type int"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gives text"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"has no pixels \(0x5\)"):
        load_image(Image.new("RGB", (0, 5)))


def test_arrays_of_known_range_are_scaled() -> None:
    grey = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(load_image(grey))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(load_image(np.array([[[True], [False]]])))[0, :, 1].tolist() == [255, 0]
    assert pixels(load_image(np.full((1, 1, 3), 65535, np.uint16))).tolist() == [[[255, 255, 255]]]
    assert pixels(load_image(np.array([[[9, 9, 9, 0]]], np.uint8))).tolist() == [[[255, 255, 255]]]
    assert load_image(Image.fromarray(grey)).getpixel((1, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2, 3), np.nan), "no numbers"),
        (np.full((2, 2, 3), np.inf), "outside"),
        (np.full((2, 2, 3), 200.0), "outside"),
        (np.zeros((2, 2, 3), np.int64), "levels of type int64"),
        (np.zeros((3, 2, 2), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
    ],
    ids=["nan", "infinite", "unscaled floats", "integers", "channels first", "flat", "empty"],
)
def test_arrays_of_unknown_meaning_are_refused(array: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(array)


def test_integer_images_outside_sixteen_bits_are_refused() -> None:
    with pytest.raises(DataError, match=r"outside 0\.\.65535"):
        load_image(Image.new("I", (2, 2), 70_000))


def test_default_limits_are_where_pillow_warns() -> None:
    assert DEFAULT_LIMITS.max_pixels == Image.MAX_IMAGE_PIXELS
