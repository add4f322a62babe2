"""Model registry: names, versions and aliases for artifacts of the store.

A version is a reference. Its files stay in the artifact store and its tags carry the digest and key that find them and
their lineage; MLflow never unpickles, copies or loads anything. Unlike tracking, every failure here is raised.

Example:
    >>> version = register_model(settings, "nvila", ref, run_id=None, tags={})  # in registration.py
    >>> set_alias(settings, "nvila", "champion", version.version)
    >>> resolve(settings, "models:/nvila@champion").ref == ref
    True
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from nvila.errors import ArtifactError, ConfigError, InfrastructureError, NvilaError, nearest
from nvila_platform.mlflow_backend import (
    connect,
    database_path,
    is_rejection,
    lacks_rights,
    one_line,
    retrying,
    without_password,
)
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

Alias = Literal["candidate", "champion", "previous"]
ALIASES: tuple[str, ...] = get_args(Alias)

STEP_TAG, KEY_TAG, DIGEST_TAG, URI_TAG = "nvila.step", "nvila.key", "nvila.digest", "nvila.uri"
REGISTRY = "models:/"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PAGE = 1000
_MODEL_URI = re.compile(r"models:/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[^/@]+)|/(?P<version>[1-9][0-9]*))")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One registered version.

    Args:
        name: Registered model.
        version: Number of the version.
        digest: Digest of the artifact's files.
        uri: Where the artifact store holds them.
        step: Step that made the artifact.
        key: Content key of the artifact.
    """

    name: str
    version: int
    digest: str
    uri: str
    step: str
    key: str

    @property
    def model_uri(self) -> str:
        """The address that always means this version."""
        return f"models:/{self.name}/{self.version}"

    @property
    def ref(self) -> ArtifactRef:
        """The artifact behind the version, for `ArtifactStore.fetch`."""
        return ArtifactRef(step=self.step, key=self.key, digest=self.digest, uri=self.uri)


def set_alias(settings: Settings, name: str, alias: str, version: int) -> None:
    """Point an alias at a version. A champion that is replaced becomes `previous`.

    Raises:
        ConfigError: The alias, model or version is unknown; the message names the known ones.
        InfrastructureError: The registry failed.
    """
    check_alias(alias)
    with failures(settings, f"setting alias {alias!r} of {name!r}"):
        client = _connect_existing(settings, name)
        aliases = _aliases(client, name)
        _known_version(client, name, version)
        if aliases.get(alias) == version:
            return
        if alias == "champion" and "champion" in aliases:
            # First, so that a failure between the two leaves the old champion in place and findable.
            old = aliases["champion"]
            retrying(lambda: client.set_registered_model_alias(name, "previous", str(old)))
        retrying(lambda: client.set_registered_model_alias(name, alias, str(version)))


def check_alias(alias: str) -> None:
    """Check an alias before anything is worked on.

    Raises:
        ConfigError: It is none of ours; the message names those.
    """
    if alias not in ALIASES:
        raise ConfigError(f"unknown alias {alias!r}", nearest(alias, ALIASES))


def resolve(settings: Settings, model_uri: str) -> ModelVersion:
    """Return the version behind `models:/name@alias` or `models:/name/3`.

    Raises:
        ConfigError: The address is malformed, or its name, alias or version is unknown; the message names known ones.
        ArtifactError: The version was registered by something else and refers to no artifact of ours.
        InfrastructureError: The registry failed.
    """
    match = _parsed(model_uri)
    name, alias = match["name"], match["alias"]
    with failures(settings, f"resolving {model_uri!r}"):
        client = _connect_existing(settings, name)
        aliases = _aliases(client, name)
        if alias is None:
            return _known_version(client, name, int(match["version"]))
        if alias not in aliases:
            raise ConfigError(f"model {name!r} has no alias {alias!r}", nearest(alias, aliases))
        return _known_version(client, name, aliases[alias])


def resolve_if_any(settings: Settings, model_uri: str) -> ModelVersion | None:
    """Return the version behind an address, or None where nothing is registered under it yet.

    Raises:
        ConfigError: The address is malformed.
        ArtifactError: The version refers to no artifact of ours.
        InfrastructureError: The registry failed.
    """
    _parsed(model_uri)
    try:
        return resolve(settings, model_uri)
    except ConfigError as e:
        logger.info("%s", e.message)
        return None


def versions_of(settings: Settings, digest: str) -> list[ModelVersion]:
    """Return every version of every model that refers to an artifact, the newest first; none where nothing is known.

    Raises:
        InfrastructureError: The registry failed.
    """
    database = database_path(settings.tracking_uri)
    if database is not None and not database.exists():
        return []
    with failures(settings, f"looking for versions of {digest[:12]}"):
        client = connect(settings)
        found = retrying(lambda: client.search_model_versions(f"tags.`{DIGEST_TAG}`='{digest}'"))
        return sorted(map(model_version, found), key=lambda version: (version.name, -version.version))


def aliases_of(settings: Settings, version: ModelVersion) -> list[str]:
    """Return the aliases that point at a version.

    Raises:
        ConfigError: The model is not registered any more.
        InfrastructureError: The registry failed.
    """
    with failures(settings, f"reading the aliases of {version.name!r}"):
        found = _aliases(_connect_existing(settings, version.name), version.name)
    return sorted(alias for alias, number in found.items() if number == version.version)


def version_tags(settings: Settings, version: ModelVersion) -> dict[str, str]:
    """Return all tags of a version.

    Raises:
        InfrastructureError: The registry failed.
    """
    with failures(settings, f"reading the tags of {version.model_uri}"):
        client = connect(settings)
        found = retrying(lambda: client.get_model_version(version.name, str(version.version)))
        return {str(key): str(value) for key, value in found.tags.items()}


def run_tags(settings: Settings, run_id: str) -> dict[str, str]:
    """Return the tags of an MLflow run.

    Raises:
        InfrastructureError: MLflow failed.
    """
    with failures(settings, f"reading the tags of run {run_id}"):
        client = connect(settings)
        return {str(key): str(value) for key, value in retrying(lambda: client.get_run(run_id)).data.tags.items()}


def tag_version(settings: Settings, model_uri: str, tags: Mapping[str, object]) -> None:
    """Set tags of a version; those of its lineage are not to be touched.

    Raises:
        ConfigError: There is no such version.
        InfrastructureError: The registry failed.
    """
    version = resolve(settings, model_uri)
    assert not {STEP_TAG, KEY_TAG, DIGEST_TAG, URI_TAG} & set(tags), "what a version is never changes"
    with failures(settings, f"tagging {version.model_uri}"):
        client = connect(settings)
        for key, value in tags.items():
            retrying(partial(client.set_model_version_tag, version.name, str(version.version), key, str(value)))


def needed_digests(settings: Settings) -> set[str]:
    """Return the digests of everything that a version of any registered model refers to.

    Raises:
        ConfigError: There is no registry, so nothing says what is needed.
        InfrastructureError: The registry failed.
    """
    database = database_path(settings.tracking_uri)
    if database is not None and not database.exists():
        if settings.store_uri == str(settings.workspace / "artifacts"):
            return set()  # nothing of this workspace was ever registered
        raise ConfigError(
            f"the registry {database} does not exist, so nothing says what the store {settings.store_uri} must keep",
            "set NVILA_TRACKING_URI to the registry of its models",
        )
    found: set[str] = set()
    with failures(settings, "reading what the registry refers to"):
        client = connect(settings)
        token: str | None = None
        while True:
            search = partial(client.search_model_versions, max_results=_PAGE, page_token=token)
            page = retrying(search)
            for version in page:
                found |= {str(value) for value in version.tags.values() if _SHA256.fullmatch(str(value))}
            token = page.token
            if not token:
                return found


def _parsed(model_uri: str) -> re.Match[str]:
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ConfigError(
            f"{model_uri!r} is no model address", "write models:/<name>@<alias> or models:/<name>/<number>"
        )
    return match


def _connect_existing(settings: Settings, name: str) -> MlflowClient:
    database = database_path(settings.tracking_uri)
    if database is not None and not database.exists():
        raise ConfigError(f"no model {name!r} is registered", f"{database} does not exist yet: run `nvila run` first")
    return connect(settings)


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    try:
        model = retrying(lambda: client.get_registered_model(name))
    except Exception as error:
        if not is_rejection(error):
            raise
        known = [str(other.name) for other in client.search_registered_models()]
        raise ConfigError(f"no model {name!r} is registered", nearest(name, known)) from error
    return {alias: int(version) for alias, version in model.aliases.items()}


def _known_version(client: MlflowClient, name: str, version: int) -> ModelVersion:
    try:
        return model_version(retrying(lambda: client.get_model_version(name, str(version))))
    except NvilaError:
        raise
    except Exception as error:
        if not is_rejection(error):
            raise
        known = sorted(int(other.version) for other in client.search_model_versions(f"name='{name}'"))
        hint = f"known: {', '.join(map(str, known))}" if known else "it has no version"
        raise ConfigError(f"model {name!r} has no version {version}", hint) from error


def model_version(made: Any) -> ModelVersion:
    """Convert MLflow's entity, whose attributes are not annotated."""
    tags = made.tags
    missing = [tag for tag in (STEP_TAG, KEY_TAG, DIGEST_TAG, URI_TAG) if tag not in tags]
    if missing:
        raise ArtifactError(
            f"version {made.version} of model {made.name!r} has no tag {missing[0]}",
            "it was not registered by `nvila`; choose another version",
        )
    return ModelVersion(
        name=str(made.name),
        version=int(made.version),
        digest=tags[DIGEST_TAG],
        uri=tags[URI_TAG],
        step=tags[STEP_TAG],
        key=tags[KEY_TAG],
    )


@contextmanager
def failures(settings: Settings, action: str) -> Iterator[None]:
    """Turn whatever MLflow raises into the one error that says: try again when the registry is back.

    Raises:
        ConfigError: The credentials have expired, or lack the rights; trying again is useless.
        InfrastructureError: All else.
    """
    try:
        yield
    except NvilaError:
        raise
    except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the system's errors
        where = without_password(settings.tracking_uri)
        if lacks_rights(error):
            raise ConfigError(
                f"{action} failed: MLflow at {where} does not take the credentials, or not for this: {one_line(error)}",
                "set a fresh MLFLOW_TRACKING_TOKEN (or _USERNAME and _PASSWORD), or ask for the rights",
            ) from error
        raise InfrastructureError(
            f"{action} failed: {one_line(error)}", f"check that MLflow at {where} works, then run again"
        ) from error
