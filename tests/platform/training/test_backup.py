"""Backups of unfinished training, in a folder and on a real S3 service, and the faults of both."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import ArtifactError, ConfigError, InfrastructureError
from nvila_platform.settings import Settings
from nvila_platform.training import backup
from nvila_platform.training.backup import CheckpointUploader, backed_up, restore
from nvila_platform.training.backup_store import BackupStore, FolderBackups, open_backups

if TYPE_CHECKING:
    from tests.conftest import S3Service

CHECKPOINTS = ".checkpoints/1-align"


def opened(uri: str, run: str = "run", **environ: str) -> BackupStore:
    store = open_backups(Settings.load(environ={"NVILA_CHECKPOINT_URI": uri, **environ}), run)
    assert store is not None
    return store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BackupStore:
    if request.param == "folder":
        return opened(str(tmp_path / "volume"))
    s3: S3Service = request.getfixturevalue("s3")
    return opened(f"s3://models/backups/{tmp_path.name}", **s3.variables)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"stage": "align"}\n')
    return tmp_path / "out"


def nobody(text: str) -> None:
    """Hear nothing."""


def leave(out: Path, name: str, text: str = "weights") -> None:
    """Leave a folder as training does: under another name first."""
    written = out / f".{name.replace('/', '-')}.partial"
    (written / "parts").mkdir(parents=True)
    (written / "manifest.json").write_text("{}")
    (written / "parts" / "state.bin").write_text(text)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    written.rename(out / name)


@contextmanager
def uploading(store: BackupStore, out: Path, said: list[str] | None = None, **options: int) -> Iterator[None]:
    uploader = CheckpointUploader(store, out, (said if said is not None else []).append, poll_s=0.02, **options)
    try:
        yield
    finally:
        uploader.close(finished=False)


def wait_for(truth: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stored(store: BackupStore, name: str) -> bool:
    return name in store.names()


def test_training_goes_on_where_its_disk_is_gone(store: BackupStore, out: Path, tmp_path: Path) -> None:
    with uploading(store, out):
        leave(out, "1-align")
        leave(out, ".checkpoints/2-vision/step-90", "old")
        wait_for(lambda: len(store.names()) == 2)
        leave(out, ".checkpoints/2-vision/step-100", "new")
        (out / ".checkpoints/2-vision/.step-110.partial").mkdir()
        (out / ".checkpoints/2-vision/damaged-step-80").mkdir()
    assert set(store.names()) == {"1-align", ".checkpoints/2-vision/step-90", ".checkpoints/2-vision/step-100"}
    assert not (out / ".backup").exists()
    said: list[str] = []
    elsewhere = tmp_path / "elsewhere"
    assert restore(store, elsewhere, said.append) == ["1-align", ".checkpoints/2-vision/step-100"]
    assert (elsewhere / "1-align/parts/state.bin").read_text() == "weights"
    assert (elsewhere / ".checkpoints/2-vision/step-100/parts/state.bin").read_text() == "new"
    assert (elsewhere / "metrics.jsonl").read_text() == '{"stage": "align"}\n'
    assert {path.name for path in (elsewhere / "1-align").iterdir()} == {"manifest.json", "parts"}
    assert said == [
        "nothing of this training is on this machine; going on from the backup .checkpoints/2-vision/step-100"
    ]


def test_old_checkpoints_and_those_of_finished_stages_are_deleted(store: BackupStore, out: Path) -> None:
    with uploading(store, out, keep=2):
        for step in (9, 10, 11):
            leave(out, f"{CHECKPOINTS}/step-{step}")
            wait_for(partial(stored, store, f"{CHECKPOINTS}/step-{step}"))
        wait_for(lambda: store.names() == [f"{CHECKPOINTS}/step-10", f"{CHECKPOINTS}/step-11"])
        leave(out, "1-align")
        wait_for(lambda: store.names() == ["1-align"])


def test_backups_of_a_finished_run_are_deleted(out: Path, tmp_path: Path) -> None:
    settings = Settings.load(environ={"NVILA_CHECKPOINT_URI": str(tmp_path / "volume")})
    store = opened(str(tmp_path / "volume"), run=out.name)

    def killed() -> None:
        with backed_up(settings, out, nobody):
            leave(out, "1-align")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()
    assert store.names() == ["1-align"]
    with backed_up(settings, out, nobody):
        leave(out, "2-vision")
    assert store.names() == []
    with backed_up(Settings.load(environ={}), out, nobody):
        pass


def test_what_is_here_already_is_not_fetched(out: Path, tmp_path: Path) -> None:
    store = FolderBackups(tmp_path / "volume")
    with uploading(store, out):
        leave(out, "1-align")
    assert restore(store, out, nobody) == []
    shutil.rmtree(out / "1-align")
    leave(out, f"{CHECKPOINTS}/step-3")
    assert restore(store, out, nobody) == []


def test_a_second_attempt_uploads_nothing_twice(out: Path, tmp_path: Path) -> None:
    class Counting(FolderBackups):
        puts: list[str] = []  # noqa: RUF012

        def put(self, name: str, files: Mapping[str, Path]) -> None:
            self.puts.append(name)
            super().put(name, files)

    store = Counting(tmp_path / "volume")
    for _ in range(2):
        with uploading(store, out):
            if not (out / "1-align").exists():
                leave(out, "1-align")
    assert Counting.puts == ["1-align"]


def test_damaged_newest_falls_back_and_says_so(store: BackupStore, out: Path, tmp_path: Path) -> None:
    sources = {"state.bin": tmp_path / "state.bin"}
    sources["state.bin"].write_text("sound")
    store.put(f"{CHECKPOINTS}/step-1", sources)
    # What was listed is not what is there: the file changed between the list and the upload.
    size = sources["state.bin"].stat().st_size

    class Changing(dict[str, Path]):
        def items(self):  # type: ignore[no-untyped-def]
            yield from super().items()
            sources["state.bin"].write_text("x" * size)

    store.put(f"{CHECKPOINTS}/step-2", Changing(sources))
    said: list[str] = []
    fetched = restore(store, out, said.append)
    if f"{CHECKPOINTS}/step-2" in fetched:  # listed after the change: sound
        pytest.fail("the damage of this test came too late")
    assert fetched == [f"{CHECKPOINTS}/step-1"]
    assert "step-2/state.bin is damaged; trying the backup before it" in said[0]
    assert not (out / CHECKPOINTS / "step-2").exists()


@pytest.mark.parametrize(
    ("listing", "message"),
    [("{", "is damaged"), ('{"../x": [1, "a"]}', "leaves the folder"), ('{"lost": [1, "a"]}', "lost is missing")],
)
def test_broken_entries_are_refused(listing: str, message: str, tmp_path: Path) -> None:
    store = FolderBackups(tmp_path)
    (tmp_path / "1-align").mkdir()
    (tmp_path / "1-align" / "complete.json").write_text(listing)
    with pytest.raises(ArtifactError, match=message):
        store.get("1-align", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_upload_is_not_there(store: BackupStore, out: Path, tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("a")
    with pytest.raises((OSError, ArtifactError)):
        store.put("1-align", {"a": source, "b": tmp_path / "lost"})
    assert store.names() == []
    assert restore(store, out, nobody) == []
    store.put("1-align", {"a": source})
    store.delete("1-align")
    assert store.names() == []


def test_training_deletes_a_checkpoint_while_it_is_uploaded(out: Path, tmp_path: Path) -> None:
    class Slow(FolderBackups):
        def put(self, name: str, files: Mapping[str, Path]) -> None:
            shutil.rmtree(out / name)
            super().put(name, files)

    store = Slow(tmp_path / "volume")
    with uploading(store, out):
        leave(out, f"{CHECKPOINTS}/step-1")
        wait_for(store.names)
    assert store.names() == [f"{CHECKPOINTS}/step-1"]


def test_full_store_is_said_once_and_tried_again(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume is a file at first, so nothing can be written to it; then somebody mends that."""
    monkeypatch.setattr(backup, "_FIRST_WAIT_S", 0.02)
    (tmp_path / "volume").write_text("not a folder")
    said: list[str] = []
    with uploading(FolderBackups(tmp_path / "volume"), out, said):
        leave(out, "1-align")
        wait_for(lambda: said)
        time.sleep(0.1)
        (tmp_path / "volume").unlink()
        wait_for(lambda: len(said) == 2)
    assert "it goes on, and so do the attempts" in said[0]
    assert said[1] == "backups of this training work again"
    assert FolderBackups(tmp_path / "volume").names() == ["1-align"]


def test_s3_that_dies_in_mid_run_costs_training_nothing(mortal_s3: S3Service, out: Path, tmp_path: Path) -> None:
    store = opened("s3://models/backups", **mortal_s3.variables)
    said: list[str] = []
    uploader = CheckpointUploader(store, out, said.append, poll_s=0.02)
    leave(out, "1-align")
    wait_for(store.names)
    mortal_s3.kill()
    leave(out, ".checkpoints/2-vision/step-1")
    wait_for(lambda: said, 40)
    began = time.monotonic()
    uploader.close(finished=False, timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert "the S3 service cannot be reached" in said[0]
    with pytest.raises(InfrastructureError):
        restore(store, tmp_path / "elsewhere", said.append)


@pytest.mark.parametrize("uri", ["s3://", "ftp://x/y"])
def test_bad_address_is_named(uri: str) -> None:
    with pytest.raises(ConfigError, match="NVILA_CHECKPOINT_URI"):
        opened(uri)


def test_missing_bucket_is_named(s3: S3Service, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such bucket"):
        restore(opened("s3://nowhere/x", **s3.variables), tmp_path, nobody)


def test_links_fall_back_to_the_files(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = FolderBackups(tmp_path / "volume")
    with uploading(store, out):
        leave(out, "1-align")
    assert store.names() == ["1-align"]
