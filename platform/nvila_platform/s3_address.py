"""Artifacts by their place in a bucket: `s3://BUCKET/PREFIX/content/DIGEST` or `s3://BUCKET/PREFIX/STEP/KEY`.

The first is the address that references and registered versions carry. It names bytes, so a sound copy on this machine
answers for it, whatever has become of the bucket.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError, ConfigError
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from nvila_platform.s3_store import S3Store

_ADDRESS = re.compile(
    r"(?P<store>s3://[^/]+(?:/.*?)?)/(?:content/(?P<digest>[0-9a-f]{64})|(?P<step>[a-z0-9][a-z0-9_-]*)/(?P<key>[0-9a-f]{16,64}))/?"
)


def find_in_bucket(address: str, settings: Settings) -> ArtifactRef:
    """Return the artifact at an address.

    Raises:
        ConfigError: The address is malformed, or a setting of the service is missing.
        ArtifactError: Nothing finished is there.
        InfrastructureError: The service cannot be reached, and no sound copy is here.
    """
    match = _parsed(address)
    digest = match["digest"]
    if digest is not None and (cached := _cached(settings, digest, address)) is not None:
        return cached
    store = store_of(address, settings)
    ref = store.find(digest) if digest is not None else store.lookup(match["step"], match["key"])
    if ref is None:
        raise ArtifactError(f"{address}: holds no finished artifact", "publish it, or correct the address")
    return ref


def store_of(address: str, settings: Settings) -> S3Store:
    """Open the store that an address lies in; nothing is sent yet.

    Raises:
        ConfigError: The address is malformed, or a setting of the service is missing.
    """
    from nvila_platform.s3_store import S3Store

    return S3Store.connect(replace(settings, store_uri=_parsed(address)["store"]))


def _cached(settings: Settings, digest: str, address: str) -> ArtifactRef | None:
    from nvila_platform.artifacts import read_manifest
    from nvila_platform.s3_store import fetched_folder

    folder = fetched_folder(settings.workspace / "artifacts", digest)
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return None
    if manifest is None or manifest.digest != digest:
        return None
    return ArtifactRef(step=manifest.step, key=manifest.key, digest=digest, uri=address)


def _parsed(address: str) -> re.Match[str]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"{address!r} is no address of an artifact",
            "use s3://BUCKET/PREFIX/content/DIGEST or s3://BUCKET/PREFIX/STEP/KEY, as the store lays them out",
        )
    return match


__all__ = ["find_in_bucket", "store_of"]
