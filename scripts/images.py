"""Build the images of docker/ with Docker, Podman or Buildah, all of one version.

The base image is the one that the Dockerfiles pin by digest; one of your own (`--base`) is resolved to its digest
first, so that two builds start from the same bytes. It stands in the label `org.opencontainers.image.base.name`.

Usage:
    python scripts/images.py                        # all images, with what is here
    python scripts/images.py serve --cpu            # one image, with a torch that has no CUDA: a fifth of the size
    python scripts/images.py --registry ghcr.io/me --push
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from release import ROOT, ReleaseError, checked_version, commit_of

IMAGES = ("mlflow", "pipelines", "serve", "train")
ENGINES = ("docker", "podman", "buildah")
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

    def push(self, tag: str) -> None:
        """Send an image to its registry."""
        if subprocess.run([self.engine, *self.options, "push", tag], check=False).returncode:
            raise ReleaseError(f"{self.engine} could not push {tag}; log in first: {self.engine} login")

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
    parser.add_argument("--cpu", action="store_true", help="take a torch without CUDA")
    parser.add_argument("--push", action="store_true", help="send them to the registry")
    args = parser.parse_args(argv)
    try:
        builder = Builder(engine=args.engine or first_engine())
        for name in args.images or IMAGES:
            if name not in IMAGES:
                raise ReleaseError(f"{name}: there is no such image; there are {', '.join(IMAGES)}")
            began = time.monotonic()
            base = builder.pinned(args.base) if args.base else ""
            tag = build(builder, name, registry=args.registry, base=base, cpu=args.cpu)
            print(f"built {tag} in {time.monotonic() - began:.0f} s", flush=True)
            if args.push:
                builder.push(tag)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build(builder: Builder, name: str, *, registry: str, base: str, cpu: bool) -> str:
    """Build one image, on the base that its Dockerfile names or on another; returns its tag."""
    version = checked_version(ROOT)
    arguments = {"VERSION": version, "REVISION": commit_of(ROOT), **({"BASE_IMAGE": base} if base else {})}
    if cpu and name != "mlflow":
        arguments["PIP_EXTRA_INDEX_URL"] = CPU_INDEX
    tag = f"{registry}/{name}:{version}"
    builder.build(name, tag, arguments)
    return tag


def first_engine() -> str:
    """Return the first engine that is installed."""
    for engine in ENGINES:
        if shutil.which(engine):
            return engine
    raise ReleaseError(f"none of {', '.join(ENGINES)} is here; install one, such as: apt-get install buildah")


if __name__ == "__main__":
    sys.exit(main())
