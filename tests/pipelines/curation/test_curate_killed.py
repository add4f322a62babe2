"""Killed with SIGKILL around a file getting its name, and started again: nothing is scored twice, bytes are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")
Jobs = list[tuple[str, str | None]]
Drive = Callable[[Jobs], list[dict[str, Any]]]
# In the pass of the small model, between the models, in the pass of the large one, over images, and in each later step.
POINTS = [
    "after scoring.json",
    "before shards/small-00002.parquet",
    "before shards/scores-00000.parquet",
    "before shards/scores-00002.parquet",
    "before shards/features-00001.parquet",
    "before quarantine.jsonl",
    "before scores.parquet",
    "after scores.parquet",
    "before clusters.parquet",
    "before selection.parquet",
    "before ignore/vqa.json",
    "before plots/likelihoods.svg",
    "before report.html",
    "before manifest.json",
    "after manifest.json",
]


@pytest.fixture
def drive(models: dict[str, Path], llava: Any, tmp_path: Path) -> Drive:
    """Run jobs, of which each names its folder and where it is killed."""
    data = llava(22, {13: "{broken"})
    words = [str(data), "--small", str(models["small"]), "--large", str(models["large"]), "--method", "cluster"]
    words += ["--sequential", "--threads", "1", "--shard-size", "6", "--workspace", str(tmp_path / "workspace")]

    def run(jobs: Jobs) -> list[dict[str, Any]]:
        orders = [
            {"words": [*words, "--out", str(tmp_path / name)], "out": str(tmp_path / name), "kill_at": point}
            for name, point in jobs
        ]
        done = subprocess.run(
            [sys.executable, str(DRIVER), json.dumps(orders)], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def contents(out: Path) -> dict[str, bytes]:
    """Bytes of every output but the report and the manifest, which hold times."""
    names = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith((".", "manifest", "report"))}


def check(points: list[str], drive: Drive, tmp_path: Path) -> None:
    """Kill a run at each point, finish it, and compare it with one that was left in peace."""
    jobs: Jobs = [("peace", None)]
    for number, point in enumerate(points):
        jobs += [(f"killed-{number}", point), (f"killed-{number}", None)]
    peace, *results = drive(jobs)
    assert peace["status"] == 0
    for number, point in enumerate(points):
        killed, resumed = results[2 * number : 2 * number + 2]
        assert (killed["status"], resumed["status"]) == (-9, 0), point
        when, name = point.split()
        count = peace["published"].index(name) + (when == "after")
        assert killed["published"] == peace["published"][:count], point
        scored = {name for name in killed["published"] if name.startswith("shards/")}
        assert not scored & set(resumed["published"]), f"killed {point}, some of it is scored again"
        assert contents(tmp_path / f"killed-{number}") == contents(tmp_path / "peace"), point
        assert (tmp_path / f"killed-{number}" / "manifest.json").exists()


def test_a_killed_run_goes_on_where_it_was(drive: Drive, tmp_path: Path) -> None:
    check(["before shards/scores-00000.parquet", "after scores.parquet"], drive, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_does_not_matter_where_a_run_is_killed(drive: Drive, tmp_path: Path) -> None:
    check(POINTS, drive, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_again_and_again_comes_to_its_end(drive: Drive, tmp_path: Path) -> None:
    jobs: Jobs = [("peace", None), *(("killed", point) for point in POINTS), ("killed", None)]
    peace, *killed, last = drive(jobs)
    assert (peace["status"], [one["status"] for one in killed], last["status"]) == (0, [-9] * len(POINTS), 0)
    made = [name for one in killed for name in one["published"] if name.startswith("shards/")]
    assert sorted(made) == sorted(name for name in peace["published"] if name.startswith("shards/"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "peace")
