"""Builds images of docker/ without a daemon and measures them: sizes, packages, and a cold start in parts.

Of the serving image a container is started again and again, in turn with the same server out of this checkout's
environment: how long until the process answers at all (interpreter and imports), until the model is ready, until the
first answer is whole. The model is the tiny twin, so what is measured is the software, not the copying of weights.

The base is a Debian made on this machine (no registry of images is asked), the torch is the one that pip finds here.

python benchmarks/platform/image_builds.py                     # pipelines and serve, five starts
python benchmarks/platform/image_builds.py --quick             # pipelines alone, no starts
python benchmarks/platform/image_builds.py --store /var/tmp/images --images mlflow pipelines serve train
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import images
import local_engine
from bench_result import Claim, claim, write_result
from release import ReleaseError, checked_version

MIB = 1 << 20
PARTS = ("answers", "ready", "answered")
PEER = "environment"
REGISTRY = "localhost/nvila"
_LIMIT_S = 300
# Megabytes of the unpacked image that still count as light: no torch in it.
_LIGHT_MIB = 1500


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Build images without a daemon and measure them.")
    parser.add_argument("--store", type=Path, help="folder of the storage, kept (default: a temporary one)")
    parser.add_argument("--images", nargs="+", choices=images.IMAGES, default=["pipelines", "serve"], metavar="NAME")
    parser.add_argument("--built", action="store_true", help="take the images that the storage has, build none")
    parser.add_argument("--repeats", type=int, default=5, help="cold starts of each way (default: 5)")
    parser.add_argument("--quick", action="store_true", help="the light image alone, and no starts")
    args = parser.parse_args()
    if lacks := local_engine.missing():
        print(f"skipped: needs {lacks}")
        return 0
    names = ["pipelines"] if args.quick else args.images
    with tempfile.TemporaryDirectory(prefix="nvila-images-") as scratch:
        store = args.store or Path(scratch)
        store.mkdir(parents=True, exist_ok=True)
        try:
            builder = local_engine.open_store(store)
            details = {name: measure(builder, name, Path(scratch), built=args.built) for name in names}
            starts = cold_starts(builder, details["serve"]["tag"], args.repeats) if "serve" in details else {}
        except ReleaseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps({"images": details, "starts": starts}, indent=1))
    path = write_result("platform-images", claims(details, starts), {"images": details, "starts": starts})
    print(f"written: {path}")
    return 0


def measure(builder: images.Builder, name: str, scratch: Path, *, built: bool) -> dict[str, Any]:
    """Build one image, or take it; returns its tag, seconds, sizes in MiB and number of packages."""
    began = time.monotonic()
    if built:
        tag = f"{REGISTRY}/{name}:{checked_version(images.ROOT)}"
    else:
        tag = images.build(builder, name, registry=REGISTRY, base=local_engine.BASE, cpu=False)
    seconds = time.monotonic() - began
    folder = scratch / f"{name}-oci"
    # As a registry keeps it: gzipped layers.
    local_engine.buildah(builder.options, "push", "--quiet", "--format", "v2s2", tag, f"dir:{folder}")
    packed = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return {
        "tag": tag,
        "build_s": None if built else round(seconds, 1),
        "unpacked_mib": round(unpacked(builder, tag) / MIB, 1),
        "packed_mib": round(packed / MIB, 1),
        "packages": packages(builder, tag),
    }


def unpacked(builder: images.Builder, tag: str) -> int:
    """Return the bytes of an image's files."""
    return int(in_container(builder, tag, lambda root: _bytes(root)))


def _bytes(root: Path) -> int:
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _, files in os.walk(root):
        for name in files:
            found = os.lstat(os.path.join(folder, name))
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


def packages(builder: images.Builder, tag: str) -> int:
    """Return how many packages the list inside the image names."""

    def count(root: Path) -> int:
        (sbom,) = (root / "usr" / "share" / "sbom").glob("*.cdx.json")
        return len(json.loads(sbom.read_text(encoding="utf-8"))["components"])

    return int(in_container(builder, tag, count))


def in_container(builder: images.Builder, tag: str, look: Callable[[Path], int]) -> int:
    """Look at the files of an image."""
    name = local_engine.buildah(builder.options, "from", "--pull-never", tag)
    try:
        return look(Path(local_engine.buildah(builder.options, "mount", name)))
    finally:
        local_engine.buildah(builder.options, "rm", name)


def cold_starts(builder: images.Builder, tag: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Start the server in the image and out of the environment, in turn; returns seconds of each part."""
    config = json.loads(local_engine.buildah(builder.options, "inspect", "--type", "image", tag))["Docker"]["config"]
    found: dict[str, list[dict[str, float]]] = {"image": [], PEER: []}
    name = local_engine.buildah(builder.options, "from", "--pull-never", tag)
    with tempfile.TemporaryDirectory(prefix="nvila-model-") as folder:
        model = tiny_model(Path(folder))
        mount = ("--network", "host", "--volume", f"{model}:/mnt/models:ro")
        inside = ["buildah", *builder.options, "run", "--isolation", "chroot", *mount, name, "--"]
        serve = [*config["Entrypoint"], *config["Cmd"]]
        outside = [
            str(Path(sys.executable).with_name(serve[0])),
            *(str(model) if "/mnt/" in w else w for w in serve[1:]),
        ]
        try:
            for _ in range(repeats):
                found["image"].append(cold_start([*inside, *serve], folder))
                found[PEER].append(cold_start(outside, folder))
        finally:
            local_engine.buildah(builder.options, "rm", name)
    return found


def tiny_model(folder: Path) -> Path:
    """Save the tiny twin where the image's user can read it."""
    import torch

    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

    model = folder / "model"
    torch.manual_seed(0)
    NVILAForConditionalGeneration(NVILAConfig.from_preset("tiny-nvila-lite")).save_pretrained(model)
    NVILAProcessor.from_preset("tiny-nvila-lite").save_pretrained(model)
    for path in (folder, model, *model.iterdir()):
        path.chmod(0o755)
    return model


def cold_start(command: list[str], folder: str) -> dict[str, float]:
    """Start the server, ask it once, stop it; returns the seconds after the start at which each part was over."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    with (Path(folder) / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, start_new_session=True
        )
    try:
        seconds = {}
        for part, good in (("answers", (200, 503)), ("ready", (200,))):
            while _status(f"{base}/health") not in good:
                if server.poll() is not None or time.monotonic() - began > _LIMIT_S:
                    raise ReleaseError(f"the server did not start: {(Path(folder) / 'log').read_text()[-1000:]}")
                time.sleep(0.02)
            seconds[part] = time.monotonic() - began
        with urllib.request.urlopen(f"{base}/openai/v1/models", timeout=30) as answer:  # noqa: S310 - 127.0.0.1
            model = json.load(answer)["data"][0]["id"]
        body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "what is it?"}]}
        asked = urllib.request.Request(  # noqa: S310
            f"{base}/openai/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310
            answer.read()
        return seconds | {"answered": time.monotonic() - began}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - 127.0.0.1
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def claims(details: dict[str, dict[str, Any]], starts: dict[str, list[dict[str, float]]]) -> list[Claim]:
    """Turn what was measured into claims."""
    found = []
    stand_in = "on a Debian made here (debootstrap), with the torch that pip finds here"
    for name, image in details.items():
        goal, met = f"the list names packages; {name} builds", image["packages"] > 0
        if name == "pipelines":
            goal, met = f"light: under {_LIGHT_MIB} MiB", image["unpacked_mib"] < _LIGHT_MIB
        note = f"{image['packed_mib']} MiB gzipped, {image['packages']} Python packages; {stand_in}"
        found.append(claim(f"size-{name}", f"unpacked size of {name}, MiB", [image["unpacked_mib"]], goal, met, note))
    if not starts:
        return found
    before = dict(zip(PARTS, ("", *PARTS), strict=False))
    for part, what in zip(PARTS, ("process and imports", "loading the tiny model", "first answer"), strict=True):

        def took(one: dict[str, float], part: str = part) -> float:
            return one[part] - one.get(before[part], 0.0)

        ratios = [took(a) / took(b) for a, b in zip(starts["image"], starts[PEER], strict=True)]
        own = sorted(took(one) for one in starts["image"])
        note = f"in the image {own[len(own) // 2]:.2f} s ({own[0]:.2f} to {own[-1]:.2f})"
        label = f"cold start, {what}: in the image / out of the environment"
        met = sorted(ratios)[len(ratios) // 2] <= 1.5
        found.append(claim(f"cold-start-{part}", label, ratios, "at most 1.5 times the bare process", met, note))
    return found


if __name__ == "__main__":
    sys.exit(main())
