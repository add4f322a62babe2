"""Times `nvila run` from an empty workspace, step by step, over several seeds, with accuracy and peak memory.

python benchmarks/quickstart/lifecycle.py            # the default recipe, seeds 0, 1, 2
python benchmarks/quickstart/lifecycle.py --quick    # the fast recipe, one seed
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

_SAMPLE_S = 0.25
_MINUTES_5 = 300.0
_GIB_4 = 4.0


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fast recipe, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    recipe, seeds = ("fast", args.seeds[:1]) if args.quick else ("quickstart", args.seeds)
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        run = run_once(recipe, seed)
        runs.append(run)
        print(
            f"seed {seed}: {run['seconds']:.0f} s, wide {run['accuracy']['wide']:.4f}, "
            f"quantized {run['accuracy']['quantized']:.4f}, peak {run['peak_gib']:.2f} GiB",
            flush=True,
        )
        # After every run, so that an interrupted benchmark leaves what it measured.
        name = "quickstart-fast" if args.quick else "quickstart-lifecycle"
        path = write_result(name, claims(runs, args.quick), {"runs": runs})
    print(f"written: {path}")
    return 0


def run_once(recipe: str, seed: int) -> dict[str, Any]:
    """Run the lifecycle in a new workspace and measure the whole process tree."""
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as workspace:
        command = [str(Path(sys.executable).with_name("nvila")), "run", recipe, f"seed={seed}", "--json"]
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, "--workspace", workspace], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        memory = _Memory(process.pid)
        output, _ = process.communicate()
        seconds = time.monotonic() - started
        peak = memory.stop()
    if not output.strip():
        raise SystemExit(f"nvila run {recipe} seed={seed} failed with exit code {process.returncode}")
    summary = json.loads(output.strip().splitlines()[-1])
    return {
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": summary["steps"],
        "accuracy": summary["accuracy"],
        "served": summary["served"],
        "sizes": summary["sizes"],
        "peak_gib": round(peak / 2**30, 2),
    }


def claims(runs: list[dict[str, Any]], quick: bool) -> list[Claim]:
    """Turn runs into claims."""
    seconds = [run["seconds"] for run in runs]
    wide = [run["accuracy"]["wide"] for run in runs]
    loss = [run["accuracy"]["wide"] - run["accuracy"]["quantized"] for run in runs]
    peaks = [run["peak_gib"] for run in runs]
    time_limit = 90.0 if quick else _MINUTES_5
    found = [
        claim(
            "seconds",
            "wall seconds of nvila run",
            seconds,
            f"at most {time_limit:.0f}",
            max(seconds) <= time_limit,
            f"median seconds by step: {step_times(runs)}",
        ),
        claim("quantized-loss", "accuracy lost by quantization", loss, "at most 0.01", max(loss) <= 0.01),
        claim("peak-memory", "peak memory of all processes, GiB", peaks, f"below {_GIB_4:.0f}", max(peaks) < _GIB_4),
    ]
    if quick:
        return [*found, claim("accuracy", "accuracy on 9,673 test questions", wide, "reported", True)]
    met = median(wide) >= 0.97 and min(wide) >= 0.95
    goal = "median at least 0.97, none below 0.95"
    return [*found, claim("accuracy", "accuracy on 9,673 test questions, wide", wide, goal, met)]


def step_times(runs: list[dict[str, Any]]) -> str:
    """Say where the time goes, the longest step first."""
    times = {step: median(run["steps"][step] for run in runs) for step in runs[0]["steps"]}
    return ", ".join(f"{step} {times[step]:.0f}" for step in sorted(times, key=lambda step: -times[step]))


class _Memory:
    """Samples the proportional memory of a process and all below it; shared pages count once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the largest sum seen, in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._peak = max(self._peak, sum(map(_pss_bytes, _tree(self._pid))))


def _tree(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += parents.get(pid, [])
    return found


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
