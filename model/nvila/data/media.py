"""Image tables: the images of a data set in one Parquet file, looked up by key."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


def write_image_table(path: Path, items: Iterable[tuple[str, bytes]]) -> int:
    """Write encoded images (PNG, JPEG ...) under their keys and return how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(items)
    table = pa.table({"key": [key for key, _ in rows], "bytes": pa.array([data for _, data in rows], pa.binary())})
    pq.write_table(table, path, compression="none")
    return len(rows)


class ImageTable:
    """Read access to an image table; encoded bytes stay in memory, pixels are decoded on demand."""

    def __init__(self, encoded: dict[str, bytes], where: str) -> None:
        self._encoded = encoded
        self._where = where

    @classmethod
    def open(cls, source: Path | BinaryIO, where: str | None = None) -> ImageTable:
        """Open a table written by `write_image_table`.

        Args:
            source: The file, as a path or opened.
            where: Its name in messages; None takes the path.

        Raises:
            DataError: The file is missing or not such a table.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        where = where or str(source)
        try:
            table = pq.read_table(source, columns=["key", "bytes"])
        except (OSError, pa.ArrowException) as e:
            raise DataError(f"cannot read images from {where}: {e}", "make the data artifact again") from e
        return cls(dict(zip(table["key"].to_pylist(), table["bytes"].to_pylist(), strict=True)), where)

    def __len__(self) -> int:
        return len(self._encoded)

    def __contains__(self, key: str) -> bool:
        return key in self._encoded

    def keys(self) -> Iterator[str]:
        """Iterate over the keys in stored order."""
        return iter(self._encoded)

    def encoded(self, key: str) -> bytes:
        """Return the stored bytes of one image.

        Raises:
            DataError: The key is unknown.
        """
        try:
            return self._encoded[key]
        except KeyError:
            raise DataError(f"image '{key}' is not in {self._where}", "samples and images must come together") from None

    def image(self, key: str) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            DataError: The key is unknown or the bytes are not an image.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.encoded(key))) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as e:
            raise DataError(f"image '{key}' in {self._where} cannot be decoded: {e}", "replace the file") from e
