"""Build everything that a release consists of into `dist/`: wheel, constraints, charts, compiled pipelines, checksums.

Package, images and charts carry one version, that of `model/nvila/_version.py`; a tree in which they differ, or whose
CHANGELOG has no section for it, is refused before anything is built. The same commit gives the same wheel and the same
pipelines byte for byte: times inside are those of the commit.

Usage:
    python scripts/release.py            # a rehearsal: the version may still be under Unreleased, the tree uncommitted
    python scripts/release.py --final    # what is published: CHANGELOG dated, nothing uncommitted
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pin_images import unpinned
from upgrade_diff import RECORD

ROOT = Path(__file__).resolve().parent.parent
CHECKSUMS = "SHA256SUMS"
CONSTRAINTS = "constraints.txt"
# The one table of contents of a release; docs/install.md names the same files.
CHARTS = ("nvila", "nvila-observability", "nvila-platform", "nvila-serving")


class ReleaseError(Exception):
    """A reason that fits on one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Build a release into dist/.")
    parser.add_argument("--dest", type=Path, default=ROOT / "dist", help="folder to make anew (default: dist)")
    parser.add_argument("--final", action="store_true", help="refuse an undated CHANGELOG and uncommitted changes")
    args = parser.parse_args(argv)
    try:
        version = checked_version(ROOT, final=args.final)
        for path in build(ROOT, args.dest, version):
            print(f"{path.stat().st_size / 1024:9.0f} KiB  {path.relative_to(args.dest)}")
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"release {version} is in {args.dest}; check it anywhere with: sha256sum --check {CHECKSUMS}")
    return 0


# ---- What is checked first.


def checked_version(root: Path, *, final: bool = False) -> str:
    """Return the version that everything in the tree agrees on.

    Raises:
        ReleaseError: A chart or the CHANGELOG says otherwise, an image is not pinned, or the tree is not ready.
    """
    version = _found(root / "model" / "nvila" / "_version.py", r'^__version__ = "(.+)"$')
    for name in CHARTS:
        chart = root / "charts" / name / "Chart.yaml"
        for key, pattern in (("version", r"^version: (\S+)$"), ("appVersion", r'^appVersion: "(.+)"$')):
            said = _found(chart, pattern)
            if said != version:
                raise ReleaseError(
                    f"{chart.relative_to(root)}: {key} is {said}, the package is {version}; make them one"
                )
    for image in unpinned(root):
        raise ReleaseError(f"{image} is not pinned by digest; run: make pin-images")
    recorded = _found(root / RECORD, r'^ "version": "(.+)"$') if final else version
    if recorded != version:
        raise ReleaseError(f"{RECORD} is of {recorded}; check and renew it: python scripts/upgrade_diff.py --record")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    if not dated and (final or "\n## [Unreleased]\n" not in changelog):
        raise ReleaseError(f"CHANGELOG.md: no section `## [{version}] - YYYY-MM-DD`; date the one under Unreleased")
    changed = _git(root, "status", "--porcelain").splitlines() if final else []
    if changed:
        raise ReleaseError(f"{len(changed)} uncommitted changes, such as {changed[0][3:]}: commit or remove them")
    return version


def _found(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ReleaseError(f"{path.name}: nothing like {pattern}")
    return match[1]


# ---- What is built.


def build(root: Path, dest: Path, version: str) -> list[Path]:
    """Build into an empty folder beside `dest` and put it in its place whole.

    Returns:
        The files, the checksums last.

    Raises:
        ReleaseError: A builder failed; `dest` is as it was.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as scratch:
        made = Path(scratch) / dest.name
        made.mkdir()
        _wheel(root, made, version)
        # The set that the wheel was tested with, for whoever has no checkout.
        shutil.copyfile(root / CONSTRAINTS, made / CONSTRAINTS)
        _charts(root, made, version)
        _pipelines(root, made / "pipelines")
        _checksums(made)
        shutil.rmtree(dest, ignore_errors=True)
        made.rename(dest)
    return [*sorted(path for path in _files(dest) if path.name != CHECKSUMS), dest / CHECKSUMS]


def _wheel(root: Path, made: Path, version: str) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*command, "--wheel-dir", str(made), str(root)], cwd=made, epoch=commit_time(root))
    if not (made / f"nvila-{version}-py3-none-any.whl").is_file():
        raise ReleaseError(f"pip made {[path.name for path in made.iterdir()]} instead of the wheel of {version}")


def _charts(root: Path, made: Path, version: str) -> None:
    own = root / ".tools" / "bin" / "helm"
    helm = str(own) if own.is_file() else shutil.which("helm")
    if helm is None:
        raise ReleaseError("helm is not here; fetch it: python scripts/tools.py")
    for name in CHARTS:
        _run([helm, "package", str(root / "charts" / name), "--destination", str(made)], cwd=made)
        if not (made / f"{name}-{version}.tgz").is_file():
            raise ReleaseError(f"helm made no {name}-{version}.tgz")
        _settle(made / f"{name}-{version}.tgz", int(commit_time(root)))


def _settle(archive: Path, time: int) -> None:
    """Write an archive again with one time for all of its files, where helm writes now, and in one order.

    Helm takes the parts of a chart in the order of a map, which is another one each time. `Chart.yaml` stays in front:
    readers look for it there.
    """
    with tarfile.open(archive) as packed:
        members = [(member, packed.extractfile(member)) for member in packed.getmembers()]
        contents = [(member, file.read() if file else b"") for member, file in members]
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=time, fileobj=raw) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as packed,
    ):
        for member, content in sorted(contents, key=_place):
            member.mtime = time
            packed.addfile(member, io.BytesIO(content))


def _place(entry: tuple[tarfile.TarInfo, bytes]) -> tuple[bool, str]:
    name = entry[0].name
    return not name.endswith("/Chart.yaml"), name


def _pipelines(root: Path, made: Path) -> None:
    # In a process of its own: the graphs of this tree, whatever is installed in the environment.
    program = (
        "import sys; from pathlib import Path; from nvila_pipelines.compile import GRAPHS, compile_graph\n"
        "for name in GRAPHS: compile_graph(name, Path(sys.argv[1]) / f'{name}.yaml')"
    )
    paths = os.pathsep.join(str(root / source) for source in ("model", "platform", "pipelines"))
    _run([sys.executable, "-c", program, str(made)], cwd=made.parent, env={"PYTHONPATH": paths})


def _checksums(made: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(made).as_posix()}"
        for path in sorted(_files(made))
    ]
    (made / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="ascii")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def commit_time(root: Path) -> str:
    """Return the seconds of the last commit, which builders write instead of now."""
    return _git(root, "log", "-1", "--format=%ct").strip()


def commit_of(root: Path) -> str:
    """Return the commit that is built, marked when there is more in the tree."""
    return _git(root, "rev-parse", "HEAD").strip() + ("-dirty" if _git(root, "status", "--porcelain") else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}; build from a git checkout")
    return done.stdout


def _run(command: list[str], cwd: Path, epoch: str = "", env: dict[str, str] | None = None) -> None:
    more = {"SOURCE_DATE_EPOCH": epoch} if epoch else {}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **more, **(env or {})}
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise ReleaseError(f"{Path(command[0]).name} {command[1]}: {said[-1]}")


if __name__ == "__main__":
    sys.exit(main())
