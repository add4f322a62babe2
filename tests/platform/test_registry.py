"""The registry against real MLflow: by reference, once, and nothing half-done."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.errors import ArtifactError, ConfigError, InfrastructureError
from nvila_platform import mlflow_backend
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.registration import register_model
from nvila_platform.registry import ModelVersion, resolve, set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from tests.platform.conftest import FaultyProxy


def _ref(number: int = 1) -> ArtifactRef:
    return ArtifactRef(
        step="quantize", key=f"{number:064x}", digest=f"{number + 100:064x}", uri=f"file:///artifacts/quantize/{number}"
    )


def _register(settings: Settings, number: int = 1, name: str = "nvila") -> ModelVersion:
    return register_model(
        settings, name, _ref(number), run_id=None, tags={"nvila.lineage.train": "abc", "accuracy": 0.97}
    )


def _stored(settings: Settings, name: str = "nvila") -> list[Any]:
    return list(mlflow_backend.connect(settings).search_model_versions(f"name='{name}'"))


def _models(settings: Settings) -> list[str]:
    return [model.name for model in mlflow_backend.connect(settings).search_registered_models()]


def test_version_is_a_reference_with_its_lineage(tracked: Settings) -> None:
    client = mlflow_backend.connect(tracked)
    run_id = client.create_run(client.create_experiment("nvila")).info.run_id
    version = register_model(tracked, "nvila", _ref(), run_id, {"nvila.lineage.train": "abc"})
    assert version.version == 1
    assert version.ref == _ref()
    assert version.model_uri == "models:/nvila/1"
    (stored,) = _stored(tracked)
    assert stored.source == _ref().uri
    assert stored.run_id == run_id
    expected = {"nvila.step": "quantize", "nvila.key": _ref().key, "nvila.digest": _ref().digest}
    assert expected | {"nvila.lineage.train": "abc"} == {k: stored.tags[k] for k in [*expected, "nvila.lineage.train"]}
    assert resolve(tracked, "models:/nvila/1") == version


def test_same_artifact_is_registered_once(tracked: Settings) -> None:
    first = _register(tracked)
    assert _register(tracked) == first
    assert _register(tracked, 2).version == 2
    assert _register(tracked) == first
    assert len(_stored(tracked)) == 2


def test_same_artifact_that_two_machines_register_at_once_is_one_version(
    tracked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _register(tracked, 2)
    # Both have looked before either made its version.
    monkeypatch.setattr("nvila_platform.registration._registered_already", lambda *_: None)
    first, second = _register(tracked), _register(tracked)
    assert first.version == 2
    assert second == first
    assert {int(stored.version) for stored in _stored(tracked)} == {other.version, first.version}


def test_replaced_champion_becomes_previous(tracked: Settings) -> None:
    for number in (1, 2, 3):
        _register(tracked, number)
    set_alias(tracked, "nvila", "candidate", 2)
    set_alias(tracked, "nvila", "champion", 1)
    with pytest.raises(ConfigError, match="previous"):
        resolve(tracked, "models:/nvila@previous")
    set_alias(tracked, "nvila", "champion", 2)
    set_alias(tracked, "nvila", "champion", 2)  # again, which must not make it its own predecessor
    assert resolve(tracked, "models:/nvila@champion").version == 2
    assert resolve(tracked, "models:/nvila@previous").version == 1
    assert resolve(tracked, "models:/nvila@candidate").version == 2
    set_alias(tracked, "nvila", "champion", 3)
    assert resolve(tracked, "models:/nvila@previous").version == 2


def test_failed_exchange_of_champions_keeps_the_old_one(tracked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    for number in (1, 2):
        _register(tracked, number)
    set_alias(tracked, "nvila", "champion", 1)
    original = MlflowClient.set_registered_model_alias

    def failing(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "champion":
            raise OSError("disk gone")
        original(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", failing)
    with pytest.raises(InfrastructureError, match="disk gone"):
        set_alias(tracked, "nvila", "champion", 2)
    assert resolve(tracked, "models:/nvila@champion").version == 1


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("models:/nvilla@champion", "did you mean 'nvila'"),
        ("models:/nvila@champoin", "did you mean 'champion'"),
        ("models:/nvila@next", "known: champion"),
        ("models:/nvila/7", "known: 1"),
        ("models:/nvila", "models:/<name>@<alias>"),
        ("models:/nvila/latest", "models:/<name>@<alias>"),
        ("nvila@champion", "models:/<name>@<alias>"),
    ],
)
def test_unknown_address_names_the_known_ones(tracked: Settings, uri: str, text: str) -> None:
    _register(tracked)
    set_alias(tracked, "nvila", "champion", 1)
    with pytest.raises(ConfigError) as caught:
        resolve(tracked, uri)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "alias", "version", "text"),
    [
        ("nvila", "champoin", 1, "did you mean 'champion'"),
        ("nvila", "champion", 9, "known: 1"),
        ("nvilla", "champion", 1, "did you mean 'nvila'"),
    ],
)
def test_alias_of_something_unknown(tracked: Settings, name: str, alias: str, version: int, text: str) -> None:
    _register(tracked)
    with pytest.raises(ConfigError) as caught:
        set_alias(tracked, name, alias, version)
    assert text in str(caught.value)


def test_new_workspace_has_no_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvila run"):
        resolve(Settings.load(tmp_path, {}), "models:/nvila@champion")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", " ", "a/b", "a@b", "models:/x", "o'neil"])
def test_name_that_no_address_could_hold(tracked: Settings, name: str) -> None:
    with pytest.raises(ConfigError, match="model name"):
        _register(tracked, name=name)


def test_version_of_others_is_refused(tracked: Settings) -> None:
    client = mlflow_backend.connect(tracked)
    client.create_registered_model("nvila")
    client.create_model_version("nvila", "s3://elsewhere/model")
    with pytest.raises(ArtifactError, match=r"nvila\.step"):
        resolve(tracked, "models:/nvila/1")


@pytest.mark.parametrize("existing", [False, True], ids=["new model", "known model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_failed_registration_leaves_nothing(
    tracked: Settings, monkeypatch: pytest.MonkeyPatch, existing: bool, when: str
) -> None:
    """Also when the version was made and only the answer got lost."""
    from mlflow import MlflowClient

    if existing:
        _register(tracked, 1)
    before = _models(tracked)
    original = MlflowClient.create_model_version

    def failing(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        if when == "after":
            original(self, *arguments, **options)
        raise ConnectionError("the line is cut\nsecond line")

    monkeypatch.setattr(MlflowClient, "create_model_version", failing)
    with pytest.raises(InfrastructureError) as caught:
        _register(tracked, 2)
    assert "the line is cut" in caught.value.message
    assert "second line" not in caught.value.message
    assert _models(tracked) == before
    assert len(_stored(tracked)) == len(before)


def test_unreachable_registry_is_an_infrastructure_error(tracked: Settings) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings = replace(tracked, tracking_uri=f"http://127.0.0.1:{probe.getsockname()[1]}")
    with pytest.raises(InfrastructureError, match="registering 'nvila' failed"):
        _register(settings)
    with pytest.raises(InfrastructureError, match="resolving"):
        resolve(settings, "models:/nvila@champion")


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_not_taken_are_no_outage(
    tracked: Settings, faulty: Callable[[str], FaultyProxy], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """As behind a gateway whose token has expired; with a fresh one the same call goes through."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "an-old-secret")
    with start_ui(tracked, port=0) as server:
        gateway = faulty(server.url.removeprefix("http://"))
        settings = replace(tracked, tracking_uri=f"http://{gateway.endpoint}")
        gateway.answer(status, "the token has expired")
        with pytest.raises(ConfigError, match=f"registering 'nvila' failed: .* {status} ") as caught:
            _register(settings)
        assert caught.value.exit_code == 2
        assert "MLFLOW_TRACKING_TOKEN" in str(caught.value.hint)
        assert "an-old-secret" not in f"{caught.value.message} {caught.value.hint}"
        gateway.pass_on()
        assert _register(settings).version == 1
