"""Where a model comes from: a folder, `models:/NAME@ALIAS`, or a place in a bucket.

Finding and fetching are two steps. The first is cheap and says who the model is now; the second brings its files to
this machine and checks them against their digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError, ConfigError
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_platform.store import ArtifactRef, ArtifactStore

DEFAULT_NAME = "nvila"
UNREGISTERED, UNKNOWN = "unregistered", "unknown"
REGISTRY = "models:/"
BUCKET = "s3://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What an address means now.

    Args:
        address: As it was given.
        name: Registered name; a default where there is none.
        version: Registered version.
        digest: Digest of the artifact's files.
        ref: The artifact, if it is in a store.
    """

    address: str
    name: str = DEFAULT_NAME
    version: str = UNREGISTERED
    digest: str = UNKNOWN
    ref: ArtifactRef | None = None


def locate(address: str | Path, settings: Settings) -> Located:
    """Find out which model an address means, without bringing its files.

    Args:
        address: A folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `s3://BUCKET/PREFIX`.
        settings: Where registry, store and bucket are.

    Raises:
        ConfigError: There is no such model.
        ArtifactError: What is there is no model of ours.
        InfrastructureError: The registry or the bucket cannot be reached.
    """
    text = str(address)
    if isinstance(address, str) and address.startswith(REGISTRY):
        from nvila_platform.registry import resolve

        found = resolve(settings, address)
        return Located(address=text, name=found.name, version=str(found.version), digest=found.digest, ref=found.ref)
    if isinstance(address, str) and address.startswith(BUCKET):
        from nvila_platform.s3_address import find_in_bucket

        ref = find_in_bucket(address, settings)
        return Located(address=text, digest=ref.digest, ref=ref)
    from nvila_platform.artifacts import read_manifest

    directory = model_folder(Path(address))
    manifest = read_manifest(directory) or read_manifest(directory.parent)
    return Located(address=text, digest=UNKNOWN if manifest is None else manifest.digest)


def fetch(located: Located, settings: Settings, *, verify: bool = True) -> Path:
    """Return the local folder of a model, its files checked against their digests.

    Args:
        located: What `locate` found.
        settings: Where the store is.
        verify: Read all files of a folder that has a manifest; what comes from a store is always checked.

    Raises:
        ConfigError: There is no model in it.
        ArtifactError: Files are missing or damaged, or others than those that were located.
        InfrastructureError: The store cannot be reached, and the files are not here.
    """
    if located.ref is not None:
        return model_folder(_store(located.address, settings).fetch(located.ref))
    from nvila_platform import artifacts

    directory = model_folder(Path(located.address))
    if verify:
        for folder in (directory, directory.parent):
            if artifacts.read_manifest(folder) is not None:
                found = artifacts.verify(folder).digest
                if found != located.digest:
                    raise ArtifactError(f"{directory} was replaced while it was read", "try again")
                break
    return directory


def model_folder(path: Path) -> Path:
    """Return the folder that holds the model: `path` itself, or `model/` in a step's directory.

    Raises:
        ConfigError: Neither is a model.
    """
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return candidate.absolute()
    problem = "has no config.json" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise ConfigError(f"model folder {path} {problem}", f"give a saved model, or {REGISTRY}NAME@ALIAS")


def _store(address: str, settings: Settings) -> ArtifactStore:
    if address.startswith(BUCKET):
        from nvila_platform.s3_address import store_of

        return store_of(address, settings)
    from nvila_platform.store import open_store

    return open_store(settings)
