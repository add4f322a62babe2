"""Build the images of docker/ with Docker, Podman or Buildah, all of one version.

The base image is the one that the Dockerfiles pin by digest; one of your own (`--base`) is resolved to its digest
first, so that two builds start from the same bytes. It stands in the label `org.opencontainers.image.base.name`.
Images with torch have a tag for each kind of it: VERSION with CUDA, VERSION-cpu without, VERSION-te with Transformer
Engine, so that none takes the place of another in a registry.

Usage:
    python scripts/images.py                        # all images, with what is here
    python scripts/images.py serve --cpu            # one image, with a torch that has no CUDA: a fifth of the size
    python scripts/images.py train --transformer-engine   # compiled on CUDA's images; an hour, and many gigabytes
    python scripts/images.py --registry ghcr.io/me --push --digests digests.yaml
                                                    # and values for `helm -f` that name what was pushed by digest
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from release import ROOT, ReleaseError, checked_version, commit_of

IMAGES = ("mlflow", "pipelines", "serve", "train")
ENGINES = ("docker", "podman", "buildah")
# Those whose torch there is with and without CUDA.
TORCH_IMAGES = ("serve", "train")
TRANSFORMER_ENGINE = "transformer-engine[pytorch]==2.20.2"
# Where charts/nvila names the digest of an image; that of `train` stands in the profile of pipelines.
DIGEST_VALUES = {
    "pipelines": ("nvila-platform", "image"),
    "mlflow": ("nvila-platform", "mlflow", "image"),
    "serve": ("nvila-serving", "image"),
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """A program that builds images.

    Args:
        engine: One of `ENGINES`.
        options: Put before its verb, such as the place of its storage.
        build_options: Put after `build`, such as more volumes.
    """

    engine: str
    options: tuple[str, ...] = ()
    build_options: tuple[str, ...] = ()

    def build(self, image: str, tag: str, arguments: dict[str, str]) -> None:
        """Build one image of docker/ and tag it.

        Raises:
            ReleaseError: It failed; its output has the reason.
        """
        command = [self.engine, *self.options, "build", *self.build_options]
        if self.engine != "docker":
            # The OCI format has no HEALTHCHECK.
            command += ["--format", "docker"]
        for key, value in arguments.items():
            command += ["--build-arg", f"{key}={value}"]
        command += ["--file", str(ROOT / "docker" / f"{image}.Dockerfile"), "--tag", tag, str(ROOT)]
        if subprocess.run(command, check=False).returncode:
            raise ReleaseError(f"{self.engine} could not build {tag}; the reason stands above")

    def push(self, tag: str) -> str:
        """Send an image to its registry; returns the digest that it has there.

        Raises:
            ReleaseError: It was not taken, or nobody says under which digest.
        """
        with tempfile.TemporaryDirectory(prefix="nvila-push-") as folder:
            file = Path(folder) / "digest"
            # Docker keeps the digest with the image instead.
            more = [] if self.engine == "docker" else ["--digestfile", str(file)]
            if subprocess.run([self.engine, *self.options, "push", *more, tag], check=False).returncode:
                raise ReleaseError(f"{self.engine} could not push {tag}; log in first: {self.engine} login")
            found = file.read_text(encoding="utf-8").strip() if file.is_file() else self._kept_digest(tag)
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
            raise ReleaseError(f"{self.engine} pushed {tag} and does not say under which digest")
        return found

    def _kept_digest(self, tag: str) -> str:
        verb = [self.engine, *self.options, "inspect", "--type", "image", tag]
        done = subprocess.run(verb, capture_output=True, text=True, check=False)
        digests = (json.loads(done.stdout)[0].get("RepoDigests") or []) if done.returncode == 0 else []
        # One for each registry that it was pushed to.
        name = tag.rpartition(":")[0]
        return next((one.rpartition("@")[2] for one in digests if one.rpartition("@")[0] == name), "")

    def pinned(self, image: str) -> str:
        """Return an image with its digest; an image that only exists here has none and stays as it is."""
        verb = [self.engine, *self.options]
        if self.engine != "buildah":
            subprocess.run([*verb, "pull", "--quiet", image], check=False, capture_output=True)
        done = subprocess.run([*verb, "inspect", "--type", "image", image], capture_output=True, text=True, check=False)
        if done.returncode:
            return image
        found = json.loads(done.stdout)
        digests = (found[0] if isinstance(found, list) else found).get("RepoDigests") or []
        return f"{image}@{digests[0].rpartition('@')[2]}" if digests else image


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Build the images of docker/.")
    parser.add_argument("images", nargs="*", help=f"which ones (default: {' '.join(IMAGES)})")
    parser.add_argument("--engine", choices=ENGINES, help="program that builds (default: the first that is here)")
    parser.add_argument("--registry", default="nvila", help="put before the names (default: nvila)")
    parser.add_argument("--base", default="", help="image to build on (default: the one that the Dockerfiles pin)")
    parser.add_argument("--cpu", action="store_true", help="take a torch without CUDA: tag VERSION-cpu")
    parser.add_argument(
        "--transformer-engine", action="store_true", help="train with Transformer Engine, on CUDA: tag VERSION-te"
    )
    parser.add_argument("--push", action="store_true", help="send them to the registry")
    parser.add_argument(
        "--digests", type=Path, metavar="FILE", help="write values of charts/nvila that pin what is pushed"
    )
    args = parser.parse_args(argv)
    pushed: dict[str, tuple[str, str]] = {}
    try:
        check(args)
        builder = Builder(engine=args.engine or first_engine())
        for name in args.images or IMAGES:
            if name not in IMAGES:
                raise ReleaseError(f"{name}: there is no such image; there are {', '.join(IMAGES)}")
            began = time.monotonic()
            base = builder.pinned(args.base) if args.base else ""
            engine = args.transformer_engine and name == "train"
            tag = build(builder, name, registry=args.registry, base=base, cpu=args.cpu, transformer_engine=engine)
            print(f"built {tag} in {time.monotonic() - began:.0f} s", flush=True)
            if args.push:
                pushed[name] = (tag, builder.push(tag))
        if args.digests is not None:
            args.digests.write_text(digest_values(pushed), encoding="utf-8")
            print(f"digests are in {args.digests}")
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ReleaseError: They do.
    """
    if args.digests is not None and not args.push:
        raise ReleaseError("--digests are those of a registry: add --push")
    if not args.transformer_engine:
        return
    if args.cpu:
        raise ReleaseError("--transformer-engine needs CUDA, which --cpu leaves out: take one of them")
    if args.base:
        raise ReleaseError("--transformer-engine stands on CUDA's images: leave --base out")
    if args.images and "train" not in args.images:
        raise ReleaseError("--transformer-engine is of the image train, which is not among those named")


def build(builder: Builder, name: str, *, registry: str, base: str, cpu: bool, transformer_engine: bool = False) -> str:
    """Build one image, on the base that its Dockerfile names or on another; returns its tag."""
    arguments = {"VERSION": checked_version(ROOT), "REVISION": commit_of(ROOT)}
    if base:
        arguments["BASE_IMAGE"] = base
    if cpu and name in TORCH_IMAGES:
        arguments["PIP_EXTRA_INDEX_URL"] = CPU_INDEX
    if transformer_engine:
        arguments |= transformer_engine_arguments()
    tag = tag_of(name, registry=registry, cpu=cpu, transformer_engine=transformer_engine)
    builder.build(name, tag, arguments)
    return tag


def tag_of(name: str, *, registry: str, cpu: bool, transformer_engine: bool = False) -> str:
    """Return the tag of an image; another torch is another tag."""
    suffix = "-te" if transformer_engine else "-cpu" if cpu and name in TORCH_IMAGES else ""
    return f"{registry}/{name}:{checked_version(ROOT)}{suffix}"


def transformer_engine_arguments() -> dict[str, str]:
    """Return the build arguments of Transformer Engine, on the images that the Dockerfile pins for it.

    Raises:
        ReleaseError: The Dockerfile names none.
    """
    text = (ROOT / "docker" / "train.Dockerfile").read_text(encoding="utf-8")
    found = dict(re.findall(r"^ARG CUDA_(BUILD|BASE)_IMAGE=(\S+)$", text, re.MULTILINE))
    if found.keys() != {"BUILD", "BASE"}:
        raise ReleaseError("docker/train.Dockerfile names no ARG CUDA_BUILD_IMAGE and CUDA_BASE_IMAGE")
    images = {f"{kind}_IMAGE": image for kind, image in found.items()}
    return {**images, "TRANSFORMER_ENGINE": TRANSFORMER_ENGINE}


def digest_values(pushed: dict[str, tuple[str, str]]) -> str:
    """Return values of charts/nvila, as YAML, that name pushed images by digest."""
    values: dict[str, Any] = {}
    lines = [
        "# Written by scripts/images.py: what was pushed, by digest. Give it to helm behind the other files: -f FILE"
    ]
    for name, (tag, digest) in pushed.items():
        lines.append(f"# {tag}")
        if name not in DIGEST_VALUES:
            lines.append(f"#   in the profile of pipelines: image: {tag.rpartition(':')[0]}@{digest}")
            continue
        place = values
        for key in DIGEST_VALUES[name]:
            place = place.setdefault(key, {})
        place["digest"] = digest
        if name in TORCH_IMAGES:
            # The digest says which torch it is.
            place["variant"] = ""
    return "\n".join([*lines, json.dumps(values, indent=2) if values else "{}"]) + "\n"


def first_engine() -> str:
    """Return the first engine that is installed."""
    for engine in ENGINES:
        if shutil.which(engine):
            return engine
    raise ReleaseError(f"none of {', '.join(ENGINES)} is here; install one, such as: apt-get install buildah")


if __name__ == "__main__":
    sys.exit(main())
