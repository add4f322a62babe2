"""Quality of tuning methods and of learning-rate ratios on a transfer task.

A base learns easy-VQA (captions, then questions) and is tuned on pages of handwritten digits in large print, which it
has never seen. Every method chooses its rate and its ratio among as many, by the held-out loss of short runs, with a
seed of their own; then it is tuned with every seed on the same pages and names the digits of other pages. The ratios
are those of ln+lora at the rate that it chose, in runs a quarter as long. Finished cells are kept in --work.

python benchmarks/tuning/quality.py --work runs   # three seeds
python benchmarks/tuning/quality.py --quick       # one seed, two methods, few steps: does it run?
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from tuning.transfer import Cell, open_pages, run_cell, score, train_base

from nvila.tuning.methods import RATIOS

# What each method chooses from: rates of the language model and the projector, and ratios.
CHOICES = {
    "full+full": ((1e-3, 2e-3), (1.0, 10.0)),
    "ln+lora": ((2e-3, 4e-3), (1.0, 10.0)),
    "lora+lora": ((2e-3, 4e-3), (1.0, 10.0)),
    "ln+qlora": ((2e-3, 4e-3), (1.0, 10.0)),
    "frozen+lora": ((1e-3, 2e-3, 4e-3, 8e-3), (1.0,)),
}
PAGES_A_STEP, CHOOSING_SEED = 32, 100


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two methods, few steps: does it run?")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="every cell once for each")
    parser.add_argument("--methods", nargs="*", default=list(CHOICES), choices=CHOICES, help="only these")
    parser.add_argument("--work", type=Path, help="folder of finished cells (default: one that is thrown away)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch:
        table = Table(args.work or Path(scratch), quick=args.quick)
        seeds = [0] if args.quick else args.seeds
        runs: dict[Cell, dict[str, Any]] = {}
        chosen: dict[str, Cell] = {}
        for method in ("full+full", "ln+lora") if args.quick else args.methods:
            chosen[method] = table.choose(method)
            for seed in seeds:
                cell = replace(chosen[method], seed=seed, steps=table.steps)
                runs[cell] = table.run(cell)
        for ratio in table.ratios if "ln+lora" in chosen else ():
            for seed in seeds:
                cell = replace(chosen["ln+lora"], ratio=ratio, seed=seed, steps=table.ratio_steps)
                runs[cell] = table.run(cell)
    name = "tuning-quality-quick" if args.quick else "tuning-quality"
    own = {method: {"rate": cell.rate, "ratio": cell.ratio} for method, cell in chosen.items()}
    steps = {"steps": table.steps, "ratio_steps": table.ratio_steps}
    details = {"base": table.before, **steps, "chosen": own, "trials": table.trials}
    lines = [{**asdict(cell), **found} for cell, found in runs.items()]
    print(f"written: {write_result(name, claims(lines, own, **steps), {**details, 'runs': lines})}")
    return 0


class Table:
    """Runs cells over one base and one set of pages.

    Args:
        work: Folder of finished work.
        quick: Few steps and few pages.
    """

    def __init__(self, work: Path, *, quick: bool) -> None:
        self.ratios = RATIOS[:1] if quick else RATIOS
        self.steps, self.ratio_steps, self._trial_steps, self._asked = (8, 6, 4, 30) if quick else (2000, 500, 250, 250)
        self._work = work
        self._base = train_base(work / "base", (10, 10) if quick else (300, 300))
        self._data = open_pages(self._base, work / "index", 100 if quick else 4000)
        self.before = score(self._base, self._asked)
        self.trials: list[dict[str, Any]] = []
        print(f"base: {self.before}", flush=True)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Do a cell, or read it."""
        found = run_cell(self._base, self._data, self._work, cell, PAGES_A_STEP, self._asked)
        print(cell.name, found, flush=True)
        return found

    def choose(self, method: str) -> Cell:
        """Return the cell with the rate and the ratio whose short run has the lowest held-out loss."""
        rates, ratios = CHOICES[method]
        trials = [
            Cell(method=method, rate=rate, ratio=ratio, seed=CHOOSING_SEED, steps=self._trial_steps)
            for rate in rates
            for ratio in ratios
        ]
        losses = [self.run(trial)["loss"] for trial in trials]
        self.trials += [{**asdict(trial), "loss": loss} for trial, loss in zip(trials, losses, strict=True)]
        return trials[losses.index(min(losses))]


def claims(
    runs: list[dict[str, Any]], chosen: dict[str, dict[str, float]], *, steps: int, ratio_steps: int
) -> list[Claim]:
    """Return the figures, in points of accuracy."""

    def values(method: str, ratio: float | None = None) -> list[float]:
        wanted = (method, chosen[method]["ratio"], steps) if ratio is None else (method, ratio, ratio_steps)
        return [100 * run["accuracy"] for run in runs if (run["method"], run["ratio"], run["steps"]) == wanted]

    found = []
    for method, how_chosen in chosen.items():
        what = f"accuracy of {method} on test pages, percent, by seed"
        notes = f"{steps} steps, rate {how_chosen['rate']:g}"
        notes += "" if method.startswith("frozen") else f", ratio {how_chosen['ratio']:g}"
        found.append(claim(f"accuracy-{method}", what, values(method), "reported", True, notes))
    if not {"full+full", "ln+lora"} <= chosen.keys():
        return found
    full, best = values("full+full"), values("ln+lora")
    behind = [a - b for a, b in zip(full, best, strict=True)]
    found.append(
        claim(
            "ln-lora-behind-full",
            "points that ln+lora is behind full tuning on test pages of digits in large print, by seed",
            behind,
            "at most 2 on average",
            mean(behind) <= 2.0,
            f"means {mean(full):.1f} and {mean(best):.1f}; each with its own rate and ratio, see the details",
        )
    )
    ratios = sorted({run["ratio"] for run in runs if (run["method"], run["steps"]) == ("ln+lora", ratio_steps)})
    means = {ratio: mean(values("ln+lora", ratio)) for ratio in ratios}
    best_ratio, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    gain = [a - b for a, b in zip(values("ln+lora", best_ratio), values("ln+lora", worst), strict=True)]
    found.append(
        claim(
            "ratio-effect",
            f"points that ln+lora gains with ratio {best_ratio:g}, the best of those tried, over {worst:g}, the worst",
            gain,
            "shown",
            True,
            f"{ratio_steps} steps; " + "; ".join(f"ratio {ratio:g}: {value:.1f}" for ratio, value in means.items()),
        )
    )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
