"""Backups of training that is not finished, so that it can go on where the disk that it ran on is gone.

A thread looks for finished folders of the run: models of finished stages, and checkpoints inside a stage. Both get
their names in one rename, so what has its name is complete. It uploads every stage, and of the checkpoints always the
newest: a slow store makes backups rarer, and never a queue. The training loop waits for none of this.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nvila.errors import ArtifactError, NvilaError
from nvila_platform.settings import Settings
from nvila_platform.training.backup_store import BackupStore, open_backups

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = ".checkpoints"
# Small files beside the folders without which a resumed run could not go on as it was.
_BESIDE = ("metrics.jsonl", "skipped.jsonl", ".history.jsonl")
_BESIDE_FOLDER = ".beside"
_SNAPSHOT = ".backup"
_STAGE = re.compile(r"\d+-.+")
_STEP = re.compile(r"step-\d+")
_NUMBERS = re.compile(r"\d+")
_POLL_S = 2.0
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0
_CLOSE_S = 20.0

Say = Callable[[str], None]


class CheckpointUploader:
    """Uploads finished folders of a run in the background.

    Args:
        store: Where to.
        out_dir: Outputs of the run.
        say: Told once about each trouble, and when it is over.
        keep: Checkpoints that stay in the store; those of a stage go when the stage itself is there.
        poll_s: Time between two looks.
    """

    def __init__(self, store: BackupStore, out_dir: Path, say: Say, *, keep: int = 2, poll_s: float = _POLL_S) -> None:
        self._store = store
        self._out_dir = out_dir
        self._say = say
        self._keep = keep
        self._poll_s = poll_s
        self._uploaded: set[str] | None = None
        self._trouble = ""
        self._wait_s = _FIRST_WAIT_S
        self._finished = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
        self._thread.start()

    def close(self, finished: bool, timeout_s: float = _CLOSE_S) -> None:
        """Stop watching.

        Args:
            finished: The run has come to its end, so its backups are deleted. Otherwise what is newest is uploaded.
            timeout_s: How long to wait for that.
        """
        self._finished = finished
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say(f"the newest backup is not complete: the store took longer than {timeout_s:g} s")

    def _work(self) -> None:
        while not self._stop.is_set():
            ok = self._attempt(self._upload_new)
            pause_s = self._poll_s if ok else self._wait_s
            self._wait_s = _FIRST_WAIT_S if ok else min(2 * self._wait_s, _LONGEST_WAIT_S)
            self._stop.wait(pause_s)
        self._attempt(self._clear if self._finished else self._upload_new)
        shutil.rmtree(self._out_dir / _SNAPSHOT, ignore_errors=True)

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (NvilaError, OSError) as e:
            text = e.message if isinstance(e, NvilaError) else str(e)
            if text != self._trouble:
                self._say(f"no backup of this training: {text}; it goes on, and so do the attempts")
            self._trouble = text
            return False
        except Exception:  # the thread is the boundary: a backup never takes the training down
            logger.exception("backups of this training end here")
            self._say("no backup of this training any more: an error that nobody foresaw is in the log")
            self._stop.wait()
            return False
        if self._trouble:
            self._say("backups of this training work again")
            self._trouble = ""
        return True

    def _upload_new(self) -> None:
        if self._uploaded is None:
            self._uploaded = set(self._store.names())
        checkpoints = _checkpoints(self._out_dir)
        for name in (*_stages(self._out_dir), *checkpoints[-1:]):
            if name not in self._uploaded:
                self._upload(name)
                self._uploaded.add(name)
        self._delete_old()

    def _upload(self, name: str) -> None:
        """Upload a folder from links to its files, which stay when the training deletes the folder meanwhile."""
        snapshot = self._out_dir / _SNAPSHOT
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            files = _linked(self._out_dir / name, snapshot)
        except FileNotFoundError:
            return
        for beside in _BESIDE:
            if (self._out_dir / beside).is_file():
                # Appended to while we read: a copy has one length.
                shutil.copyfile(self._out_dir / beside, snapshot / f"beside-{beside}")
                files[f"{_BESIDE_FOLDER}/{beside}"] = snapshot / f"beside-{beside}"
        self._store.put(name, files)

    def _delete_old(self) -> None:
        assert self._uploaded is not None
        stored = _sorted(name for name in self._uploaded if name.startswith(f"{CHECKPOINTS_FOLDER}/"))
        superseded = stored[: -self._keep] if self._keep else stored
        superseded += [name for name in stored if name.split("/")[1] in self._uploaded and name not in superseded]
        for name in superseded:
            self._store.delete(name)
            self._uploaded.discard(name)

    def _clear(self) -> None:
        for name in self._store.names():
            self._store.delete(name)


@contextmanager
def backed_up(settings: Settings, out_dir: Path, say: Say) -> Iterator[None]:
    """Back up a run while it trains, when the settings name a place for it.

    Raises:
        ConfigError: The place cannot be used.
    """
    store = open_backups(settings, out_dir.name)
    if store is None:
        yield
        return
    uploader = CheckpointUploader(store, out_dir, say)
    finished = False
    try:
        yield
        finished = True
    finally:
        uploader.close(finished)


def restore(store: BackupStore, out_dir: Path, say: Say) -> list[str]:
    """Fetch what is needed to go on with a run of which this machine has nothing.

    Where there is a stage or a checkpoint already, nothing is fetched: the machine that wrote it is ahead of its
    backups.

    Args:
        store: Entries of the run.
        out_dir: Where its outputs go.
        say: Told what was fetched, and of each damaged entry.

    Returns:
        Names of what was fetched: all finished stages, and the newest sound checkpoint behind them.

    Raises:
        ArtifactError: A finished stage is damaged in the store.
        InfrastructureError: The store does not answer.
    """
    if _stages(out_dir) or _checkpoints(out_dir):
        return []
    names = store.names()
    fetched = []
    for name in _sorted(name for name in names if _STAGE.fullmatch(name)):
        store.get(name, out_dir / name)
        fetched.append(name)
    for name in reversed(_sorted(name for name in names if name.startswith(f"{CHECKPOINTS_FOLDER}/"))):
        if name.split("/")[1] in fetched:
            continue
        try:
            (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            store.get(name, out_dir / name)
        except ArtifactError as e:
            say(f"{e.message}; trying the backup before it")
            continue
        fetched.append(name)
        break
    for name in fetched:  # the last one is the newest
        _put_beside(out_dir, name)
    if fetched:
        say(f"nothing of this training is on this machine; going on from the backup {fetched[-1]}")
    return fetched


def _put_beside(out_dir: Path, name: str) -> None:
    folder = out_dir / name / _BESIDE_FOLDER
    if folder.is_dir():
        for path in folder.iterdir():
            path.replace(out_dir / path.name)
        folder.rmdir()


def _stages(out_dir: Path) -> list[str]:
    return _sorted(path.name for path in _folders(out_dir) if _STAGE.fullmatch(path.name))


def _checkpoints(out_dir: Path) -> list[str]:
    root = out_dir / CHECKPOINTS_FOLDER
    found = [path for stage in _folders(root) for path in _folders(stage) if _STEP.fullmatch(path.name)]
    return _sorted(path.relative_to(out_dir).as_posix() for path in found)


def _folders(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sorted(names: Iterable[str]) -> list[str]:
    """Order names by the numbers in them: `2-vision/step-90` comes before `2-vision/step-100`."""
    return sorted(names, key=lambda name: [int(number) for number in _NUMBERS.findall(name)])


def _linked(folder: Path, snapshot: Path) -> dict[str, Path]:
    """Link every file of a folder and return the links by the file's path inside it."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            relative = path.relative_to(folder)
            link = snapshot / "files" / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, link)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                link = path
            files[relative.as_posix()] = link
    if not files:
        raise FileNotFoundError(folder)
    return files
