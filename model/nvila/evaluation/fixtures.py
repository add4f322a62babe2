"""Fixtures: a few samples of a task in the schema of its data, drawn the same on every machine."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.data.encoding import encode_video
from nvila.errors import ConfigError
from nvila.evaluation.task import Task

TABLE = "data.parquet"
_SIZE = (96, 64)
_FRAMES_A_COLOUR, _RATE = 4, 4


def write_fixture(task: Task, folder: Path) -> Path:
    """Write the fixture of a task as a folder like those that users have.

    Args:
        task: The task.
        folder: Made when it does not exist; what it holds of the same names is replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: The task has no fixture.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fixture = task.file.fixture
    if fixture is None:
        raise ConfigError(f"the task {task.name} has no fixture", "run it with --data, or write one in its file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in fixture.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_file(content))
    names = list(dict.fromkeys(name for row in fixture.rows for name in row))
    columns = {name: [_cell(row.get(name)) for row in fixture.rows] for name in names}
    pq.write_table(pa.table(columns), folder / TABLE)
    return folder


def picture(text: str) -> bytes:
    """Draw a text, black on white, as PNG."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", _SIZE, "white")
    ImageDraw.Draw(image).multiline_text((6, 6), text, fill="black")
    return _png(image)


def clip(colours: list[str]) -> bytes:
    """Show one colour after the other, each for a second, as MP4."""
    from PIL import Image

    frames = (Image.new("RGB", (32, 32), colour) for colour in colours for _ in range(_FRAMES_A_COLOUR))
    return encode_video(frames, rate=_RATE)


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"image"}:
        return {"bytes": picture(str(value["image"])), "path": None}
    return [_cell(item) for item in value] if isinstance(value, list) else value


def _file(content: Any) -> bytes:
    if isinstance(content, Mapping) and set(content) == {"video"}:
        return clip([str(colour) for colour in content["video"]])
    if isinstance(content, Mapping) and set(content) == {"image"}:
        return picture(str(content["image"]))
    return str(content).encode()


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
