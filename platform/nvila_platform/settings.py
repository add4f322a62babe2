"""Where things live and how to reach them: the only reader of `NVILA_*` environment variables.

Recipes say what to do; settings say where. An unset or empty variable means the default, so that a deployment may list
every variable and fill only some.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from nvila.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

LogFormat = Literal["auto", "text", "json"]
TrackTraining = Literal["events", "direct"]

ERROR_FILE = "NVILA_ERROR_FILE"
RUNNER_PID = "NVILA_RUNNER_PID"
TASKS_FOLDER = "NVILA_TASKS_FOLDER"
TASK_RETRIES = "NVILA_TASK_RETRIES"

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
    "system_metrics_s": "NVILA_SYSTEM_METRICS_S",
    "track_training": "NVILA_TRACK_TRAINING",
    # Not NVILA_METRICS_PORT: Kubernetes injects a variable of that name for a Service named nvila-metrics.
    "metrics_address": "NVILA_METRICS_ADDRESS",
    "checkpoint_uri": "NVILA_CHECKPOINT_URI",
    "peak_tflops": "NVILA_PEAK_TFLOPS",
    "price_per_gpu_hour": "NVILA_PRICE_PER_GPU_HOUR",
    "price_per_core_hour": "NVILA_PRICE_PER_CORE_HOUR",
    "price_per_kwh": "NVILA_PRICE_PER_KWH",
    "watts_per_gpu": "NVILA_WATTS_PER_GPU",
    "watts_per_core": "NVILA_WATTS_PER_CORE",
    "currency": "NVILA_CURRENCY",
    "endpoint_api_key": "NVILA_ENDPOINT_API_KEY",
    "kfp_endpoint": "NVILA_KFP_ENDPOINT",
    "kfp_token": "NVILA_KFP_TOKEN",
    "kfp_namespace": "NVILA_KFP_NAMESPACE",
    "prometheus_url": "NVILA_PROMETHEUS_URL",
    "prometheus_token": "NVILA_PROMETHEUS_TOKEN",
    "train_job": "NVILA_TRAIN_JOB",
    "train_nodes": "NVILA_TRAIN_NODES",
    "train_gpus": "NVILA_TRAIN_GPUS",
}
# What is told to another machine by reference only, never in a manifest.
SECRET_VARIABLES = ("NVILA_S3_ACCESS_KEY", "NVILA_S3_SECRET_KEY", "NVILA_ENDPOINT_API_KEY", "NVILA_KFP_TOKEN")
# About the process that starts training, and not about those that train.
PLACEMENT_VARIABLES = ("NVILA_TRAIN_JOB", "NVILA_TRAIN_NODES", "NVILA_TRAIN_GPUS")
_LOG_FORMATS = ("auto", "text", "json")
_TRACK_TRAINING = ("events", "direct")
_LOOPBACK = "127.0.0.1"
_SYSTEM_METRICS_S = 10.0
_LAST_PORT = 65535
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
        system_metrics_s: Seconds between two measurements of the machine's load for MLflow; 0 takes none.
        track_training: Who tells MLflow about the steps of training: whoever follows the run's events, or the training
            process itself, in a run nested under the one that MLFLOW_RUN_ID names.
        metrics_address: `host:port` that a training process, or a curation, offers `/metrics` on; empty offers none.
        checkpoint_uri: Where unfinished training is backed up: a folder or `s3://bucket/prefix`; empty for nowhere.
        peak_tflops: Peak speed of one device, for MFU; None takes what is known of the device.
        price_per_gpu_hour: Money for a GPU-hour; None when nobody said.
        price_per_core_hour: Money for a core-hour.
        price_per_kwh: Money for energy, on top of both.
        watts_per_gpu: Power of a GPU, for an estimate where it cannot be measured.
        watts_per_core: Power of a core at work.
        currency: Of all prices, as a code of three letters.
        endpoint_api_key: Key of an endpoint that is evaluated; never printed.
        kfp_endpoint: Address of the API of Kubeflow Pipelines.
        kfp_token: Its bearer token; never printed.
        kfp_namespace: Namespace of runs, where Kubeflow serves several users.
        prometheus_url: Address of the Prometheus that judges a deployment.
        prometheus_token: Its bearer token; never printed.
        train_job: Nodes of a cluster that training runs on, as JSON; empty for processes of this machine.
        train_nodes: How many nodes, instead of what `train_job` says.
        train_gpus: GPUs of each node, with one process each, instead of what `train_job` or the recipe says.
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
    system_metrics_s: float = _SYSTEM_METRICS_S
    track_training: TrackTraining = "events"
    metrics_address: str = ""
    checkpoint_uri: str = ""
    peak_tflops: float | None = None
    price_per_gpu_hour: float | None = None
    price_per_core_hour: float | None = None
    price_per_kwh: float | None = None
    watts_per_gpu: float | None = None
    watts_per_core: float | None = None
    currency: str = "USD"
    endpoint_api_key: str = field(default="", repr=False)
    kfp_endpoint: str = ""
    kfp_token: str = field(default="", repr=False)
    kfp_namespace: str = ""
    prometheus_url: str = ""
    prometheus_token: str = field(default="", repr=False)
    train_job: str = ""
    train_nodes: int | None = None
    train_gpus: int | None = None

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
        if env.get("MLFLOW_RUN_ID", "").strip():
            # Whoever opened a run for us, such as Kubeflow's MLflow plugin, says where it is.
            values["tracking_uri"] = values["tracking_uri"] or env.get("MLFLOW_TRACKING_URI", "").strip()
        home = _absolute(str(workspace) if workspace is not None else values["workspace"] or "nvila-workspace")
        interval = _number("system_metrics_s", values)
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
            log_format=cast("LogFormat", _choice("log_format", values, _LOG_FORMATS)),
            system_metrics_s=_SYSTEM_METRICS_S if interval is None else interval,
            track_training=cast("TrackTraining", _choice("track_training", values, _TRACK_TRAINING)),
            metrics_address=_metrics_address(values["metrics_address"]),
            checkpoint_uri=_store_uri(values["checkpoint_uri"]),
            peak_tflops=_number("peak_tflops", values),
            price_per_gpu_hour=_number("price_per_gpu_hour", values),
            price_per_core_hour=_number("price_per_core_hour", values),
            price_per_kwh=_number("price_per_kwh", values),
            watts_per_gpu=_number("watts_per_gpu", values),
            watts_per_core=_number("watts_per_core", values),
            currency=_currency(values),
            endpoint_api_key=values["endpoint_api_key"],
            kfp_endpoint=values["kfp_endpoint"].rstrip("/"),
            kfp_token=values["kfp_token"],
            kfp_namespace=values["kfp_namespace"],
            prometheus_url=values["prometheus_url"].rstrip("/"),
            prometheus_token=values["prometheus_token"],
            train_job=values["train_job"],
            train_nodes=_count("train_nodes", values),
            train_gpus=_count("train_gpus", values),
        )

    def to_env(self) -> dict[str, str]:
        """Return the variables that make a child process load these same settings."""
        env: dict[str, str] = {}
        for name, variable in _VARIABLES.items():
            value = getattr(self, name)
            text = "" if value is None else str(value)
            env[variable] = text.lower() if isinstance(value, bool) else text
        return env


def error_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the file in which a launched process leaves its typed error, if a launcher asked for one."""
    value = (os.environ if environ is None else environ).get(ERROR_FILE, "")
    return Path(value) if value else None


def runner_pid(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the process that runs the pipeline that this process is a task of, when it is on this machine."""
    value = (os.environ if environ is None else environ).get(RUNNER_PID, "")
    return int(value) if value.isdecimal() else None


def tasks_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the folder in which tasks of a local pipeline list their processes, in such a task."""
    value = (os.environ if environ is None else environ).get(TASKS_FOLDER, "")
    return Path(value) if value else None


def task_retries(environ: Mapping[str, str] | None = None) -> int:
    """Return how often a pipeline's task tries again what only an outage stopped."""
    value = (os.environ if environ is None else environ).get(TASK_RETRIES, "")
    return int(value) if value.isdecimal() else 0


def _absolute(path: str) -> Path:
    # Absolute at once: a child process may start in another folder.
    return Path(path).expanduser().absolute()


def _store_uri(value: str) -> str:
    return value if not value or "://" in value else str(_absolute(value))


def _tracking_uri(value: str) -> str:
    if value.startswith(_SQLITE):
        return f"{_SQLITE}{_absolute(value.removeprefix(_SQLITE))}"
    return value


def _choice(name: str, values: Mapping[str, str], allowed: tuple[str, ...]) -> str:
    value = values[name] or allowed[0]
    if value not in allowed:
        variable = _VARIABLES[name]
        raise ConfigError(f"{variable}={value!r} is not a {name.replace('_', ' ')}", nearest(value, allowed))
    return value


def _number(name: str, values: Mapping[str, str]) -> float | None:
    """Return a price, a power or a speed; None when it is not set."""
    text = values[name]
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{_VARIABLES[name]}={text!r} is not a number of 0 or more", "write it as 2.5")
    return value


def _count(name: str, values: Mapping[str, str]) -> int | None:
    """Return a positive number; None when it is not set or 0, which a form writes for that."""
    text = values[name]
    if text and not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{_VARIABLES[name]}={text!r} is not a whole number of 0 or more", "write it as 4")
    return int(text or "0") or None


def _metrics_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not text or port == "0":
        return ""
    if not port.isdecimal() or int(port) > _LAST_PORT:
        raise ConfigError(
            f"NVILA_METRICS_ADDRESS={text!r} is no address", f"use host:port, or a port up to {_LAST_PORT} alone"
        )
    return f"{host or _LOOPBACK}:{port}"


def _currency(values: Mapping[str, str]) -> str:
    code = values["currency"].upper() or "USD"
    if not re.fullmatch("[A-Z]{3}", code):
        raise ConfigError(f"NVILA_CURRENCY={code!r} is not a currency", "use a code of three letters, such as EUR")
    return code


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
    known = {*_VARIABLES.values(), ERROR_FILE, RUNNER_PID, TASKS_FOLDER, TASK_RETRIES}
    for name in sorted(key for key in env if key.startswith("NVILA_") and key not in known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            logger.warning("%s is not a setting and is ignored; did you mean %s?", name, close[0])
