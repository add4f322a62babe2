"""Where models come from: found without fetching, fetched with their digests checked, and what happens when not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import ArtifactError, ConfigError, InfrastructureError
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.model_source import Located, fetch, locate
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, ArtifactStore, open_store

if TYPE_CHECKING:
    from tests.conftest import S3Service


def publish(store: ArtifactStore, weights: bytes = b"weights") -> ArtifactRef:
    key = content_key("quantize", {"weights": weights.hex()}, {}, "1")
    folder = store.work_dir("quantize", key)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(weights)
    write_manifest(folder, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return store.publish(folder)


def in_bucket(workspace: Path, s3: S3Service, prefix: str) -> Settings:
    return Settings.load(workspace, s3.variables | {"NVILA_STORE_URI": f"s3://models/{prefix}"})


def elsewhere(settings: Settings, workspace: Path) -> Settings:
    """Another machine, which knows the service but has another store of its own."""
    return replace(settings, workspace=workspace, store_uri=str(workspace / "artifacts"))


def test_a_model_comes_from_a_bucket_by_digest_or_by_step_and_key(tmp_path: Path, s3: S3Service) -> None:
    settings = in_bucket(tmp_path / "one", s3, tmp_path.name)
    ref = publish(open_store(settings))
    there = elsewhere(settings, tmp_path / "two")
    for place in (f"content/{ref.digest}", f"quantize/{ref.key}"):
        located = locate(f"s3://models/{tmp_path.name}/{place}", there)
        assert (located.digest, located.version, located.name) == (ref.digest, "unregistered", "nvila")
        folder = fetch(located, there)
        assert folder.is_relative_to(tmp_path / "two")
        assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_what_is_not_in_a_bucket_is_named(tmp_path: Path, s3: S3Service) -> None:
    settings = Settings.load(tmp_path, s3.variables)
    nothing = f"s3://models/{tmp_path.name}/content/{'0' * 64}"
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        locate(nothing, settings)
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        locate(f"s3://models/{tmp_path.name}/train/{'0' * 64}", settings)
    with pytest.raises(ConfigError, match="no such bucket"):
        locate(nothing.replace("models", "absent", 1), settings)
    for address in ("s3://models", "s3://models/folder", "s3:///content/" + "0" * 64, "s3://models/content/xyz"):
        with pytest.raises(ConfigError, match="is no address of an artifact"):
            locate(address, settings)
    with pytest.raises(ConfigError, match="NVILA_S3_ENDPOINT is not set"):
        locate(nothing, Settings.load(tmp_path, {}))


def test_a_bucket_that_is_gone_is_retryable_and_a_sound_copy_needs_none(tmp_path: Path, mortal_s3: S3Service) -> None:
    settings = in_bucket(tmp_path / "one", mortal_s3, "here")
    ref = publish(open_store(settings))
    address = f"s3://models/here/content/{ref.digest}"
    there = elsewhere(settings, tmp_path / "two")
    folder = fetch(locate(address, there), there)
    mortal_s3.kill()
    assert fetch(locate(address, there), there) == folder
    with pytest.raises(InfrastructureError, match="cannot be reached") as caught:
        locate(address, elsewhere(settings, tmp_path / "three"))
    assert caught.value.exit_code == 75
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(InfrastructureError, match="cannot be reached"):
        fetch(locate(address, there), there)
    (folder.parent / "manifest.json").write_text("not json")
    with pytest.raises(InfrastructureError, match="cannot be reached"):
        locate(address, there)


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, s3: S3Service) -> None:
    settings = in_bucket(tmp_path / "one", s3, tmp_path.name)
    ref = publish(open_store(settings))
    there = elsewhere(settings, tmp_path / "two")
    located = locate(f"s3://models/{tmp_path.name}/content/{ref.digest}", there)
    weights = fetch(located, there) / "model.safetensors"
    weights.write_bytes(b"weightz")
    assert fetch(located, there) / "model.safetensors" == weights
    assert weights.read_bytes() == b"weights"


def test_a_folder_with_a_manifest_is_checked_unless_asked_not_to(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path, {})
    store = open_store(settings)
    folder = store.fetch(publish(store)) / "model"
    located = locate(folder, settings)
    assert fetch(located, settings) == folder
    with pytest.raises(ArtifactError, match="was replaced while it was read"):
        fetch(replace(located, digest="another"), settings)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256 .*, the manifest says"):
        fetch(located, settings)
    assert fetch(located, settings, verify=False) == folder


def test_a_bare_folder_is_served_unchecked(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    settings = Settings.load(tmp_path, {})
    located = locate(str(tmp_path), settings)
    assert located == Located(address=str(tmp_path))
    assert fetch(located, settings) == tmp_path
