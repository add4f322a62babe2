"""Runs `nvila curate` several times, each in a fork of one prepared process, and kills some of them.

Everything that a curation leaves appears under its name by a rename, so the moment before a rename is a point at which
all of a file is written and none of it counts. A job is killed with SIGKILL at such a moment, or right after it.

Started with a JSON list of jobs, {"words": [...], "out": DIR, "kill_at": "before NAME", "after NAME" or null}; prints a
JSON list of
{"status": exit code or minus the signal, "published": names in the order in which they appeared}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the jobs in order."""
    _prepare()
    print(json.dumps([_run(job) for job in json.loads(sys.argv[1])]))


def _prepare() -> None:
    """Import what takes long, so that the forks need not; nothing here starts a thread."""
    import duckdb
    import matplotlib.figure
    import sklearn.cluster
    import torch
    import transformers

    import nvila.curation.merging
    import nvila.curation.nvila_scorer
    import nvila_pipelines.cli.curate
    import nvila_pipelines.curation.dataset_run
    import nvila_pipelines.report.curation_report

    assert all((duckdb, matplotlib.figure, sklearn.cluster, torch, transformers, nvila, nvila_pipelines))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    log = Path(job["out"]).with_suffix(".published")
    log.unlink(missing_ok=True)
    log.touch()
    child = os.fork()
    if child == 0:
        _watch_renames(Path(job["out"]), job["kill_at"], log)
        os._exit(_curate(job["words"]))
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "published": log.read_text(encoding="utf-8").splitlines()}


def _curate(words: list[str]) -> int:
    from nvila_pipelines.cli import main
    from nvila_pipelines.curation import finishing

    # Tracking has tests of its own; starting MLflow would take longer than all of this.
    finishing.track = lambda *args, **options: None
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        return main(["curate", *words])


def _watch_renames(out: Path, kill_at: str | None, log: Path) -> None:
    rename = os.replace

    def replace(source: Any, target: Any, **options: Any) -> None:
        if not Path(target).is_relative_to(out):
            rename(source, target, **options)
            return
        name = str(Path(target).relative_to(out))
        if kill_at == f"before {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)
        with log.open("a", encoding="utf-8") as lines:
            lines.write(f"{name}\n")
        if kill_at == f"after {name}":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


if __name__ == "__main__":
    main()
