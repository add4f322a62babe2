"""What the scores of a data set depend on, written beside them, so that scores of different making never mix."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ArtifactError, ConfigError
from nvila_platform.artifacts import file_sha256, write_atomically

if TYPE_CHECKING:
    from nvila.data.mixtures import Registry
    from nvila.data.readers.locations import FileSystems
    from nvila.data.readers.record import CountedStream

SPEC_FILE = "scoring.json"
# Raised when the same inputs would give other scores than before.
_SCORING_VERSION = 1
_DATA_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".gz", ".parquet", ".arrow", ".tar", ".yaml", ".yml"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """A data set: a path or address, or names of a file of mixtures.

    Args:
        data: Path, address, or mixture expression.
        mixtures: YAML file that defines the names in `data`.
        media_dir: Folder that the paths of images and videos start from; of one data set only.

    Raises:
        ConfigError: Mixtures have a folder of media.
    """

    data: str
    mixtures: str | None = None
    media_dir: str | None = None

    def __post_init__(self) -> None:
        if self.mixtures is not None and self.media_dir is not None:
            raise ConfigError(
                "--media-dir is for one data set, --mixtures names several", f"write media_dir into {self.mixtures}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """How a data set is scored.

    Args:
        data: The data set.
        data_digest: Identity of its files, as far as that is cheap to know.
        small: Folder of the small model.
        small_digest: Identity of its files.
        large: Folder of the large model.
        large_digest: Identity of its files.
        dtype: Type of weights and activations.
        device: `cpu` or `cuda`.
        threads: Threads of a process on the CPU; another number may change the last digits.
        shard_size: Records of a shard.
        batch_tokens: Most positions of a batch.
        records: Records of the data set; None when it was not counted.
        max_bad: Largest share of records without a score that was accepted; scores do not depend on it.
    """

    data: DataSpec
    data_digest: str
    small: str
    small_digest: str
    large: str
    large_digest: str
    dtype: str
    device: str
    threads: int
    shard_size: int
    batch_tokens: int
    records: int | None = None
    max_bad: float = 0.1

    def depends(self) -> dict[str, Any]:
        """Return all that the scores depend on; where things lie is not part of it."""
        return {
            "version": _SCORING_VERSION,
            "data": self.data_digest,
            "media_dir": self.data.media_dir,
            "small": self.small_digest,
            "large": self.large_digest,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads if self.device == "cpu" else None,
            "shard_size": self.shard_size,
            "batch_tokens": self.batch_tokens,
        }

    @property
    def digest(self) -> str:
        """Identity of the scores."""
        return hashlib.sha256(json.dumps(self.depends(), sort_keys=True).encode()).hexdigest()

    def save(self, out: Path) -> None:
        """Write it into the directory of the scores."""
        write_atomically(out / SPEC_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, out: Path) -> ScoringSpec | None:
        """Read what an earlier run left; None when there was none.

        Raises:
            ArtifactError: The file is damaged.
        """
        path = out / SPEC_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**raw, "data": DataSpec(**raw["data"])})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ArtifactError(f"{path} cannot be read: {e}", "choose another folder with --out") from e

    def refuse_other(self, earlier: ScoringSpec, out: Path) -> None:
        """Refuse to go on with scores of another making.

        Raises:
            ConfigError: With what differs.
        """
        before, now = earlier.depends(), self.depends()
        changed = [
            f"{name}: {_short(before[name])} -> {_short(now[name])}" for name in now if before[name] != now[name]
        ]
        if changed:
            raise ConfigError(
                f"{out} holds scores of another configuration ({', '.join(changed)})",
                "choose another folder with --out, or the same options as before",
            )


def open_stream(spec: DataSpec) -> CountedStream:
    """Open the data set; `s3://` is the service that the settings name.

    Raises:
        ConfigError: A name is unknown, or the address cannot be used.
        DataError: There is no such data.
    """
    from nvila.data.readers.opening import DatasetSpec, open_dataset

    if spec.media_dir is None:
        return _registry(spec).open(spec.data)
    return open_dataset(DatasetSpec(path=spec.data, media_dir=spec.media_dir), filesystems=_filesystems())


def _registry(spec: DataSpec) -> Registry:
    from nvila.data.mixtures import Registry

    filesystems = _filesystems()
    if spec.mixtures is None:
        return Registry(filesystems=filesystems)
    return Registry.load(spec.mixtures, filesystems)


def _filesystems() -> FileSystems:
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings

    return data_filesystems(Settings.load())


def folder_digest(folder: Path) -> str:
    """Return the identity of a model folder: of the names and contents of its files.

    Raises:
        ArtifactError: A file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    except OSError as e:
        raise ArtifactError(f"{folder} cannot be read: {e.strerror}", "check the folder of the model") from e
    return digest.hexdigest()


def data_digest(spec: DataSpec) -> str:
    """Return the identity of the data: names, sizes and times of local files, and the addresses of others.

    Raises:
        ConfigError: A file of mixtures or a name in it is wrong.
    """
    names = [] if spec.mixtures is None else [spec.data, file_sha256(Path(spec.mixtures))]
    leaves = [] if spec.media_dir is not None else _registry(spec).expand(spec.data)
    places = [leaf.name for leaf in leaves] or [spec.data]
    for place in places:
        files = list(_data_files(Path(place.removeprefix("file://"))))
        names += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files] or [place]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _data_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in _DATA_SUFFIXES)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
