"""Fixtures of the platform tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila_platform import mlflow_backend
from nvila_platform.settings import Settings

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database as a first run leaves it; made once, because the migration takes seconds."""
    settings = Settings.load(tmp_path_factory.mktemp("template"), {})
    mlflow_backend.prepare_database(settings)
    return settings.workspace / "mlflow.db"


@pytest.fixture
def tracked(tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a workspace that has an MLflow database; its path holds what paths of users hold."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    workspace = tmp_path / "my work space"
    workspace.mkdir()
    shutil.copy(migrated_database, workspace / "mlflow.db")
    return Settings.load(workspace, {})
