"""What the local lifecycle costs besides its work: starting processes, importing, handing over, tracking, reporting.

`nvila run` starts in an empty workspace. Of its wall time, what its steps say they took is their own work; the rest is
overhead, and so is the time that steps need to import torch, which is measured apart, in processes that do only that.
Then the same command runs again: all steps but the registration and the serving are found finished, so that what is
left is the orchestration alone.

python benchmarks/platform/orchestration.py                  # the quickstart, one run and three that reuse it
python benchmarks/platform/orchestration.py --recipe fast    # a shorter run, of which the same overhead is more
python benchmarks/platform/orchestration.py --quick          # the same, and one run that reuses it
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

SHARE, A_STEP_S = 0.15, 1.0
# Steps that every run does again.
AGAIN = ("register", "serve")
# What is imported to compute with a model. Tasks have it from the process that they are forked from, outside of their
# own time; two steps start a process that imports it within theirs. (Where there is a GPU, all that compute do so.)
IMPORTS = "import torch, transformers, nvila.assembly"
IMPORTERS = ("train", "serve")


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fast recipe, one run that reuses")
    parser.add_argument("--recipe", default="quickstart", help="what to run (default: quickstart)")
    parser.add_argument(
        "--workspace", type=Path, metavar="DIR", help="keep it, and go on where an earlier call stopped"
    )
    args = parser.parse_args()
    recipe, repeats = ("fast", 1) if args.quick else (args.recipe, 3)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch:
        workspace = Path(scratch) if args.workspace is None else args.workspace.absolute()
        imports = [timed([sys.executable, "-c", IMPORTS])[0] for _ in range(3)]
        bare = [timed([sys.executable, "-c", "pass"])[0] for _ in range(3)]
        first = first_run(recipe, workspace)
        again = [run(recipe, workspace) for _ in range(repeats)]
    importing = (median(imports) - median(bare)) * len(IMPORTERS)
    details = {"recipe": recipe, "first": first, "again": again, "imports_s": imports, "interpreter_s": bare}
    found = claims(recipe, first, again, importing)
    for one in found:
        print(f"{one.id:<22} {one.ratio:<10} ({one.low} to {one.high})  goal: {one.goal}")
    name = "platform-orchestration-quick" if args.quick else "platform-orchestration"
    print(f"written: {write_result(name, found, details)}")
    return 0


def first_run(recipe: str, workspace: Path) -> dict[str, Any]:
    """Run the lifecycle in an empty workspace, or return what an earlier call measured of it."""
    kept = workspace / "first-run.json"
    if not kept.is_file():
        found = run(recipe, workspace)
        kept.write_text(json.dumps(found), encoding="utf-8")
    first: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return first


def run(recipe: str, workspace: Path) -> dict[str, Any]:
    """Run the lifecycle; return wall time and the time of each step, 0 for a reused one."""
    command = [str(Path(sys.executable).with_name("nvila")), "run", recipe, "--workspace", str(workspace), "--json"]
    before = processor_seconds()
    wall, said = timed(command)
    used = processor_seconds() - before
    summary = json.loads(said.strip().splitlines()[-1])
    steps = sum(summary["steps"].values())
    print(f"{wall:.1f} s, of which steps {steps:.1f} s; {used:.1f} s of processor time", flush=True)
    return {"wall_s": round(wall, 2), "cpu_s": round(used, 2), "steps_s": summary["steps"]}


def processor_seconds() -> float:
    """Return what all processes that were started and have ended took, with theirs in turn."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str]) -> tuple[float, str]:
    """Return how long a command takes, in seconds, and what it says."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    if done.returncode not in (0, 1):  # a gate that refuses is a whole run
        raise SystemExit(f"{command[0]} ended with {done.returncode}")
    return time.perf_counter() - started, done.stdout


def claims(recipe: str, first: dict[str, Any], again: list[dict[str, Any]], importing: float) -> list[Claim]:
    """Turn runs into claims."""
    overhead = first["wall_s"] - sum(first["steps_s"].values())
    tasks = len(first["steps_s"])
    alone = [(one["wall_s"] - sum(one["steps_s"].get(step, 0.0) for step in AGAIN)) / tasks for one in again]
    share = (overhead + importing) / first["wall_s"]
    return [
        claim(
            "orchestration-share", f"overhead of `nvila run {recipe}` over its wall time, imports included", [share],
            f"at most {SHARE}", share <= SHARE,
            f"{overhead:.1f} s outside of steps, {importing:.1f} s of imports in them, of {first['wall_s']:.1f} s",
        ),
        claim(
            "orchestration-a-step", "seconds of a run that reuses everything, a step", alone,
            f"under {A_STEP_S:.0f}", median(alone) < A_STEP_S,
            f"{tasks} steps, of which registration and serving, which every run does again, are taken off; "
            f"{median(one['cpu_s'] for one in again) / tasks:.1f} s of processor time a step, registration included",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
