"""Transfers to and from a real S3 service that dies, refuses, is slow or full, and clients that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import ConfigError, InfrastructureError, ResourceError
from nvila_platform.artifacts import content_key, read_manifest, utc_now, write_manifest
from nvila_platform.s3_parts import MIB, TransferLimits
from nvila_platform.s3_store import S3Store
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from tests.conftest import S3Service
    from tests.platform.conftest import FaultyProxy

KEY = content_key("train", {"lr": 1}, {}, "v")
PART = 5 * MIB  # S3 takes no smaller ones
SIZE = 40 * MIB
LIMITS = TransferLimits(part_bytes=PART, parallel=2, patience_s=30)
# A killed transfer loses what is under way, and sockets hold some of it.
IN_FLIGHT = (LIMITS.parallel + 1) * LIMITS.part_bytes

PROGRAM = """
import sys
from pathlib import Path
from nvila_platform.s3_parts import TransferLimits, MIB
from nvila_platform.s3_store import S3Store
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
store = S3Store.open(Settings.load(Path(sys.argv[1])))
store.limits = TransferLimits(part_bytes=5 * MIB, parallel=2, patience_s=30)
if sys.argv[2] == "up":
    store.publish(Path(sys.argv[3]))
else:
    store.fetch(ArtifactRef.from_json(sys.argv[3]))
"""


def variables(s3: S3Service, endpoint: str, workspace: Path) -> dict[str, str]:
    uri = f"s3://models/{workspace.parent.name}"
    return {**s3.variables, "NVILA_S3_ENDPOINT": endpoint, "NVILA_STORE_URI": uri}


def open_at(s3: S3Service, endpoint: str, workspace: Path, limits: TransferLimits = LIMITS) -> S3Store:
    store = S3Store.open(Settings.load(workspace, variables(s3, endpoint, workspace)))
    store.limits = limits
    return store


def work(store: S3Store, size: int = SIZE) -> Path:
    directory = store.work_dir("train", KEY)
    (directory / "w.bin").write_bytes(os.urandom(size))
    for number in range(8):
        (directory / f"small-{number}.bin").write_bytes(os.urandom(1000 + number))
    (directory / "empty.bin").write_bytes(b"")
    write_manifest(directory, step="train", key=KEY, config={}, inputs={}, code_version="v", started_at=utc_now())
    return directory


def start(s3: S3Service, endpoint: str, workspace: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **variables(s3, endpoint, workspace)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(workspace), *arguments], env=environment)


def wait_until(reached: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def when(reached: Callable[[], bool], *actions: Callable[[], object]) -> None:
    """Do something in the middle of what the test does next."""

    def wait() -> None:
        wait_until(reached)
        for action in actions:
            action()

    threading.Thread(target=wait, daemon=True).start()


def same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir() if not path.name.startswith("."))
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_a_killed_upload_goes_on_where_it_was(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one")
    directory = work(store)
    proxy.sent, proxy.bytes_per_second = 0, 40 * MIB
    child = start(s3, proxy.endpoint, tmp_path / "one", "up", str(directory))
    wait_until(lambda: proxy.sent > SIZE / 2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.lookup("train", KEY) is None
    proxy.bytes_per_second = None
    ref = store.publish(directory)
    assert proxy.sent < SIZE + IN_FLIGHT
    assert not (directory / ".upload.jsonl").exists()
    same_files(directory, open_at(s3, s3.endpoint, tmp_path / "two").fetch(ref))


def test_a_killed_download_goes_on_where_it_was(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    directory = work(open_at(s3, s3.endpoint, tmp_path / "one"))
    ref = open_at(s3, s3.endpoint, tmp_path / "one").publish(directory)
    proxy = faulty(s3.endpoint)
    proxy.bytes_per_second = 40 * MIB
    child = start(s3, proxy.endpoint, tmp_path / "two", "down", ref.to_json())
    wait_until(lambda: proxy.received > SIZE / 2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    proxy.bytes_per_second = None
    fetched = open_at(s3, proxy.endpoint, tmp_path / "two").fetch(ref)
    assert proxy.received < SIZE + IN_FLIGHT
    same_files(directory, fetched)


def test_ranges_that_a_power_cut_took_away_are_fetched_again(s3: S3Service, tmp_path: Path) -> None:
    directory = work(open_at(s3, s3.endpoint, tmp_path / "one"), size=3 * PART)
    ref = open_at(s3, s3.endpoint, tmp_path / "one").publish(directory)
    store = open_at(s3, s3.endpoint, tmp_path / "two")
    incoming = store.local.root / ".fetched" / f".incoming-{ref.digest[:32]}"
    incoming.mkdir(parents=True)
    (incoming / "w.bin").write_bytes(b"")
    name = f"{tmp_path.name}/content/{ref.digest}/w.bin"
    note = f'{{"object": "{name}", "offset": 0, "length": {PART}}}\n{{"object": "cut o'
    (incoming / ".download.jsonl").write_text(note)
    same_files(directory, store.fetch(ref))


def test_a_killed_service_that_comes_back_has_the_rest_sent(
    mortal_s3: S3Service,
    revived_s3: Callable[[], S3Service],
    faulty: Callable[[str], FaultyProxy],
    tmp_path: Path,
) -> None:
    proxy = faulty(mortal_s3.endpoint)
    store = open_at(mortal_s3, proxy.endpoint, tmp_path / "one")
    directory = work(store)
    proxy.sent, proxy.bytes_per_second = 0, 40 * MIB
    found: list[ArtifactRef] = []
    upload = threading.Thread(target=lambda: found.append(store.publish(directory)))
    upload.start()
    wait_until(lambda: proxy.sent > SIZE / 3)
    mortal_s3.kill()
    revived = revived_s3()
    proxy.upstream, proxy.bytes_per_second = revived.endpoint, None
    upload.join(60)
    (ref,) = found
    same_files(directory, open_at(revived, revived.endpoint, tmp_path / "two").fetch(ref))


def test_a_killed_service_that_comes_back_gives_the_rest(
    mortal_s3: S3Service,
    revived_s3: Callable[[], S3Service],
    faulty: Callable[[str], FaultyProxy],
    tmp_path: Path,
) -> None:
    first = open_at(mortal_s3, mortal_s3.endpoint, tmp_path / "one")
    directory = work(first)
    ref = first.publish(directory)
    proxy = faulty(mortal_s3.endpoint)
    store = open_at(mortal_s3, proxy.endpoint, tmp_path / "two")
    proxy.received, proxy.bytes_per_second = 0, 40 * MIB
    found: list[Path] = []
    download = threading.Thread(target=lambda: found.append(store.fetch(ref)))
    download.start()
    wait_until(lambda: proxy.received > SIZE / 3)
    mortal_s3.kill()
    revived = revived_s3()
    proxy.upstream, proxy.bytes_per_second = revived.endpoint, None
    download.join(60)
    (fetched,) = found
    assert proxy.received < SIZE + IN_FLIGHT
    same_files(directory, fetched)


def test_an_upload_that_the_service_forgot_begins_again(s3: S3Service, tmp_path: Path) -> None:
    store = open_at(s3, s3.endpoint, tmp_path / "one")
    directory = work(store, size=2 * PART + 1)
    manifest = read_manifest(directory)
    assert manifest is not None
    name = f"{tmp_path.name}/content/{manifest.digest}"
    lines = [f'{{"object": "{name}/w.bin", "upload": "0123456789"}}']
    lines += ['{"upload": "0123456789", "part": 1, "etag": "x"}']
    lines += [f'{{"object": "{name}/small-0.bin", "etag": "gone"}}']
    (directory / ".upload.jsonl").write_text("\n".join(lines) + "\n")
    ref = store.publish(directory)
    same_files(directory, open_at(s3, s3.endpoint, tmp_path / "two").fetch(ref))


@pytest.mark.parametrize("away_s", [1.5, pytest.param(30, marks=pytest.mark.slow)], ids=["short", "30-s"])
def test_a_service_that_answers_503_for_a_while(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path, away_s: float
) -> None:
    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one", TransferLimits(part_bytes=PART, parallel=2))
    directory = work(store)
    proxy.bytes_per_second = 40 * MIB
    wait = partial(time.sleep, away_s)
    proxy.sent = 0
    when(lambda: proxy.sent > SIZE / 3, partial(proxy.answer, 503, "SlowDown"), wait, proxy.pass_on)
    ref = store.publish(directory)
    assert SIZE < proxy.sent < SIZE + IN_FLIGHT
    other = open_at(s3, proxy.endpoint, tmp_path / "two", TransferLimits(part_bytes=PART, parallel=2))
    proxy.received = 0
    when(lambda: proxy.received > SIZE / 3, partial(proxy.answer, 503, "SlowDown"), wait, proxy.pass_on)
    same_files(directory, other.fetch(ref))


def test_a_service_that_stays_away_ends_the_transfer_and_the_next_try_goes_on(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one", TransferLimits(part_bytes=PART, parallel=2, patience_s=1))
    directory = work(store)
    proxy.bytes_per_second = 40 * MIB
    when(lambda: proxy.sent > SIZE / 2, partial(proxy.answer, 503, "ServiceUnavailable"))
    with pytest.raises(InfrastructureError, match="S3") as caught:
        store.publish(directory)
    assert caught.value.exit_code == 75
    proxy.pass_on()
    proxy.bytes_per_second = None
    store.publish(directory)
    assert proxy.sent < SIZE + IN_FLIGHT


def test_a_slow_service_is_waited_for_and_progress_is_told(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []

    class Told:
        def progress(self, phase: str, done: int, total: int, metrics: object = None) -> None:
            told.append((phase, done, total))

        def notice(self, text: str) -> None:
            pytest.fail(text)

    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one")
    directory = work(store, size=6 * MIB)
    proxy.bytes_per_second = 2 * MIB
    ref = store.publish(directory, Told())
    assert told
    assert {(phase, total) for phase, _, total in told} == {("upload", 6)}
    told.clear()
    open_at(s3, proxy.endpoint, tmp_path / "two").fetch(ref, Told())
    assert {(phase, total) for phase, _, total in told} == {("download", 6)}


def test_an_identity_that_expires_in_the_middle_is_named(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one")
    directory = work(store, size=4 * MIB)
    when(lambda: proxy.sent > MIB, partial(proxy.answer, 400, "ExpiredToken"))
    proxy.bytes_per_second = 2 * MIB
    with pytest.raises(ConfigError, match="ExpiredToken") as caught:
        store.publish(directory)
    assert "NVILA_S3_ACCESS_KEY" in str(caught.value.hint)
    proxy.pass_on()
    proxy.bytes_per_second = None
    same_files(directory, open_at(s3, s3.endpoint, tmp_path / "two").fetch(store.publish(directory)))


def test_a_full_service_is_no_reason_to_try_again(
    s3: S3Service, faulty: Callable[[str], FaultyProxy], tmp_path: Path
) -> None:
    proxy = faulty(s3.endpoint)
    store = open_at(s3, proxy.endpoint, tmp_path / "one")
    directory = work(store, size=4 * MIB)
    when(lambda: proxy.sent > MIB, partial(proxy.answer, 507, "XMinioStorageFull"))
    proxy.bytes_per_second = 2 * MIB
    with pytest.raises(ResourceError, match="no space left") as caught:
        store.publish(directory)
    assert caught.value.exit_code == 1
    assert open_at(s3, s3.endpoint, tmp_path / "two").lookup("train", KEY) is None
