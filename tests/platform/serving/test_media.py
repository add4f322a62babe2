"""Images from strangers: what is accepted, how it is normalised, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.decoding import decode_image
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.media import MediaIntake, MediaSource, Medium

Load: TypeAlias = Callable[[str], Medium]

LIMITS = Limits(max_image_bytes=50_000, max_image_pixels=10_000, decode_workers=1)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(LIMITS)
    yield made
    made.close()


@pytest.fixture
def load(pool: DecoderPool) -> Load:
    """Load the one image of a request."""

    def one(url: str) -> Medium:
        source = MediaSource(kind="image", urls=(url,), param="messages[0]")
        return asyncio.run(MediaIntake(LIMITS, pool).load([source])).media[0]

    return one


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def refusal(load: Load, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        load(url)
    assert caught.value.param == "messages[0]"
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_documented_format_decodes_to_rgb(kind: str, load: Load) -> None:
    image = load(data_url(encoded(Image.new("RGB", (30, 20), "red"), kind)))
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    red, green, blue = pixel(image, 5, 5)
    assert red > 240
    assert green < 15
    assert blue < 15


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif)
    assert decode_image(data, LIMITS).size == (20, 30)


def test_16_bit_grey_keeps_its_shades() -> None:
    shades = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(shades)), LIMITS)
    assert [pixel(image, x)[0] for x in range(4)] == [0, 63, 127, 255]


def test_cmyk_becomes_the_colour_it_prints() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixel(decode_image(data, LIMITS), 4, 4)
    assert red > 200
    assert green < 60
    assert blue < 60


def test_palette_images_keep_their_colours() -> None:
    palette = Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(decode_image(encoded(palette), LIMITS)) == (10, 200, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode: str) -> None:
    if mode == "P":
        data = encoded(Image.new("P", (4, 4), 0), transparency=0)
    else:
        data = encoded(Image.new(mode, (4, 4), (0,) * len(mode)))
    assert pixel(decode_image(data, LIMITS)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("https://example.com/cat.png", "remote_image", "data: URI"),
        ("HTTP://example.com/cat.png", "remote_image", "does not fetch"),
        ("file:///etc/passwd", "invalid_image", "data: URI"),
        ("iVBORw0KGgo=", "invalid_image", "data: URI"),
        ("data:image/png,rawbytes", "invalid_image", "base64"),
        ("data:text/html;base64,PGI+", "invalid_image", "text/html"),
        ("data:image/png;base64,%%%%", "invalid_image", "not valid base64"),
        ("data:image/png;base64,", "invalid_image", "not an image"),
        (data_url(b"just some text that is no image"), "invalid_image", "not an image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "invalid_image", "use PNG"),
        (data_url(encoded(Image.new("RGB", (9, 9)), "TIFF"), "image/tiff"), "invalid_image", "use PNG"),
        (data_url(encoded(Image.effect_noise((60, 60), 9).convert("RGB"))[:-400]), "invalid_image", "damaged"),
    ],
    ids=[
        "https",
        "http-upper",
        "file",
        "bare-base64",
        "not-base64",
        "html",
        "junk",
        "empty",
        "text",
        "svg",
        "tiff",
        "cut",
    ],
)
def test_unusable_urls_are_refused_with_the_reason(load: Load, url: str, code: str, says: str) -> None:
    error = refusal(load, url)
    assert (error.status, error.code) == (400, code)
    assert says in error.message


def test_flipped_bits_in_pixels_are_noticed(load: Load) -> None:
    data = bytearray(encoded(Image.effect_noise((60, 60), 9).convert("RGB")))
    data[len(data) // 2] ^= 0xFF
    assert refusal(load, data_url(bytes(data))).code == "invalid_image"


def test_animations_are_refused(load: Load) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert "one frame" in refusal(load, data_url(data, "image/gif")).message


def test_too_many_bytes_are_refused_before_base64_is_decoded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *_args, **_options: pytest.fail("decoded"))
    error = refusal(load, f"data:image/png;base64,{'A' * 80_000}")
    assert (error.status, error.code) == (413, "image_too_large")
    assert "50000 bytes" in error.message


@pytest.mark.parametrize("side", [101, 20_000, 2_000_000], ids=["just-over", "over-pil-warning", "over-pil-error"])
def test_too_many_pixels_are_refused_from_the_header_alone(load: Load, side: int) -> None:
    # Only a header: decoding the pixels would fail as damaged, so the 413 proves that nothing was decoded.
    error = refusal(load, data_url(png_header(side, 100)))
    assert (error.status, error.code) == (413, "image_too_large")
    assert "10000 pixels" in error.message


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
