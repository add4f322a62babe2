"""Pin the images that others publish by digest: bases of docker/, and what charts/nvila-platform runs.

A tag may name other bytes tomorrow, a digest never does. The registry is asked for the digest behind each tag (OCI
distribution API, without a login) and what is written down is renewed: `ARG BASE_IMAGE=NAME:TAG@sha256:...` in the
Dockerfiles, `--build-arg BASE_IMAGE=...` in their comments, and the chart's files/image-digests.yaml, which the
templates use as long as repository and tag are the chart's own. `make release` refuses a tree in which one is missing.

Usage:
    python scripts/pin_images.py             # ask the registries, rewrite what differs
    python scripts/pin_images.py --check     # ask nobody; fail when something is not pinned
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = Path("charts") / "nvila-platform"
DIGESTS = CHART / "files" / "image-digests.yaml"
HEADER = """\
# Digests of the images of others that this chart runs by default, written by scripts/pin_images.py (make pin-images).
# A mirror keeps them; a repository or tag of your own is used as it is, pin it with `digest`.
# Of {date}, as the registries say.
"""
_ARG = re.compile(
    r"^((?:ARG |#.*--build-arg )\w*IMAGE=)([a-z0-9][^\s@$]*:[^\s@$]+)(@sha256:[0-9a-f]{64})?(?=\s|$)", re.MULTILINE
)
# Above it stands since when, and who says so.
_SINCE = re.compile(r"^# Of \d{4}-\d\d-\d\d, .*$", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_TIMEOUT_S = 30
# Its API is at another host.
_DOCKER_HUB = "docker.io"


class PinError(Exception):
    """A reason that fits on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A reference taken apart as Docker does it."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, reference: str) -> Image:
        """Take `NAME:TAG` apart; the name has a registry where its first part looks like a host."""
        name, _, tag = reference.rpartition(":")
        host, slash, rest = name.partition("/")
        if slash and host != _DOCKER_HUB and ("." in host or ":" in host or host == "localhost"):
            return cls(registry=host, repository=rest, tag=tag)
        name = name.removeprefix(f"{_DOCKER_HUB}/")
        return cls(registry="registry-1.docker.io", repository=name if "/" in name else f"library/{name}", tag=tag)

    @property
    def url(self) -> str:
        """Where the manifest is."""
        scheme = "http" if self.registry.partition(":")[0] in ("localhost", "127.0.0.1") else "https"
        return f"{scheme}://{self.registry}/v2/{self.repository}/manifests/{self.tag}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Pin the images of others by digest.")
    parser.add_argument("--check", action="store_true", help="ask no registry; fail when something is not pinned")
    args = parser.parse_args(argv)
    try:
        if args.check:
            missing = unpinned(root)
            for where in missing:
                print(f"{where} is not pinned; run: make pin-images")
            return 1 if missing else 0
        for line in pin(root):
            print(line)
    except (PinError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def unpinned(root: Path) -> list[str]:
    """Return `FILE: IMAGE` for everything without a digest."""
    found = [
        f"{path.relative_to(root)}: {image[2]}" for path in _dockerfiles(root) for image in _bases(path) if not image[3]
    ]
    known = _known(root)
    return found + [f"{CHART / 'values.yaml'}: {name}" for name in chart_images(root) if name not in known]


def pin(root: Path) -> list[str]:
    """Ask for every digest, then write them all; returns what changed.

    Raises:
        PinError: A registry did not say; nothing was written.
    """
    dockerfiles = {path: path.read_text(encoding="utf-8") for path in _dockerfiles(root)}
    references = {match[2] for text in dockerfiles.values() for match in _ARG.finditer(text)}
    images = chart_images(root)
    digests = {reference: digest_of(Image.parse(reference)) for reference in sorted({*references, *images})}
    changed = []
    for path, text in dockerfiles.items():
        new = _ARG.sub(lambda match: f"{match[1]}{match[2]}@{digests[match[2]]}", text)
        if new != text:
            new = _SINCE.sub(f"# Of {date.today()}, as its registry says; renewed by make pin-images.", new)
            path.write_text(new, encoding="utf-8")
            changed.append(f"{path.relative_to(root)}: pinned")
    wanted = {name: digests[name] for name in images}
    if wanted != _known(root):
        (root / DIGESTS).write_text(
            HEADER.format(date=date.today()) + yaml.safe_dump(wanted, width=200), encoding="utf-8"
        )
        changed.append(f"{DIGESTS}: pinned")
    return changed


def digest_of(image: Image) -> str:
    """Ask a registry for the digest behind a tag: that of the index where there are several platforms.

    Raises:
        PinError: It did not say.
    """
    headers = {"Accept": _ACCEPT}
    try:
        try:
            return _ask(image, headers)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 401:
                raise
            token = _token(error.headers.get("WWW-Authenticate", ""))
            return _ask(image, headers | {"Authorization": f"Bearer {token}"})
    except urllib.error.HTTPError as error:
        error.close()
        raise PinError(f"{image.url}: {error.code} {error.reason}") from error
    except (OSError, ValueError, KeyError) as error:
        raise PinError(f"{image.url}: {error}") from error


def _ask(image: Image, headers: dict[str, str]) -> str:
    request = urllib.request.Request(image.url, headers=headers, method="HEAD")  # noqa: S310 - https, or this machine
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
        digest = answer.headers.get("Docker-Content-Digest", "")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"no digest in the answer but {digest!r}")
    return str(digest)


def _token(challenge: str) -> str:
    """Fetch the token that anybody gets, from where the registry says."""
    said = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urllib.parse.urlencode({key: said[key] for key in ("service", "scope") if key in said})
    with urllib.request.urlopen(f"{said['realm']}?{query}", timeout=_TIMEOUT_S) as answer:  # noqa: S310
        body = json.load(answer)
    return str(body.get("token") or body["access_token"])


def _dockerfiles(root: Path) -> list[Path]:
    return sorted((root / "docker").glob("*.Dockerfile"))


def _bases(path: Path) -> Iterator[re.Match[str]]:
    return _ARG.finditer(path.read_text(encoding="utf-8"))


def chart_images(root: Path) -> list[str]:
    """Return the images of others in the chart's values; its own have the version of the release."""
    return sorted(set(_images_in(yaml.safe_load((root / CHART / "values.yaml").read_text(encoding="utf-8")))))


def _images_in(values: object) -> Iterator[str]:
    if not isinstance(values, dict):
        return
    if values.get("repository") and values.get("tag"):
        yield "/".join(part for part in (values.get("registry"), f"{values['repository']}:{values['tag']}") if part)
    for value in values.values():
        yield from _images_in(value)


def _known(root: Path) -> dict[str, str]:
    path = root / DIGESTS
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
