"""The local store: lookup, damage, crashes, locks and unusable folders."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvila.errors import ArtifactError, ConfigError, ResourceError
from nvila_platform.artifacts import content_key, read_manifest, utc_now, write_manifest
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, ArtifactStore, LocalStore, file_lock, open_store, reuse

KEY = content_key("train", {"lr": 1}, {}, "v")
OTHER = content_key("train", {"lr": 2}, {}, "v")


class Notices:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def progress(self, *_: object) -> None: ...

    def notice(self, text: str) -> None:
        self.texts.append(text)


def work(store: ArtifactStore, key: str = KEY, *, text: str = "weights", step: str = "train") -> Path:
    directory = store.work_dir(step, key)
    (directory / "w.bin").write_text(text)
    write_manifest(directory, step=step, key=key, config={}, inputs={}, code_version="v", started_at=utc_now())
    return directory


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "artifacts")


def test_published_work_is_found_by_key_and_by_digest(store: LocalStore) -> None:
    assert store.lookup("train", KEY) is None
    directory = work(store)
    assert directory == store.root / "train" / KEY[:16]
    ref = store.publish(directory)
    assert store.lookup("train", KEY) == ref
    assert store.find(ref.digest) == ref
    assert store.fetch(ref) == directory
    assert store.manifest(ref) == read_manifest(directory)
    assert ref.uri == directory.as_uri()
    assert store.lookup("train", OTHER) is None
    assert store.find("0" * 64) is None


def test_a_reference_crosses_processes(store: LocalStore) -> None:
    ref = store.publish(work(store))
    assert ArtifactRef.from_json(ref.to_json()) == ref


@pytest.mark.parametrize("text", ["", "[]", '{"step": "x"}'])
def test_text_that_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not an artifact reference"):
        ArtifactRef.from_json(text)


def test_a_store_that_moved_still_finds_everything(store: LocalStore, tmp_path: Path) -> None:
    ref = store.publish(work(store))
    store.root.rename(tmp_path / "moved")
    moved = LocalStore(tmp_path / "moved")
    assert (moved.fetch(ref) / "w.bin").read_text() == "weights"


def test_of_equal_bytes_the_one_that_finished_last_is_found(store: LocalStore) -> None:
    first = store.publish(work(store, KEY))
    time.sleep(0.002)
    second = store.publish(work(store, OTHER))
    assert first.digest == second.digest
    assert store.find(first.digest) == second


KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from pathlib import Path
from nvila_platform.artifacts import utc_now, write_manifest
from nvila_platform.store import LocalStore
store, key = LocalStore(Path(sys.argv[1])), sys.argv[2]
directory = store.work_dir("train", key)
(directory / "w.bin").write_text("weights")
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with store.lock("train", key):
    write_manifest(directory, step="train", key=key, config={}, inputs={}, code_version="v", started_at=utc_now())
"""


def test_killed_in_the_middle_of_a_publish_is_not_found_and_resumes(store: LocalStore) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(store.root), KEY]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert store.lookup("train", KEY) is None
    assert (store.work_dir("train", KEY) / "w.bin").read_text() == "weights"
    notices = Notices()
    with store.lock("train", KEY, notices):
        assert reuse(store, "train", KEY, notices) is None
        ref = store.publish(work(store))
    assert notices.texts == []
    assert [entry.path for entry in store.manifest(ref).outputs] == ["w.bin"]


def test_unfinished_work_cannot_be_published(store: LocalStore) -> None:
    directory = store.work_dir("train", KEY)
    with pytest.raises(ArtifactError, match="did not finish"):
        store.publish(directory)


def test_only_a_work_directory_can_be_published(store: LocalStore, tmp_path: Path) -> None:
    elsewhere = work(LocalStore(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="is not the store's directory"):
        store.publish(elsewhere)


def test_a_damaged_artifact_is_named_moved_aside_and_done_again(store: LocalStore) -> None:
    ref = store.publish(work(store))
    (store.fetch(ref) / "w.bin").write_text("WEIGHTS")
    with pytest.raises(ArtifactError, match=r"w\.bin: sha256"):
        store.fetch(ref)
    notices = Notices()
    assert reuse(store, "train", KEY, notices) is None
    assert "w.bin" in notices.texts[0]
    assert "doing it again" in notices.texts[0]
    aside = list((store.root / "damaged").iterdir())
    assert [path.name.startswith(f"train-{KEY[:16]}-") for path in aside] == [True]
    assert (aside[0] / "w.bin").read_text() == "WEIGHTS"
    assert "sha256" in (aside[0] / "DAMAGED.txt").read_text()
    assert store.find(ref.digest) is None
    again = store.publish(work(store))
    assert again.digest == ref.digest
    assert reuse(store, "train", KEY) == again


def test_a_tampered_manifest_is_moved_aside_too(store: LocalStore) -> None:
    path = store.fetch(store.publish(work(store))) / "manifest.json"
    path.write_text(path.read_text().replace('"v"', '"w"'))
    with pytest.raises(ArtifactError, match="was changed"):
        store.lookup("train", KEY)
    assert store.find("0" * 64) is None
    notices = Notices()
    assert reuse(store, "train", KEY, notices) is None
    assert len(notices.texts) == 1
    assert list(store.work_dir("train", KEY).iterdir()) == []


def test_a_manifest_of_another_key_is_refused(store: LocalStore) -> None:
    directory = work(store)
    directory.rename(store.root / "train" / OTHER[:16])
    with pytest.raises(ArtifactError, match="its manifest is of step"):
        store.lookup("train", OTHER)


def test_a_reference_to_bytes_that_were_made_again_is_refused(store: LocalStore) -> None:
    old = store.publish(work(store))
    store.discard(old, "test")
    store.publish(work(store, text="other"))
    with pytest.raises(ArtifactError, match="the reference says"):
        store.fetch(old)


def test_discarding_what_is_missing_does_nothing(store: LocalStore) -> None:
    store.discard(ArtifactRef(step="train", key=KEY, digest="", uri=""), "test")
    assert store.lookup("train", KEY) is None
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        store.manifest(ArtifactRef(step="train", key=KEY, digest="", uri=""))


@pytest.mark.parametrize("step", ["", "../x", "a/b", "damaged", "digests", ".locks", "Train"])
def test_a_step_name_that_leaves_the_layout_is_refused(store: LocalStore, step: str) -> None:
    with pytest.raises(ArtifactError, match="cannot name a step"):
        store.work_dir(step, KEY)


@pytest.mark.parametrize("key", ["", "../../etc/passwd/xx", "short", "G" * 64])
def test_a_key_that_leaves_the_layout_is_refused(store: LocalStore, key: str) -> None:
    with pytest.raises(ArtifactError, match="is not a content key"):
        store.lookup("train", key)


HOLD_LOCK = """
import sys, time
from pathlib import Path
from nvila_platform.store import LocalStore
with LocalStore(Path(sys.argv[1])).lock("train", sys.argv[2]):
    print("locked", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold_lock(store: LocalStore, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD_LOCK, str(store.root), KEY, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_second_process_waits_and_says_for_whom(store: LocalStore) -> None:
    notices = Notices()
    with hold_lock(store, 0.4) as holder:
        with store.lock("train", OTHER, notices):
            assert notices.texts == []
        start = time.monotonic()
        with store.lock("train", KEY, notices):
            assert time.monotonic() - start > 0.2
            assert holder.wait(10) == 0
    assert notices.texts == [f"train {KEY[:16]}: process {holder.pid} is working on it; waiting"]


def test_the_lock_of_a_killed_process_is_free(store: LocalStore) -> None:
    with hold_lock(store, 60) as holder:
        holder.kill()
        holder.wait(10)
        notices = Notices()
        with store.lock("train", KEY, notices):
            assert notices.texts == []


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), file_lock(tmp_path / "l", "it"):
        raise ValueError("inside")
    notices = Notices()
    with file_lock(tmp_path / "l", "it", notices):
        assert notices.texts == []


def test_the_lock_names_only_its_present_holder(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("123456789012345")
    with file_lock(tmp_path / "l", "it"):
        assert (tmp_path / "l").read_text() == str(os.getpid())


def test_a_workspace_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("a file")
    for root in (tmp_path / "ws", tmp_path / "ws" / "artifacts"):
        with pytest.raises(ConfigError, match="--workspace") as caught:
            LocalStore(root)
        assert str(tmp_path / "ws") in caught.value.message


def test_a_file_in_the_way_of_a_step(store: LocalStore) -> None:
    (store.root / "train").write_text("a file")
    assert store.lookup("train", KEY) is None
    with pytest.raises(ConfigError, match="cannot write"):
        store.work_dir("train", KEY)


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EROFS, ConfigError), (errno.EACCES, ConfigError), (errno.ENOSPC, ResourceError)],
    ids=["read-only", "no-permission", "full"],
)
def test_a_workspace_that_cannot_be_written(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(error) as caught:
            store.work_dir("train", KEY)
        assert str(store.root) in str(caught.value)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error), store.lock("train", KEY):
        pass


def test_the_settings_choose_the_store(tmp_path: Path) -> None:
    plain = open_store(Settings.load(tmp_path, {}))
    url = open_store(Settings.load(tmp_path, {"NVILA_STORE_URI": (tmp_path / "a b").as_uri()}))
    assert isinstance(plain, LocalStore)
    assert isinstance(url, LocalStore)
    assert plain.root == tmp_path / "artifacts"
    assert url.root == tmp_path / "a b"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"NVILA_STORE_URI": "s4://b"}, ["'s4'", "did you mean 's3'"]),
        ({"NVILA_STORE_URI": "gs://b"}, ["'gs'", "A folder needs no scheme"]),
        ({"NVILA_STORE_URI": "s3://"}, ["names no bucket"]),
        ({"NVILA_STORE_URI": "s3://b"}, ["NVILA_S3_ENDPOINT is not set"]),
        ({"NVILA_STORE_URI": "s3://b", "NVILA_S3_ENDPOINT": "h:1"}, ["NVILA_S3_ACCESS_KEY is not set"]),
    ],
)
def test_a_store_address_that_cannot_be_used(tmp_path: Path, environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(Settings.load(tmp_path, environ))
    assert all(name in str(caught.value) for name in names)
