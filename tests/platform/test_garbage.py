"""What may be removed from a store, in a folder and on a real S3 service."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import ConfigError
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.garbage import Inventory, remove, unneeded
from nvila_platform.garbage_folder import FolderInventory
from nvila_platform.garbage_s3 import S3Inventory
from nvila_platform.registration import register_model
from nvila_platform.registry import needed_digests
from nvila_platform.s3_store import S3Store
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, ArtifactStore, LocalStore, reuse

if TYPE_CHECKING:
    from tests.conftest import S3Service

Place = tuple[ArtifactStore, Callable[[], Inventory]]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        folder = LocalStore(tmp_path / "store")
        return folder, lambda: FolderInventory(folder)
    s3: S3Service = request.getfixturevalue("s3")
    uri = {"NVILA_STORE_URI": f"s3://models/{tmp_path.name}"}
    bucket = S3Store.open(Settings.load(tmp_path / "ws", s3.variables | uri))
    return bucket, lambda: S3Inventory(bucket)


def made(store: ArtifactStore, step: str, inputs: dict[str, ArtifactRef] | None = None, text: str = "") -> ArtifactRef:
    digests = {name: ref.digest for name, ref in (inputs or {}).items()}
    key = content_key(step, {"text": text}, digests, "v")
    directory = store.work_dir(step, key)
    (directory / "out.txt").write_text(f"{step} {text} {sorted(digests.values())}")
    write_manifest(directory, step=step, key=key, config={}, inputs=digests, code_version="v", started_at=utc_now())
    return store.publish(directory)


def later() -> datetime:
    """A limit behind everything that was made so far; S3 gives times in whole seconds."""
    return datetime.now(UTC) + timedelta(seconds=2)


def test_what_a_needed_artifact_was_made_of_stays(place: Place) -> None:
    store, inventory = place
    data = made(store, "data")
    model = made(store, "train", {"data": data})
    quantized = made(store, "quantize", {"model": model})
    other = made(store, "train", {"data": data}, text="other")
    gone = unneeded(inventory(), {quantized.digest}, later())
    assert [one.digest for one in gone] == [other.digest]
    assert gone[0].size_bytes > 0
    assert [one.digest for one in remove(inventory(), gone, later())] == [other.digest]
    assert store.find(other.digest) is None
    assert store.lookup(other.step, other.key) is None
    for ref in (data, model, quantized):
        assert store.find(ref.digest) == ref
        store.fetch(ref)
    assert unneeded(inventory(), {quantized.digest}, later()) == []


def test_without_anything_needed_all_goes(place: Place) -> None:
    store, inventory = place
    made(store, "train", {"data": made(store, "data")})
    assert len(remove(inventory(), unneeded(inventory(), set(), later()), later())) == 2
    assert list(inventory().stored()) == []


def test_young_work_and_what_it_was_made_of_stay(place: Place) -> None:
    store, inventory = place
    old = made(store, "data")
    time.sleep(2.1)
    limit = datetime.now(UTC) - timedelta(seconds=1)
    assert [one.digest for one in unneeded(inventory(), set(), limit)] == [old.digest]
    made(store, "train", {"data": old})
    assert unneeded(inventory(), set(), limit) == []


def test_a_reuse_makes_young(place: Place) -> None:
    store, inventory = place
    old = made(store, "data")
    time.sleep(2.1)
    limit = datetime.now(UTC) - timedelta(seconds=1)
    victims = unneeded(inventory(), set(), limit)
    assert [one.digest for one in victims] == [old.digest]
    assert reuse(store, old.step, old.key) == old
    # It came into use between the listing and the removal.
    assert remove(inventory(), victims, limit) == []
    assert unneeded(inventory(), set(), limit) == []


def test_damaged_artifacts_and_interrupted_work_go_when_they_are_old(place: Place) -> None:
    store, inventory = place
    store.discard(made(store, "data"), "for a test")
    unfinished = store.work_dir("train", content_key("train", {}, {}, "v"))
    (unfinished / "half.bin").write_bytes(b"x")
    kinds = sorted(one.kind for one in unneeded(inventory(), set(), later()))
    # In a bucket no work is done; what is left there is the mark of the digest that was set aside.
    assert kinds == ["damaged", "unfinished"]
    remove(inventory(), unneeded(inventory(), set(), later()), later())
    assert list(inventory().stored()) == []


def test_work_that_a_process_holds_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = content_key("train", {}, {}, "v")
    (store.work_dir("train", key) / "half.bin").write_bytes(b"x")
    victims = unneeded(FolderInventory(store), set(), later())
    with store.lock("train", key):
        assert remove(FolderInventory(store), victims, later()) == []
    assert len(remove(FolderInventory(store), victims, later())) == 1


def test_uploads_that_never_ended_are_ended(s3: S3Service, tmp_path: Path) -> None:
    uri = {"NVILA_STORE_URI": f"s3://models/{tmp_path.name}"}
    store = S3Store.open(Settings.load(tmp_path / "ws", s3.variables | uri))
    name = f"{tmp_path.name}/content/{'0' * 64}/w.bin"
    upload = store.client._create_multipart_upload("models", name, {})
    store.client._upload_part("models", name, os.urandom(100), None, upload, 1)
    (found,) = unneeded(S3Inventory(store), set(), later())
    assert found.kind == "upload"
    assert remove(S3Inventory(store), [found], later()) == [found]
    assert list(S3Inventory(store).stored()) == []


def test_the_registry_says_what_is_needed(tracked: Settings) -> None:
    ref = ArtifactRef(step="quantize", key="1" * 64, digest="a" * 64, uri="/x")
    tags = {"nvila.gate": "b" * 64, "nvila.lineage.data": "c" * 64, "note": "no digest"}
    register_model(tracked, "nvila", ref, None, tags)
    assert {"a" * 64, "b" * 64, "c" * 64} <= needed_digests(tracked)


def test_a_store_whose_registry_is_not_known_is_left_alone(tmp_path: Path) -> None:
    assert needed_digests(Settings.load(tmp_path, {})) == set()
    with pytest.raises(ConfigError, match="does not exist") as caught:
        needed_digests(Settings.load(tmp_path, {"NVILA_STORE_URI": "s3://models/x"}))
    assert "NVILA_TRACKING_URI" in caught.value.hint
