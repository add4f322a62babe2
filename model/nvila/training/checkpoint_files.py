"""One checkpoint of a training stage: a folder of safetensors and JSON, sealed by a manifest with digests.

A folder is written under another name and gets its own in one rename, after the manifest. Nothing in it can execute
code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from nvila.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "training.json"
FORMAT = 1
_SHARD_BYTES = 512 << 20
_REDO = "it is left where it is for inspection; delete it when it is not needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: str


def write_file(folder: Path, name: str, content: bytes) -> SavedFile:
    """Write a file and wait until it is on the disk.

    Raises:
        OSError: It cannot be written, such as on a full disk.
    """
    with (folder / name).open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return SavedFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_json(folder: Path, name: str, value: Mapping[str, Any]) -> SavedFile:
    """Write a value as JSON; see `write_file`."""
    return write_file(folder, name, json.dumps(value, allow_nan=False).encode())


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> SavedFile:
    """Write tensors as one safetensors file; see `write_file`."""
    return write_file(folder, name, tensors_to_bytes({key: value.cpu() for key, value in tensors.items()}))


@dataclass(slots=True)
class ShardWriter:
    """Writes tensors one after the other, in files of a bounded size.

    Args:
        folder: Where the files go.
        shard_bytes: A file is closed when it would grow beyond this.
    """

    folder: Path
    shard_bytes: int = _SHARD_BYTES
    files: list[SavedFile] = field(default_factory=list)
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; raises `OSError` when a file cannot be written."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self.shard_bytes:
            self.flush()
        # Copied from the device, or from memory that training goes on to change.
        self._waiting[name] = tensor.detach().to("cpu", copy=True)
        self._bytes += size

    def flush(self) -> None:
        """Write what is waiting; raises `OSError` when that fails."""
        if self._waiting:
            waiting, self._waiting, self._bytes = self._waiting, {}, 0
            self.files.append(write_tensors(self.folder, f"state-{len(self.files) + 1:05d}.safetensors", waiting))


def seal(partial: Path, folder: Path, files: Iterable[SavedFile]) -> None:
    """Write the manifest of a complete folder and give it its name.

    Raises:
        OSError: The disk is full or the folder cannot be renamed.
    """
    listed = sorted((asdict(file) for file in files), key=lambda entry: str(entry["name"]))
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    write_json(partial, MANIFEST, {"format": FORMAT, "files": listed, "sha256": digest})
    sync_folder(partial)
    partial.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> None:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointError: With the file that is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        listed = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {manifest['format']}, this version reads {FORMAT}", _REDO)
        if hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest() != manifest["sha256"]:
            raise CheckpointError(f"{path} was changed after it was written", _REDO)
        files = [SavedFile(**entry) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} is missing or damaged: {e}", _REDO) from e
    for file in files:
        _verify_file(folder, file)


def _verify_file(folder: Path, file: SavedFile) -> None:
    path = folder / file.name
    try:
        with path.open("rb") as content:
            size, found = path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}", _REDO) from e
    if size != file.size_bytes:
        raise CheckpointError(f"{path} has {size} bytes, the manifest says {file.size_bytes}", _REDO)
    if found != file.sha256:
        raise CheckpointError(f"{path} has the sha256 {found[:12]}, the manifest says {file.sha256[:12]}", _REDO)


class CheckpointReader:
    """Reads a verified checkpoint; a `nvila.training.partitions.TensorSource`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> CheckpointReader:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._open.close()

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of that name."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._files)

    def stretch(self, name: str, start: int, length: int) -> Tensor:
        """Return `length` elements of a flat tensor from `start` on."""
        values: Tensor = self._files[name].get_slice(name)[start : start + length]
        return values

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file; None when there is none of that name."""
        path = self.folder / name
        return dict(json.loads(path.read_bytes())) if path.is_file() else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file of their own; empty when there is none of that name."""
        path = self.folder / name
        return tensors_from_bytes(path.read_bytes()) if path.is_file() else {}


def remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that a cut deletion never looks like a damaged one."""
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
