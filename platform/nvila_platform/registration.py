"""Registering an artifact as a version of a model: by reference, once, and nothing half-done."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_platform.mlflow_backend import connect, database_path, one_line, retrying
from nvila_platform.model_card import CARD_FOLDER, ModelCard, licence_warning, mlmodel
from nvila_platform.registry import (
    DIGEST_TAG,
    KEY_TAG,
    STEP_TAG,
    URI_TAG,
    ModelVersion,
    failures,
    model_version,
)
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

# Finds a version whose creation was answered by a lost connection.
_ATTEMPT = "nvila.attempt"
# Narrower than MLflow's: these need no quoting in an address or a search.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def register_model(
    settings: Settings,
    name: str,
    ref: ArtifactRef,
    run_id: str | None,
    tags: Mapping[str, object],
    card: ModelCard | None = None,
) -> ModelVersion:
    """Register an artifact as the next version of a model.

    The same artifact is registered once: asking again, as a restarted run does, returns the version it has.

    Args:
        settings: Where the registry is.
        name: Registered model; made when it is new.
        ref: The artifact.
        run_id: MLflow run that made it.
        tags: Lineage and whatever else belongs to the version.
        card: Becomes the description of the version, and files of the run. A licence that forbids commercial use is
            said in the log.

    Raises:
        ConfigError: The name is none that MLflow takes.
        InfrastructureError: The registry failed; nothing of the attempt is left in it.
    """
    check_name(name)
    with failures(settings, f"registering {name!r}"):
        client = connect(settings)
        known = _registered_already(client, name, ref)
        if known is not None:
            logger.info("%s version %d already is %s", name, known.version, ref.digest[:12])
            return known
        if card is not None and (warning := licence_warning(card.origin.licence)) is not None:
            logger.warning("%s: %s", name, warning)
        return _register(client, settings, name, ref, run_id, tags, card)


def registered_version(settings: Settings, name: str, ref: ArtifactRef) -> ModelVersion | None:
    """Return the version that an artifact has under a name already.

    Raises:
        ConfigError: The name is none that MLflow takes.
        InfrastructureError: The registry failed.
    """
    check_name(name)
    with failures(settings, f"looking {name!r} up"):
        return _registered_already(connect(settings), name, ref)


def check_name(name: str) -> None:
    """Check the name of a model before it is worked on.

    Raises:
        ConfigError: It is none that MLflow takes.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(f"model name {name!r} cannot be registered", "use letters, digits, '.', '_' and '-'")


def _register(
    client: MlflowClient,
    settings: Settings,
    name: str,
    ref: ArtifactRef,
    run_id: str | None,
    tags: Mapping[str, object],
    card: ModelCard | None,
) -> ModelVersion:
    attempt = uuid.uuid4().hex
    own = {STEP_TAG: ref.step, KEY_TAG: ref.key, DIGEST_TAG: ref.digest, URI_TAG: ref.uri, _ATTEMPT: attempt}
    all_tags = {key: str(value) for key, value in tags.items()} | (card.tags() if card is not None else {}) | own
    source = _source(settings, ref)
    description = None if card is None else card.description()
    new_model = False
    try:
        # Before the version, so that none is without its card.
        if card is not None and run_id is not None:
            client.log_text(run_id, card.text(), f"{CARD_FOLDER}/README.md")
            client.log_text(run_id, mlmodel(card, run_id, ref.uri), f"{CARD_FOLDER}/MLmodel")
        new_model = _ensure_model(client, name)
        # The tags travel with the request that makes the version, so no version exists without them.
        made = retrying(
            lambda: client.create_model_version(
                name, source, run_id, tags=all_tags, await_creation_for=0, description=description
            )
        )
        return _first_of_equals(client, model_version(made))
    except Exception:
        _undo(client, name, attempt, new_model)
        raise


def _first_of_equals(client: MlflowClient, made: ModelVersion) -> ModelVersion:
    """Return the version that an artifact keeps where two machines registered it at the same moment: the lower one.

    Each looks after it has made its own, so the later of both sees the other's and takes its own back.
    """
    first = min(_equal_versions(client, made.name, made.ref), key=lambda version: version.version, default=made)
    if first.version < made.version:
        retrying(lambda: client.delete_model_version(made.name, str(made.version)))
        logger.info("%s version %d already is %s", made.name, first.version, made.digest[:12])
        return first
    return made


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
    return max(_equal_versions(client, name, ref), key=lambda version: version.version, default=None)


def _equal_versions(client: MlflowClient, name: str, ref: ArtifactRef) -> list[ModelVersion]:
    query = f"name='{name}' and tags.`{DIGEST_TAG}`='{ref.digest}' and tags.`{KEY_TAG}`='{ref.key}'"
    found = retrying(lambda: client.search_model_versions(query))
    return [version for version in map(model_version, found) if version.ref == ref]


def _source(settings: Settings, ref: ArtifactRef) -> str:
    # A tracking server refuses folders of this machine as a source, rightly: it could not open them.
    local = "://" not in ref.uri or ref.uri.startswith("file:")
    if local and database_path(settings.tracking_uri) is None:
        return f"nvila:/{ref.step}/{ref.key}"
    return ref.uri
