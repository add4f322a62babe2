"""Training data of one's own: mixtures of a registry, samples in memory, media read when a batch needs them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.mixtures import Registry
    from nvila.data.readers.record import MediaSource
    from nvila.data.records import Sample
    from nvila.progress import Reporter

REGISTRY_FILE = "registry.json"


@dataclass(frozen=True, slots=True)
class ReadMedia:
    """Media by key, each read where it lies; implements `nvila.training.media.MediaTable`."""

    sources: dict[str, MediaSource] = field(default_factory=dict)

    def image(self, key: str) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            DataError: It cannot be read.
        """
        from nvila.data.images import load_image

        return load_image(self.encoded(key))

    def encoded(self, key: str) -> bytes:
        """Return the bytes of one medium.

        Raises:
            DataError: It cannot be read.
        """
        return self.sources[key].read()


def write_registry(path: str | None, directory: Path) -> None:
    """Leave in a data artifact which registry its data are named in, so that another one is other data.

    Raises:
        DataError: The registry cannot be read.
    """
    from nvila_platform.artifacts import file_sha256

    facts: dict[str, Any] = {"registry": None}
    if path is not None:
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise DataError(f"data.registry {file} does not exist", "name a YAML file with your data sets")
        facts = {"registry": str(file), "sha256": file_sha256(file)}
    (directory / REGISTRY_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def read_mixtures(
    expressions: Sequence[str], directory: Path, reporter: Reporter
) -> tuple[dict[str, list[Sample]], ReadMedia]:
    """Read the samples of every mixture that stages name.

    Args:
        expressions: Names, paths or mixtures.
        directory: Data artifact with the registry.
        reporter: Told about records that cannot be used.

    Returns:
        Samples by expression, and the media of all.

    Raises:
        ConfigError: A name is unknown.
        DataError: Data cannot be read, or a mixture has no usable sample.
    """
    registry = _registry(directory)
    media = ReadMedia()
    datasets: dict[str, list[Sample]] = {}
    for expression in dict.fromkeys(expressions):
        samples, bad = [], 0
        for record in registry.open(expression).records():
            if record.sample is None:
                bad += 1
                continue
            samples.append(record.sample)
            media.sources.update(record.media)
        if not samples:
            raise DataError(f"mixture '{expression}' has no usable sample", "look at it with `nvila curate`")
        if bad:
            reporter.notice(f"{bad} records of '{expression}' cannot be used and are left out")
        datasets[expression] = samples
    return datasets, media


def _registry(directory: Path) -> Registry:
    from nvila.data.mixtures import Registry
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings

    path = json.loads((directory / REGISTRY_FILE).read_text(encoding="utf-8"))["registry"]
    filesystems = data_filesystems(Settings.load())
    return Registry(filesystems=filesystems) if path is None else Registry.load(path, filesystems)
