from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvila.data.media import ImageTable, write_image_table
from nvila.errors import DataError


def png(color: tuple[int, ...], mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.new(mode, (3, 2), color if mode != "L" else color[0]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    path = tmp_path / "images.parquet"
    rows = [("train/1", png((255, 0, 0))), ("train/0", png((7,), "L")), ("cut", png((1, 2, 3))[:40]), ("no", b"text")]
    assert write_image_table(path, iter(rows)) == 4
    return ImageTable.open(path)


def test_images_come_back_by_key_in_stored_order(table: ImageTable) -> None:
    assert list(table.keys()) == ["train/1", "train/0", "cut", "no"]
    assert len(table) == 4
    assert "train/0" in table
    assert "train/9" not in table
    assert table.encoded("train/1") == png((255, 0, 0))
    picture = table.image("train/1")
    assert (picture.mode, picture.size, picture.getpixel((2, 1))) == ("RGB", (3, 2), (255, 0, 0))


def test_grey_image_becomes_rgb(table: ImageTable) -> None:
    assert table.image("train/0").getpixel((0, 0)) == (7, 7, 7)


def test_unknown_key_names_key_and_table(table: ImageTable) -> None:
    with pytest.raises(DataError, match=r"image 'train/9' is not in .*images\.parquet"):
        table.image("train/9")


@pytest.mark.parametrize("key", ["cut", "no"])
def test_undecodable_image_is_named(table: ImageTable, key: str) -> None:
    with pytest.raises(DataError, match=f"image '{key}' in .* cannot be decoded"):
        table.image(key)


def test_file_that_is_no_image_table_is_a_data_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really PAR1")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"name": ["a"]}), other)
    for path in (tmp_path / "absent.parquet", broken, other):
        with pytest.raises(DataError, match="cannot read images from"):
            ImageTable.open(path)


def test_empty_table_is_fine(tmp_path: Path) -> None:
    write_image_table(tmp_path / "empty.parquet", [])
    assert len(ImageTable.open(tmp_path / "empty.parquet")) == 0
