"""The one door to MLflow: environment, connection, database creation and what its failures mean.

Tracking, registry and the user interface all open MLflow here, so the traps of its embedded SQLite mode (a migration
that is neither locked nor transactional, writers that meet) are handled once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

T = TypeVar("T")

_SQLITE = "sqlite:///"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Records of MLflow go to the handlers that our entry points configured, not to handlers of its own.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # MLflow's seven retries with back-off take minutes. Ours are in `retrying` and in the tracker's buffer.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# An answer with one of these will be the same tomorrow, so the event is at fault and not the service.
_REJECTIONS = frozenset(
    {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
)
# These say that whoever asks is not known (any more) or may not do it.
_NO_RIGHTS = frozenset({"CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "UNAUTHENTICATED"})
_LOCK_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def configure_environment() -> None:
    """Set what MLflow reads from the environment, keeping values that the user chose.

    Called from the main thread before MLflow is imported anywhere: telemetry is decided at import.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def parent_from_environment() -> str | None:
    """Return the run that the surrounding system (a Kubeflow run with its MLflow plugin) opened for this process."""
    return os.environ.get("MLFLOW_RUN_ID", "").strip() or None


def database_path(tracking_uri: str) -> Path | None:
    """Return the SQLite file behind a tracking URI, or None when the URI names a server."""
    return Path(tracking_uri.removeprefix(_SQLITE)) if tracking_uri.startswith(_SQLITE) else None


def connect(settings: Settings) -> MlflowClient:
    """Return a client of the configured MLflow, creating the embedded database when there is none.

    The registry is always the one beside the tracked runs, whatever MLFLOW_REGISTRY_URI says: lineage needs both.
    """
    configure_environment()
    from mlflow import MlflowClient

    # It logs a traceback for each failed statement, also for those that are retried here or reported in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # The first migration would fill the log with its hundred steps.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    database = database_path(settings.tracking_uri)
    if database is None:
        return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    with _exclusive(database.with_name(database.name + ".lock")):
        _create_database(database, settings.workspace)
        # The constructor upgrades an older schema, without a lock of its own.
        return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def prepare_database(settings: Settings) -> None:
    """Create the embedded database when it is missing; does nothing for a server."""
    database = database_path(settings.tracking_uri)
    if database is not None and not database.exists():
        connect(settings)


def artifact_location(settings: Settings) -> str | None:
    """Return where a new experiment keeps its files; None leaves the choice to the tracking server."""
    if database_path(settings.tracking_uri) is None:
        return None
    return (settings.workspace / "mlartifacts").absolute().as_uri()


def is_rejection(error: Exception) -> bool:
    """Whether MLflow understood the request and refused it, so that sending it again is useless."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code not in _REJECTIONS:
        return False
    # A 404 page from something else on that address carries the same code; only MLflow answers with JSON.
    return not str(error).startswith("API request to endpoint")


def lacks_rights(error: Exception) -> bool:
    """Whether MLflow, or a gateway before it, does not take the credentials, or not for this."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in _NO_RIGHTS


def retrying(call: Callable[[], T]) -> T:
    """Run a call again while other processes hold the SQLite database, for about three seconds."""
    for delay_s in _LOCK_DELAYS_S:
        try:
            return call()
        except Exception as error:
            if not _is_locked(error):
                raise
            time.sleep(delay_s)
    return call()


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, short enough for a notice."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def without_password(uri: str) -> str:
    """Return an address that may be logged."""
    return re.sub(r"(?<=://)[^/@]+@", "", uri)


def _is_locked(error: Exception) -> bool:
    text = str(error)
    return "database is locked" in text or "database table is locked" in text


def _create_database(database: Path, workspace: Path) -> None:
    """Migrate a new database beside its final name and move it there in one step.

    MLflow's migration is not one transaction: a process killed in the middle of it would leave a file that no later
    process can open.
    """
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(database.name + ".new")
    for leftover in database.parent.glob(unfinished.name + "*"):
        leftover.unlink()
    # MLflow leaves this constructor without annotations.
    store = SqlAlchemyStore(f"{_SQLITE}{unfinished}", str(workspace / "mlartifacts"))  # type: ignore[no-untyped-call]
    store.engine.dispose()
    unfinished.replace(database)


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
