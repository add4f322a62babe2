"""The S3 store against a real S3 service on loopback."""

from __future__ import annotations

import errno
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from nvila.errors import ArtifactError, CapabilityError, ConfigError, InfrastructureError, ResourceError
from nvila_platform.artifacts import Manifest, content_key, read_manifest, utc_now, write_manifest
from nvila_platform.s3_download import Download
from nvila_platform.s3_store import S3Store
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store, reuse

if TYPE_CHECKING:
    from tests.conftest import S3Service

KEY = content_key("train", {"lr": 1}, {}, "v")
OTHER = content_key("train", {"lr": 2}, {}, "v")


# What the tests' service lets an identity do that may only read.
READER = {"NVILA_S3_ACCESS_KEY": "reader", "NVILA_S3_SECRET_KEY": "only-to-read"}


def settings(workspace: Path, s3: S3Service, **changes: str) -> Settings:
    uri = {"NVILA_STORE_URI": f"s3://models/{workspace.parent.name}"}
    return Settings.load(workspace, s3.variables | uri | changes)


@pytest.fixture
def store(s3: S3Service, tmp_path: Path) -> S3Store:
    opened = open_store(settings(tmp_path / "one", s3))
    assert isinstance(opened, S3Store)
    return opened


@pytest.fixture
def elsewhere(s3: S3Service, tmp_path: Path) -> S3Store:
    """The same bucket and prefix seen from another machine's workspace."""
    opened = open_store(settings(tmp_path / "two", s3))
    assert isinstance(opened, S3Store)
    return opened


def work(store: S3Store, key: str = KEY, *, text: str = "weights") -> Path:
    directory = store.work_dir("train", key)
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "w.bin").write_text(text)
    (directory / "report.json").write_text("{}")
    write_manifest(directory, step="train", key=key, config={}, inputs={}, code_version="v", started_at=utc_now())
    return directory


def object_names(store: S3Store) -> list[str]:
    found = store.client.list_objects(bucket_name=store.bucket, prefix=f"{store.prefix}/", recursive=True)
    return sorted(str(item.object_name).removeprefix(f"{store.prefix}/") for item in found)


def test_published_work_is_found_and_fetched_elsewhere(store: S3Store, elsewhere: S3Store) -> None:
    assert store.lookup("train", KEY) is None
    directory = work(store)
    ref = store.publish(directory)
    assert ref.uri == f"s3://models/{store.prefix}/content/{ref.digest}"
    assert object_names(store) == [
        f"content/{ref.digest}/model/w.bin",
        f"content/{ref.digest}/report.json",
        f"digests/{ref.digest}/train/{KEY}",
        f"train/{KEY}/manifest.json",
    ]
    assert store.fetch(ref) == directory
    assert elsewhere.lookup("train", KEY) == ref
    assert elsewhere.find(ref.digest) == ref
    assert elsewhere.find("0" * 64) is None
    assert elsewhere.manifest(ref) == read_manifest(directory)
    fetched = elsewhere.fetch(ref)
    assert (fetched / "model" / "w.bin").read_text() == "weights"
    assert elsewhere.fetch(ref) == fetched


def test_a_second_fetch_reads_the_sound_copy(store: S3Store, elsewhere: S3Store) -> None:
    ref = store.publish(work(store))
    fetched = elsewhere.fetch(ref)
    store.client.remove_object(bucket_name="models", object_name=f"{store.prefix}/content/{ref.digest}/report.json")
    assert elsewhere.fetch(ref) == fetched


def test_a_damaged_copy_is_fetched_again(store: S3Store, elsewhere: S3Store) -> None:
    ref = store.publish(work(store))
    fetched = elsewhere.fetch(ref)
    (fetched / "report.json").write_text("[]")
    assert elsewhere.fetch(ref) == fetched
    assert (fetched / "report.json").read_text() == "{}"
    assert [path.name.split("-")[0] for path in (elsewhere.local.root / "damaged").iterdir()] == ["train"]


def test_a_crash_in_the_middle_of_a_publish_is_not_found(
    store: S3Store, elsewhere: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = work(store)

    def crash(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_put_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            store.publish(directory)
    digest = getattr(read_manifest(directory), "digest", "")
    assert f"content/{digest}/report.json" in object_names(store)
    assert elsewhere.lookup("train", KEY) is None
    assert elsewhere.find(digest) is None
    # The same command again finds the finished work directory and only publishes it.
    ref = reuse(store, "train", KEY)
    assert ref is not None
    assert elsewhere.find(digest) == ref


def test_finished_work_that_was_damaged_before_its_publish_is_done_again(store: S3Store) -> None:
    (work(store) / "report.json").write_text("[]")
    assert reuse(store, "train", KEY) is None
    assert list(store.work_dir("train", KEY).iterdir()) == []
    assert store.lookup("train", KEY) is None


def test_the_first_to_publish_wins(store: S3Store, elsewhere: S3Store) -> None:
    first = store.publish(work(store))
    assert elsewhere.publish(work(elsewhere, text="nearly the same")) == first
    assert (elsewhere.fetch(first) / "model" / "w.bin").read_text() == "weights"


def test_of_two_machines_that_publish_at_once_the_first_wins_and_nothing_is_mixed(
    store: S3Store, elsewhere: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, other = work(store), work(elsewhere, text="nearly the same")
    put_manifest = elsewhere._put_manifest

    def late(manifest: Manifest, folder: Path) -> None:
        store.publish(directory)
        put_manifest(manifest, folder)

    monkeypatch.setattr(elsewhere, "_put_manifest", late)
    assert elsewhere.publish(other) == store.lookup("train", KEY)
    ref = store.lookup("train", KEY)
    assert ref is not None
    assert ref.digest == getattr(read_manifest(directory), "digest", "")
    assert (elsewhere.fetch(ref) / "model" / "w.bin").read_text() == "weights"


def test_of_equal_bytes_the_last_is_found(store: S3Store) -> None:
    first = store.publish(work(store, KEY))
    time.sleep(0.002)
    second = store.publish(work(store, OTHER))
    assert first.digest == second.digest
    assert store.find(first.digest) == second


def put(store: S3Store, name: str, text: bytes) -> None:
    name = f"{store.prefix}/{name}"
    store.client.put_object(bucket_name="models", object_name=name, data=io.BytesIO(text), length=len(text))


def test_a_damaged_object_is_named_moved_aside_and_done_again(store: S3Store, elsewhere: S3Store) -> None:
    ref = store.publish(work(store))
    put(store, f"content/{ref.digest}/model/w.bin", b"WEIGHTS")
    with pytest.raises(ArtifactError, match=r"content/.*/model/w\.bin: sha256"):
        elsewhere.fetch(ref)
    assert list((elsewhere.local.root / ".fetched").iterdir()) == []
    assert reuse(elsewhere, "train", KEY) is None
    assert elsewhere.lookup("train", KEY) is None
    names = [name.partition("/")[2].partition("/")[2] for name in object_names(store) if name.startswith("damaged/")]
    assert names == ["DAMAGED.txt", "manifest.json", "model/w.bin", "report.json"]
    again = elsewhere.publish(work(elsewhere))
    assert again == ref
    assert reuse(elsewhere, "train", KEY) == ref


def test_a_missing_object_is_named(store: S3Store, elsewhere: S3Store) -> None:
    ref = store.publish(work(store))
    store.client.remove_object(bucket_name="models", object_name=f"{store.prefix}/content/{ref.digest}/report.json")
    with pytest.raises(ArtifactError, match=r"report\.json: the object is missing"):
        elsewhere.fetch(ref)


def test_a_tampered_manifest_is_refused(store: S3Store) -> None:
    ref = store.publish(work(store))
    put(store, f"train/{KEY}/manifest.json", b'{"schema_version": 1}')
    with pytest.raises(ArtifactError, match=rf"s3://models/.*{KEY}/manifest\.json: not a manifest"):
        store.lookup("train", KEY)
    assert store.find(ref.digest) is None


def test_a_manifest_of_another_key_is_refused(store: S3Store) -> None:
    put(store, f"train/{OTHER}/manifest.json", (work(store) / "manifest.json").read_bytes())
    with pytest.raises(ArtifactError, match="is of step 'train'"):
        store.lookup("train", OTHER)


def test_a_reference_to_other_bytes_is_refused(store: S3Store, elsewhere: S3Store) -> None:
    ref = store.publish(work(store))
    stale = ArtifactRef(step="train", key=KEY, digest="0" * 64, uri=ref.uri)
    with pytest.raises(ArtifactError, match="the reference says"):
        elsewhere.fetch(stale)
    missing = ArtifactRef(step="train", key=OTHER, digest="0" * 64, uri="")
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        elsewhere.fetch(missing)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"NVILA_S3_SECRET_KEY": "wrong"}, "check NVILA_S3_ACCESS_KEY"),
        ({"NVILA_S3_ACCESS_KEY": "nobody"}, "check NVILA_S3_ACCESS_KEY"),
        ({"NVILA_STORE_URI": "s3://no-such-bucket/x"}, "no bucket 'no-such-bucket'"),
        ({"NVILA_STORE_URI": "s3://a/x"}, "correct the bucket's name"),
        ({"NVILA_S3_ENDPOINT": "h:port"}, "use host:port"),
    ],
    ids=["secret", "identity", "bucket", "bucket-name", "endpoint"],
)
def test_settings_that_the_service_refuses(s3: S3Service, tmp_path: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_store(settings(tmp_path / "ws", s3, **changes))
    assert "only-for-this-test" not in str(caught.value)


def test_who_may_only_read_fetches_and_is_told_what_publishing_needs(
    store: S3Store, s3: S3Service, tmp_path: Path
) -> None:
    ref = store.publish(work(store))
    reader = S3Store.open(settings(tmp_path / "reader", s3, **READER))
    assert (reader.fetch(ref) / "model" / "w.bin").read_text(encoding="utf-8") == "weights"
    with pytest.raises(ConfigError, match="what this identity may do") as caught:
        reader.publish(work(reader, OTHER))
    assert READER["NVILA_S3_SECRET_KEY"] not in str(caught.value)
    assert store.lookup("train", OTHER) is None


def test_a_service_that_is_down_is_worth_another_try(s3: S3Service, closed_endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot be reached") as caught:
        open_store(settings(tmp_path / "ws", s3, NVILA_S3_ENDPOINT=closed_endpoint))
    assert caught.value.retryable


def test_a_missing_sdk_is_named(s3: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minio", None)
    with pytest.raises(CapabilityError, match="pip install"):
        open_store(settings(tmp_path / "ws", s3))


def test_a_full_disk_while_fetching(store: S3Store, elsewhere: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = store.publish(work(store))

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Download, "_copy", full)
    with pytest.raises(ResourceError, match="no space left"):
        elsewhere.fetch(ref)
    assert list((elsewhere.local.root / ".fetched").iterdir()) == []
