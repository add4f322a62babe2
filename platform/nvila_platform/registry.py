"""Model registry: names, versions and aliases for artifacts of the store.

A version is a reference. Its files stay in the artifact store and its tags carry the digest and key that find them and
their lineage; MLflow never unpickles, copies or loads anything. Unlike tracking, every failure here is raised.

Example:
    >>> version = register_model(settings, "nvila", ref, run_id=None, tags={})
    >>> set_alias(settings, "nvila", "champion", version.version)
    >>> resolve(settings, "models:/nvila@champion").ref == ref
    True
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from nvila.errors import ArtifactError, ConfigError, InfrastructureError, NvilaError, nearest
from nvila_platform.mlflow_backend import connect, database_path, is_rejection, one_line, retrying, without_password
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

Alias = Literal["candidate", "champion", "previous"]
ALIASES: tuple[str, ...] = get_args(Alias)

_STEP, _KEY, _DIGEST, _URI = "nvila.step", "nvila.key", "nvila.digest", "nvila.uri"
# Finds a version whose creation was answered by a lost connection.
_ATTEMPT = "nvila.attempt"
# Narrower than MLflow's: these need no quoting in an address or a search.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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


def register_model(
    settings: Settings, name: str, ref: ArtifactRef, run_id: str | None, tags: Mapping[str, object]
) -> ModelVersion:
    """Register an artifact as the next version of a model.

    The same artifact is registered once: asking again, as a restarted run does, returns the version it has.

    Args:
        settings: Where the registry is.
        name: Registered model; made when it is new.
        ref: The artifact.
        run_id: MLflow run that made it.
        tags: Lineage and whatever else belongs to the version.

    Raises:
        ConfigError: The name is none that MLflow takes.
        InfrastructureError: The registry failed; nothing of the attempt is left in it.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(f"model name {name!r} cannot be registered", "use letters, digits, '.', '_' and '-'")
    with _failures(settings, f"registering {name!r}"):
        client = connect(settings)
        known = _registered_already(client, name, ref)
        if known is not None:
            logger.info("%s version %d already is %s", name, known.version, ref.digest[:12])
            return known
        return _register(client, settings, name, ref, run_id, tags)


def set_alias(settings: Settings, name: str, alias: str, version: int) -> None:
    """Point an alias at a version. A champion that is replaced becomes `previous`.

    Raises:
        ConfigError: The alias, model or version is unknown; the message names the known ones.
        InfrastructureError: The registry failed.
    """
    if alias not in ALIASES:
        raise ConfigError(f"unknown alias {alias!r}", nearest(alias, ALIASES))
    with _failures(settings, f"setting alias {alias!r} of {name!r}"):
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


def resolve(settings: Settings, model_uri: str) -> ModelVersion:
    """Return the version behind `models:/name@alias` or `models:/name/3`.

    Raises:
        ConfigError: The address is malformed, or its name, alias or version is unknown; the message names known ones.
        ArtifactError: The version was registered by something else and refers to no artifact of ours.
        InfrastructureError: The registry failed.
    """
    match = _parsed(model_uri)
    name, alias = match["name"], match["alias"]
    with _failures(settings, f"resolving {model_uri!r}"):
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
    with _failures(settings, f"looking for versions of {digest[:12]}"):
        client = connect(settings)
        found = retrying(lambda: client.search_model_versions(f"tags.`{_DIGEST}`='{digest}'"))
        return sorted(map(_model_version, found), key=lambda version: (version.name, -version.version))


def aliases_of(settings: Settings, version: ModelVersion) -> list[str]:
    """Return the aliases that point at a version.

    Raises:
        ConfigError: The model is not registered any more.
        InfrastructureError: The registry failed.
    """
    with _failures(settings, f"reading the aliases of {version.name!r}"):
        found = _aliases(_connect_existing(settings, version.name), version.name)
    return sorted(alias for alias, number in found.items() if number == version.version)


def version_tags(settings: Settings, version: ModelVersion) -> dict[str, str]:
    """Return all tags of a version.

    Raises:
        InfrastructureError: The registry failed.
    """
    with _failures(settings, f"reading the tags of {version.model_uri}"):
        client = connect(settings)
        found = retrying(lambda: client.get_model_version(version.name, str(version.version)))
        return {str(key): str(value) for key, value in found.tags.items()}


def tag_version(settings: Settings, model_uri: str, tags: Mapping[str, object]) -> None:
    """Set tags of a version; those of its lineage are not to be touched.

    Raises:
        ConfigError: There is no such version.
        InfrastructureError: The registry failed.
    """
    version = resolve(settings, model_uri)
    assert not {_STEP, _KEY, _DIGEST, _URI} & set(tags), "what a version is never changes"
    with _failures(settings, f"tagging {version.model_uri}"):
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
    with _failures(settings, "reading what the registry refers to"):
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


def _register(
    client: MlflowClient,
    settings: Settings,
    name: str,
    ref: ArtifactRef,
    run_id: str | None,
    tags: Mapping[str, object],
) -> ModelVersion:
    attempt = uuid.uuid4().hex
    own = {_STEP: ref.step, _KEY: ref.key, _DIGEST: ref.digest, _URI: ref.uri, _ATTEMPT: attempt}
    all_tags = {key: str(value) for key, value in tags.items()} | own
    source = _source(settings, ref)
    new_model = False
    try:
        new_model = _ensure_model(client, name)
        # The tags travel with the request that makes the version, so no version exists without them.
        made = retrying(lambda: client.create_model_version(name, source, run_id, tags=all_tags, await_creation_for=0))
        return _model_version(made)
    except Exception:
        _undo(client, name, attempt, new_model)
        raise


def _ensure_model(client: MlflowClient, name: str) -> bool:
    """Make the registered model; returns False when it exists."""
    try:
        retrying(lambda: client.create_registered_model(name))
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _undo(client: MlflowClient, name: str, attempt: str, new_model: bool) -> None:
    """Remove what a failed attempt left; what cannot be removed is reported."""
    try:
        for version in retrying(
            lambda: client.search_model_versions(f"name='{name}' and tags.`{_ATTEMPT}`='{attempt}'")
        ):
            client.delete_model_version(name, str(version.version))
        if new_model and not client.search_model_versions(f"name='{name}'"):
            client.delete_registered_model(name)
    except Exception as error:  # the first failure is the one that is raised
        logger.warning("cleaning up the failed registration of %s: %s", name, one_line(error))


def _registered_already(client: MlflowClient, name: str, ref: ArtifactRef) -> ModelVersion | None:
    query = f"name='{name}' and tags.`{_DIGEST}`='{ref.digest}' and tags.`{_KEY}`='{ref.key}'"
    found = retrying(lambda: client.search_model_versions(query))
    versions = [_model_version(version) for version in found]
    return max((v for v in versions if v.ref == ref), key=lambda v: v.version, default=None)


def _source(settings: Settings, ref: ArtifactRef) -> str:
    # A tracking server refuses folders of this machine as a source, rightly: it could not open them.
    local = "://" not in ref.uri or ref.uri.startswith("file:")
    if local and database_path(settings.tracking_uri) is None:
        return f"nvila:/{ref.step}/{ref.key}"
    return ref.uri


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
        return _model_version(retrying(lambda: client.get_model_version(name, str(version))))
    except NvilaError:
        raise
    except Exception as error:
        if not is_rejection(error):
            raise
        known = sorted(int(other.version) for other in client.search_model_versions(f"name='{name}'"))
        hint = f"known: {', '.join(map(str, known))}" if known else "it has no version"
        raise ConfigError(f"model {name!r} has no version {version}", hint) from error


def _model_version(made: Any) -> ModelVersion:
    """Convert MLflow's entity, whose attributes are not annotated."""
    tags = made.tags
    missing = [tag for tag in (_STEP, _KEY, _DIGEST, _URI) if tag not in tags]
    if missing:
        raise ArtifactError(
            f"version {made.version} of model {made.name!r} has no tag {missing[0]}",
            "it was not registered by `nvila`; choose another version",
        )
    return ModelVersion(
        name=str(made.name),
        version=int(made.version),
        digest=tags[_DIGEST],
        uri=tags[_URI],
        step=tags[_STEP],
        key=tags[_KEY],
    )


@contextmanager
def _failures(settings: Settings, action: str) -> Iterator[None]:
    """Turn whatever MLflow raises into the one error that says: try again when the registry is back."""
    try:
        yield
    except NvilaError:
        raise
    except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the system's errors
        where = without_password(settings.tracking_uri)
        raise InfrastructureError(
            f"{action} failed: {one_line(error)}", f"check that MLflow at {where} works, then run again"
        ) from error
