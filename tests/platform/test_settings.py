"""Settings: defaults, precedence, secrets and bad values."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nvila.errors import ConfigError
from nvila_platform.settings import Settings, error_file

EVERY_VARIABLE = {
    "NVILA_WORKSPACE": "/tmp/ws",  # noqa: S108  (only compared)
    "NVILA_STORE_URI": "s3://models/nvila",
    "NVILA_TRACKING_URI": "http://mlflow:5000",
    "NVILA_EXPERIMENT": "tuning",
    "NVILA_KFP_ENDPOINT": "https://kubeflow.example.org/pipeline",
    "NVILA_KFP_TOKEN": "kfp-secret",
    "NVILA_KFP_NAMESPACE": "team-a",
    "NVILA_TRAIN_JOB": '{"image": "nvila:1"}',
    "NVILA_TRAIN_NODES": "4",
    "NVILA_TRAIN_GPUS": "8",
    "NVILA_S3_ENDPOINT": "minio:9000",
    "NVILA_S3_ACCESS_KEY": "me",
    "NVILA_S3_SECRET_KEY": "hunter2",
    "NVILA_S3_SECURE": "false",
    "NVILA_LOG_FORMAT": "json",
    "NVILA_SYSTEM_METRICS_S": "0",
    "NVILA_TRACK_TRAINING": "direct",
    "NVILA_METRICS_ADDRESS": "0.0.0.0:9400",
    "NVILA_CHECKPOINT_URI": "s3://models/checkpoints",
    "NVILA_PEAK_TFLOPS": "1.5",
    "NVILA_PRICE_PER_GPU_HOUR": "2.5",
    "NVILA_PRICE_PER_CORE_HOUR": "0.04",
    "NVILA_PRICE_PER_KWH": "0.3",
    "NVILA_WATTS_PER_GPU": "700",
    "NVILA_WATTS_PER_CORE": "6",
    "NVILA_ENDPOINT_API_KEY": "key",
    "NVILA_CURRENCY": "eur",
    "NVILA_PROMETHEUS_URL": "http://prometheus:9090",
    "NVILA_PROMETHEUS_TOKEN": "token",
}


def expected_defaults(home: Path) -> Settings:
    return Settings(
        workspace=home,
        store_uri=str(home / "artifacts"),
        tracking_uri=f"sqlite:///{home}/mlflow.db",
        experiment="nvila",
        s3_endpoint="",
        s3_access_key="",
        s3_secret_key="",
        s3_secure=True,
        log_format="auto",
        system_metrics_s=10.0,
        track_training="events",
        metrics_address="",
        checkpoint_uri="",
        peak_tflops=None,
        price_per_gpu_hour=None,
        price_per_core_hour=None,
        price_per_kwh=None,
        watts_per_gpu=None,
        watts_per_core=None,
        currency="USD",
    )


def test_defaults_survive_an_empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ={}) == expected_defaults(tmp_path / "nvila-workspace")


def test_defaults_survive_variables_that_are_set_but_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ=dict.fromkeys(EVERY_VARIABLE, "")) == expected_defaults(tmp_path / "nvila-workspace")


def test_every_field_has_a_variable_that_changes_it() -> None:
    plain, changed = Settings.load(environ={}), Settings.load(environ=EVERY_VARIABLE)
    same = [f.name for f in dataclasses.fields(Settings) if getattr(plain, f.name) == getattr(changed, f.name)]
    assert same == []


def test_the_argument_wins_over_the_variable_and_moves_the_defaults(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "mine", {"NVILA_WORKSPACE": str(tmp_path / "theirs")})
    assert settings == expected_defaults(tmp_path / "mine")


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_EXPERIMENT", "from-the-process")
    assert Settings.load().experiment == "from-the-process"


def test_relative_places_do_not_depend_on_a_childs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(Path("ws"), {"NVILA_STORE_URI": "store", "NVILA_TRACKING_URI": "sqlite:///runs.db"})
    assert settings.workspace == tmp_path / "ws"
    assert settings.store_uri == str(tmp_path / "store")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/runs.db"


@pytest.mark.parametrize("environ", [{}, EVERY_VARIABLE], ids=["defaults", "all-set"])
def test_a_child_loads_the_same_settings(environ: dict[str, str]) -> None:
    settings = Settings.load(environ=environ)
    assert Settings.load(environ=settings.to_env()) == settings


def test_the_secret_is_not_in_the_repr() -> None:
    settings = Settings.load(environ=EVERY_VARIABLE)
    assert settings.s3_secret_key == "hunter2"
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"NVILA_LOG_FORMAT": "jsn"}, ["NVILA_LOG_FORMAT='jsn'", "did you mean 'json'"]),
        ({"NVILA_S3_SECURE": "maybe"}, ["NVILA_S3_SECURE='maybe'", "true or false"]),
        ({"NVILA_S3_ENDPOINT": "ftp://x"}, ["NVILA_S3_ENDPOINT", "'ftp'"]),
        ({"NVILA_S3_ENDPOINT": "not a host"}, ["NVILA_S3_ENDPOINT='not a host'", "host:port"]),
        ({"NVILA_S3_ENDPOINT": "http://h:1/bucket"}, ["NVILA_S3_ENDPOINT", "without a path"]),
        ({"NVILA_S3_ENDPOINT": "http://x", "NVILA_S3_SECURE": "true"}, ["contradicts", "unset NVILA_S3_SECURE"]),
        ({"NVILA_TRACK_TRAINING": "event"}, ["NVILA_TRACK_TRAINING='event'", "did you mean 'events'"]),
        ({"NVILA_METRICS_ADDRESS": "localhost"}, ["NVILA_METRICS_ADDRESS='localhost'", "host:port"]),
        ({"NVILA_METRICS_ADDRESS": ":70000"}, ["NVILA_METRICS_ADDRESS=':70000'", "65535"]),
        ({"NVILA_PRICE_PER_KWH": "cheap"}, ["NVILA_PRICE_PER_KWH='cheap'", "write it as 2.5"]),
        ({"NVILA_WATTS_PER_CORE": "-1"}, ["NVILA_WATTS_PER_CORE='-1'", "0 or more"]),
        ({"NVILA_PEAK_TFLOPS": "inf"}, ["NVILA_PEAK_TFLOPS='inf'"]),
        ({"NVILA_CURRENCY": "euro"}, ["NVILA_CURRENCY='EURO'", "three letters"]),
    ],
    ids=[
        *("log-format", "boolean", "scheme", "spaces", "path", "contradiction"),
        *("choice", "no-port", "port", "price", "negative", "infinite", "currency"),
    ],
)
def test_bad_values_name_the_variable_and_the_fix(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(environ=environ)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "host", "secure"),
    [("h:9000", "h:9000", True), ("http://h:9000/", "h:9000", False), ("https://h", "h", True)],
)
def test_an_endpoint_may_carry_its_scheme(endpoint: str, host: str, secure: bool) -> None:
    settings = Settings.load(environ={"NVILA_S3_ENDPOINT": endpoint})
    assert (settings.s3_endpoint, settings.s3_secure) == (host, secure)


@pytest.mark.parametrize(
    ("text", "address"),
    [("9400", "127.0.0.1:9400"), (":9400", "127.0.0.1:9400"), ("0.0.0.0:1", "0.0.0.0:1"), ("0", ""), ("", "")],
)
def test_metrics_are_offered_on_loopback_unless_said_otherwise(text: str, address: str) -> None:
    assert Settings.load(environ={"NVILA_METRICS_ADDRESS": text}).metrics_address == address


def test_a_misspelled_variable_is_reported_and_an_injected_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Settings.load(environ={"NVILA_STORE_URL": "x", "NVILA_SERVICE_HOST": "10.0.0.1", "NVILA_PORT": "80"})
    assert [record.getMessage() for record in caplog.records] == [
        "NVILA_STORE_URL is not a setting and is ignored; did you mean NVILA_STORE_URI?"
    ]


def test_the_error_file_is_a_path_or_nothing() -> None:
    assert error_file({}) is None
    assert error_file({"NVILA_ERROR_FILE": ""}) is None
    assert error_file({"NVILA_ERROR_FILE": "e.json"}) == Path("e.json")


def test_a_lookup_needs_no_heavy_import() -> None:
    code = """
import sys, time
before, start = set(sys.modules), time.process_time()
import nvila_platform.artifacts, nvila_platform.settings, nvila_platform.store
seconds = time.process_time() - start
heavy = {"torch", "mlflow", "minio", "rich", "pydantic", "numpy", "importlib.metadata"} & (set(sys.modules) - before)
print(seconds, sorted(heavy))
assert not heavy and seconds < 0.15
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MLFLOW_RUN_ID": "7", "MLFLOW_TRACKING_URI": "http://plugin"}, "http://plugin"),
        (
            {"MLFLOW_RUN_ID": "7", "MLFLOW_TRACKING_URI": "http://plugin", "NVILA_TRACKING_URI": "http://ours"},
            "http://ours",
        ),
        ({"MLFLOW_TRACKING_URI": "http://plugin"}, "sqlite:////w/mlflow.db"),
        ({"MLFLOW_RUN_ID": "7"}, "sqlite:////w/mlflow.db"),
    ],
    ids=["given", "ours-wins", "no-run", "no-address"],
)
def test_the_server_of_a_run_that_was_given_is_taken(environ: dict[str, str], expected: str) -> None:
    assert Settings.load(Path("/w"), environ).tracking_uri == expected
