"""Buildah without a daemon and without a registry: a storage of its own with a Debian that stands for the base image.

`tests/charts/test_image_builds.py` and `benchmarks/platform/image_builds.py` build the images of docker/ with it where
no registry of images can be reached. Needs root, buildah, debootstrap and Debian's archive.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from images import Builder
from release import ReleaseError

# Stands for what the Dockerfiles pin: the same Debian and the same minor version of Python.
BASE = "docker.io/library/python:3.11-slim"
PROGRAMS = ("buildah", "debootstrap")
ARCHIVE = "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


class NoArchiveError(ReleaseError):
    """No Debian could be made: its archive is out of reach, most likely."""


def missing() -> str:
    """Return what keeps this machine from it, or nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{' and '.join(absent)}: apt-get install {' '.join(PROGRAMS)}"
    return "" if os.geteuid() == 0 else "root"


def open_store(folder: Path) -> Builder:
    """Open or make the storage in a folder; images in it stay.

    Raises:
        NoArchiveError: No Debian could be made for it.
        ReleaseError: Buildah failed.
    """
    places = ("--root", f"{folder}/store", "--runroot", f"{folder}/run")
    storage = (*places, "--storage-driver", driver(places))
    # Packages that this machine keeps on its disk are seen by the builds too.
    kept = [path for path in _pip_folders() if path.is_dir()]
    volumes = [part for path in kept for part in ("--volume", f"{path}:{path}:ro")]
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    if buildah(storage, "images", "--quiet", "--filter", f"reference={BASE}") == "":
        _make_base(folder, storage, kept)
    options = ("--pull-never", "--network", "host", *volumes)
    return Builder(engine="buildah", options=storage, build_options=options)


def buildah(options: tuple[str, ...], *arguments: str) -> str:
    """Run buildah and return what it says.

    Raises:
        ReleaseError: It failed.
    """
    done = subprocess.run(["buildah", *options, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"buildah {arguments[0]}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def driver(places: tuple[str, ...]) -> str:
    """Return how a storage keeps its layers: overlaid where the kernel does that, otherwise each as a whole copy."""
    overlay = ("--storage-driver", "overlay")
    try:
        container = buildah((*places, *overlay), "from", "scratch")
        try:
            buildah((*places, *overlay), "mount", container)
        finally:
            buildah((*places, *overlay), "rm", container)
    except ReleaseError:
        return "vfs"
    return "overlay"


def _pip_folders() -> list[Path]:
    """Return the folders that this machine's pip looks into besides the index."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    words = said.stdout.replace("'", " ").replace("file://", "").split()
    found = [Path(word) for word in words if word.startswith("/") and "ssl" not in word and Path(word).is_dir()]
    return [path.parent if path.name == "simple" else path for path in dict.fromkeys(found)]


def _make_base(folder: Path, storage: tuple[str, ...], kept: list[Path]) -> None:
    root = folder / "rootfs"
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root), ARCHIVE]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise NoArchiveError(
            f"no Debian could be made: {(made.stdout.strip().splitlines() or ['no reason given'])[-1]}"
        )
    shutil.rmtree(root / "var" / "cache" / "apt" / "archives", ignore_errors=True)
    (root / "usr" / "local" / "bin" / "python").symlink_to("/usr/bin/python3")
    if CERTIFICATES.is_file():
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    pages = [f"file://{path}/simple" for path in kept if (path / "simple").is_dir()]
    links = [str(path) for path in kept if not (path / "simple").is_dir()]
    (root / "etc" / "pip.conf").write_text(
        f"[global]\ncert = {CERTIFICATES}\nfind-links = {' '.join(links)}\nextra-index-url = {' '.join(pages)}\n"
    )
    container = buildah(storage, "from", "scratch")
    buildah(storage, "add", "--quiet", container, str(root), "/")
    buildah(storage, "config", "--env", f"PATH={PATH}", "--env", f"SSL_CERT_FILE={CERTIFICATES}", container)
    buildah(storage, "commit", "--quiet", container, BASE)
    buildah(storage, "rm", container)
    shutil.rmtree(root)
