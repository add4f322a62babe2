"""Where things live and how to reach them: the only reader of `NVILA_*` environment variables.

Recipes say what to do; settings say where. An unset or empty variable means the default, so that a deployment may list
every variable and fill only some.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from nvila.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

LogFormat = Literal["auto", "text", "json"]

ERROR_FILE = "NVILA_ERROR_FILE"
RUNNER_PID = "NVILA_RUNNER_PID"

_VARIABLES = {
    "workspace": "NVILA_WORKSPACE",
    "store_uri": "NVILA_STORE_URI",
    "tracking_uri": "NVILA_TRACKING_URI",
    "experiment": "NVILA_EXPERIMENT",
    "s3_endpoint": "NVILA_S3_ENDPOINT",
    "s3_access_key": "NVILA_S3_ACCESS_KEY",
    "s3_secret_key": "NVILA_S3_SECRET_KEY",
    "s3_secure": "NVILA_S3_SECURE",
    "log_format": "NVILA_LOG_FORMAT",
}
_LOG_FORMATS = ("auto", "text", "json")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The resolved settings of one process.

    Args:
        workspace: Absolute folder that holds everything a run makes.
        store_uri: Absolute folder or `s3://bucket/prefix` of the artifact store.
        tracking_uri: MLflow tracking and registry address.
        experiment: MLflow experiment that runs are logged to.
        s3_endpoint: `host:port` of the S3 service, without a scheme.
        s3_access_key: Name of the S3 identity.
        s3_secret_key: Its secret; never printed.
        s3_secure: Whether to reach the S3 service over TLS.
        log_format: How logs and progress are written when nobody overrides it.
    """

    workspace: Path
    store_uri: str
    tracking_uri: str
    experiment: str = "nvila"
    s3_endpoint: str = ""
    s3_access_key: str = ""
    s3_secret_key: str = field(default="", repr=False)
    s3_secure: bool = True
    log_format: LogFormat = "auto"

    @classmethod
    def load(cls, workspace: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from the environment.

        Args:
            workspace: Wins over `NVILA_WORKSPACE`; None takes the variable or `./nvila-workspace`.
            environ: Stands in for the process environment.

        Raises:
            ConfigError: A variable has a value that cannot be used; the message names it.

        Example:
            >>> Settings.load(environ={"NVILA_EXPERIMENT": "tuning"}).experiment
            'tuning'
        """
        env = os.environ if environ is None else environ
        _warn_about_misspelled(env)
        values = {name: env.get(variable, "").strip() for name, variable in _VARIABLES.items()}
        home = _absolute(str(workspace) if workspace is not None else values["workspace"] or "nvila-workspace")
        endpoint, secure = _endpoint(values["s3_endpoint"], values["s3_secure"])
        return cls(
            workspace=home,
            store_uri=_store_uri(values["store_uri"]) or str(home / "artifacts"),
            tracking_uri=_tracking_uri(values["tracking_uri"]) or f"{_SQLITE}{home / 'mlflow.db'}",
            experiment=values["experiment"] or "nvila",
            s3_endpoint=endpoint,
            s3_access_key=values["s3_access_key"],
            s3_secret_key=values["s3_secret_key"],
            s3_secure=secure,
            log_format=_log_format(values["log_format"]),
        )

    def to_env(self) -> dict[str, str]:
        """Return the variables that make a child process load these same settings."""
        env: dict[str, str] = {}
        for name, variable in _VARIABLES.items():
            value = getattr(self, name)
            env[variable] = str(value).lower() if isinstance(value, bool) else str(value)
        return env


def error_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the file in which a launched process leaves its typed error, if a launcher asked for one."""
    value = (os.environ if environ is None else environ).get(ERROR_FILE, "")
    return Path(value) if value else None


def runner_pid(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the process that runs the pipeline that this process is a task of, when it is on this machine."""
    value = (os.environ if environ is None else environ).get(RUNNER_PID, "")
    return int(value) if value.isdecimal() else None


def _absolute(path: str) -> Path:
    # Absolute at once: a child process may start in another folder.
    return Path(path).expanduser().absolute()


def _store_uri(value: str) -> str:
    return value if not value or "://" in value else str(_absolute(value))


def _tracking_uri(value: str) -> str:
    if value.startswith(_SQLITE):
        return f"{_SQLITE}{_absolute(value.removeprefix(_SQLITE))}"
    return value


def _log_format(value: str) -> LogFormat:
    if not value:
        return "auto"
    if value not in _LOG_FORMATS:
        raise ConfigError(f"NVILA_LOG_FORMAT={value!r} is not a log format", nearest(value, _LOG_FORMATS))
    return cast("LogFormat", value)


def _endpoint(endpoint: str, secure: str) -> tuple[str, bool]:
    if secure and secure.lower() not in _BOOLEANS:
        raise ConfigError(f"NVILA_S3_SECURE={secure!r} is not a yes or no", "use true or false")
    scheme, separator, host = endpoint.partition("://")
    if len(endpoint.split()) > 1 or "/" in (host.rstrip("/") if separator else endpoint):
        raise ConfigError(f"NVILA_S3_ENDPOINT={endpoint!r} is no address", "use host:port, without a path")
    if not separator:
        return endpoint, _BOOLEANS[secure.lower()] if secure else True
    if scheme not in ("http", "https"):
        raise ConfigError(f"NVILA_S3_ENDPOINT={endpoint!r} has the scheme {scheme!r}", "use host:port, http or https")
    if secure and _BOOLEANS[secure.lower()] != (scheme == "https"):
        raise ConfigError(
            f"NVILA_S3_ENDPOINT={endpoint!r} contradicts NVILA_S3_SECURE={secure!r}", "unset NVILA_S3_SECURE"
        )
    return host.rstrip("/"), scheme == "https"


def _warn_about_misspelled(env: Mapping[str, str]) -> None:
    # Kubernetes injects NVILA_SERVICE_HOST and the like for a Service named nvila, so only near misses are reported.
    known = {*_VARIABLES.values(), ERROR_FILE, RUNNER_PID}
    for name in sorted(key for key in env if key.startswith("NVILA_") and key not in known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            logger.warning("%s is not a setting and is ignored; did you mean %s?", name, close[0])
