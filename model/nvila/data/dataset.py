"""A data directory: samples as JSON lines and their images in one table.

Layout: `<split>.jsonl` files, `images.parquet`, and `videos.parquet` where there are videos. Every step that reads data
reads this.
"""

from __future__ import annotations

from pathlib import Path

from nvila.data.records import Sample, read_jsonl
from nvila.errors import DataError

IMAGES_FILE = "images.parquet"
VIDEOS_FILE = "videos.parquet"


def load_samples(directory: Path, split: str) -> list[Sample]:
    """Read all samples of a split.

    Raises:
        DataError: The split does not exist or holds a broken line.
    """
    path = directory / f"{split}.jsonl"
    if not path.is_file():
        known = sorted(file.stem for file in directory.glob("*.jsonl"))
        raise DataError(f"{directory} has no split '{split}'", f"it has: {', '.join(known) or 'none'}")
    return list(read_jsonl(path))
