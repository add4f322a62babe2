"""One step, one directory: content keys, manifests and their verification.

A directory with a `manifest.json` is finished and never changes again; one without is unfinished. The manifest is
written last and atomically, so a crash at any point leaves an unfinished directory and never a wrong one. Names that
begin with a dot (scratch files, resume checkpoints) belong to the working process and are not outputs.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from nvila.errors import ArtifactError, ConfigError, ResourceError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
HIDDEN = "***"

_PACKAGES = ("nvila", "nvila_platform", "nvila_pipelines")
_SECRET_WORDS = frozenset({"token", "secret", "password", "passwd", "passphrase", "credential", "credentials"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One output file, with its path relative to the directory in POSIX form."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished directory holds and where it came from.

    Args:
        step: Name of the step that wrote the directory.
        schema_version: Version of this record's layout.
        key: Content key of the step (`content_key`).
        config: The resolved configuration, secrets redacted.
        inputs: Digest of every input by name.
        outputs: The output files, sorted by path.
        code_version: Version of the code that ran (`code_version`).
        started_at: UTC time in ISO form.
        finished_at: UTC time in ISO form.
        metrics: Numbers that the step reports about its result.
    """

    step: str
    schema_version: int
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: tuple[FileEntry, ...]
    code_version: str
    started_at: str
    finished_at: str
    metrics: Mapping[str, float]

    @property
    def digest(self) -> str:
        """Identity of the content: equal bytes of one step give equal digests whenever they were made."""
        return _sha256_json([self.step, sorted([entry.path, entry.sha256] for entry in self.outputs)])


def content_key(step: str, config: Mapping[str, Any], inputs: Mapping[str, str], code_version: str) -> str:
    """Return the key under which the result of this work is stored and found again.

    Args:
        step: Name of the step.
        config: The resolved configuration as plain values.
        inputs: Digest of every input by name.
        code_version: Usually `code_version()`.

    Raises:
        ConfigError: The configuration holds a value that has no JSON form.
    """
    return _sha256_json([step, config, dict(inputs), code_version])


@cache
def code_version() -> str:
    """Return the package version and a digest of the three packages' source files, such as `0.1.0+9f2c51d07a3e`."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for root in _source_roots(package):
            for path in sorted(root.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                    digest.update(bytes.fromhex(file_sha256(path)))
    version = getattr(importlib.import_module("nvila"), "__version__", "0")
    return f"{version}+{digest.hexdigest()[:12]}"


def write_manifest(
    directory: Path,
    *,
    step: str,
    key: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    code_version: str,
    started_at: str,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Finish a directory: hash everything in it and write the manifest, last and atomically.

    Args:
        directory: Holds the outputs.
        step: Name of the step.
        key: Its content key.
        config: The resolved configuration; secrets are redacted here.
        inputs: Digest of every input by name.
        code_version: Version of the code that ran.
        started_at: When the step started (`utc_now`).
        metrics: Numbers that the step reports.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: An output is a link, or a metric is not finite.
        ResourceError: The disk is full.
        ConfigError: The directory cannot be written.
    """
    with storage_errors(directory):
        manifest = Manifest(
            step=step,
            schema_version=SCHEMA_VERSION,
            key=key,
            config=redact(json.loads(_canonical(config))),
            inputs=dict(inputs),
            outputs=tuple(_outputs(directory)),
            code_version=code_version,
            started_at=started_at,
            finished_at=utc_now(),
            metrics=_finite(metrics or {}),
        )
        record = asdict(manifest)
        record["digest"] = manifest.digest
        record["checksum"] = _sha256_json(record)
        write_atomically(directory / MANIFEST_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None means that the directory is missing or unfinished.

    Raises:
        ArtifactError: The manifest is broken, was changed after it was written, or is of another schema.
    """
    path = directory / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise ArtifactError(f"{path}: cannot be read: {e}", "discard the directory and run the step again") from e
    return parse_manifest(text, where=str(path))


def parse_manifest(text: str, *, where: str) -> Manifest:
    """Parse and check the text of a manifest.

    Args:
        text: The JSON text.
        where: File or object, for the error message.

    Raises:
        ArtifactError: The text is broken, was changed after it was written, or is of another schema.
    """
    redo = "discard the directory and run the step again"
    try:
        record = json.loads(text)
        version = record["schema_version"]
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where}: manifest schema {version}, this version reads {SCHEMA_VERSION}",
                "use the nvila version that wrote it, or another workspace",
            )
        if record.pop("checksum") != _sha256_json(record):
            raise ArtifactError(f"{where}: was changed after it was written", redo)
        del record["digest"]
        record["outputs"] = tuple(FileEntry(**entry) for entry in record["outputs"])
        manifest = Manifest(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{where}: not a manifest: {e!r}", redo) from e
    for entry in manifest.outputs:
        parts = PurePosixPath(entry.path)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise ArtifactError(f"{where}: output path {entry.path!r} leaves the directory", redo)
    return manifest


def verify(directory: Path) -> Manifest:
    """Check every output of a finished directory against its manifest.

    Returns:
        The manifest.

    Raises:
        ArtifactError: The directory is unfinished, or a file is missing or damaged; the message names it.
    """
    manifest = finished_manifest(directory)
    for entry in manifest.outputs:
        verify_file(directory, entry)
    return manifest


def finished_manifest(directory: Path) -> Manifest:
    """Read the manifest of a directory that must be finished; its files are not looked at.

    Raises:
        ArtifactError: The directory is missing or unfinished, or its manifest is broken.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise ArtifactError(f"{directory}: no {MANIFEST_NAME}, the step did not finish", "run the step again")
    return manifest


def verify_file(directory: Path, entry: FileEntry) -> None:
    """Check one output of a directory.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    redo = "discard the directory and run the step again"
    path = directory / entry.path
    try:
        size = path.stat().st_size
        found = file_sha256(path) if size == entry.size_bytes else ""
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read: {e.strerror}", redo) from e
    if size != entry.size_bytes:
        raise ArtifactError(f"{path}: has {size} bytes, the manifest says {entry.size_bytes}", redo)
    if found != entry.sha256:
        raise ArtifactError(f"{path}: sha256 {found[:12]}, the manifest says {entry.sha256[:12]}", redo)


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which text under secret-looking names, and passwords inside URLs, are hidden.

    Numbers stay: `image_token_id: 7` is no secret.

    Example:
        >>> redact({"api_key": "abc", "max_tokens": 64})
        {'api_key': '***', 'max_tokens': 64}
    """
    return {name: _redacted(value, secret=_is_secret(str(name))) for name, value in config.items()}


def utc_now() -> str:
    """Return the current UTC time in ISO form."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: readers see the old text or the new, and a crash leaves no half file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the file-system errors that a user can fix into typed ones.

    Args:
        path: What was being written, for the message when the error itself names no file.

    Raises:
        ResourceError: No space is left.
        ConfigError: The place cannot be written: read-only, no permission, or a file where a folder should be.
    """
    try:
        yield
    except OSError as e:
        where = e.filename if isinstance(e.filename, str) else path
        if e.errno in _NO_SPACE:
            raise ResourceError(f"no space left while writing {where}", "free some space, then run it again") from e
        if e.errno in _NOT_WRITABLE:
            raise ConfigError(
                f"cannot write {where}: {e.strerror}", "choose a folder that can be written with --workspace"
            ) from e
        raise


def _outputs(directory: Path) -> Iterator[FileEntry]:
    paths = (path for path in directory.rglob("*") if path != directory / MANIFEST_NAME)
    for path in sorted(paths, key=lambda path: path.relative_to(directory).as_posix()):
        relative = path.relative_to(directory)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_symlink():
            raise ArtifactError(f"{path}: is a link, its target could change later", "write a copy of the file")
        if path.is_file():
            _sync(path)
            yield FileEntry(path=relative.as_posix(), sha256=file_sha256(path), size_bytes=path.stat().st_size)


def _sync(path: Path) -> None:
    # The manifest vouches for the outputs, so they must reach the disk before it does.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _source_roots(package: str) -> list[Path]:
    # Found without importing: the packages above this one must stay out of this process.
    spec = importlib.util.find_spec(package)
    return [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ArtifactError(f"metric '{name}' is {value}", "the step's result is unusable; look at its log")
    return {name: float(value) for name, value in metrics.items()}


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return not _SECRET_WORDS.isdisjoint(words) or words[-1:] == ["key"] or words[-2:] == ["key", "id"]


def _redacted(value: Any, *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _redacted(inner, secret=secret or _is_secret(str(name))) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, secret=secret) for inner in value]
    if isinstance(value, str) and value:
        return HIDDEN if secret else _URL_PASSWORD.sub(HIDDEN, value)
    return value


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"a configuration value has no JSON form: {e}", "use text, numbers, lists and maps") from e


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return value.as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")
