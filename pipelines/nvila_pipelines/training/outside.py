"""What training depends on that no step of the run has made: data that stages read from where they lie.

Their files are known by address, size and time of the last change, of an object by its etag. Reading all of it for a
digest of the content would take longer than many a stage; a time that changed without the content costs a training
that was not needed, which is better than a model of other data.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvila.data.readers.locations import Location
    from nvila_pipelines.recipe import Recipe


def data_digests(recipe: Recipe) -> dict[str, str]:
    """Return a digest of the files behind every data expression of a stage that is not of the run's own data.

    Raises:
        ConfigError: A name is unknown.
        DataError: There is no data.
    """
    own = recipe.own_data
    outside = list(dict.fromkeys(s.data for s in recipe.train.stages.values() if s.data and s.data not in own))
    if not outside:
        return {}
    from nvila.data.mixtures import Registry
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings

    filesystems = data_filesystems(Settings.load())
    path = recipe.data.registry if recipe.data.dataset is None else None
    registry = Registry(filesystems=filesystems) if path is None else Registry.load(path, filesystems)
    return {expression: _digest(registry.files(expression)) for expression in outside}


def _digest(files: list[Location]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(_version(file)).encode())
    return digest.hexdigest()


def _version(file: Location) -> tuple[Any, ...]:
    from nvila.data.readers.locations import reading

    with reading(file.uri):
        facts = file.fs.info(file.path)
    return file.uri, facts["size"], facts.get("etag"), facts.get("mtime")
