"""What the less obvious choices of the quickstart recipe are worth: one run without each, on the validation split.

Curation by the paper's literal rule, curation without rounding, and training without a vision stage, against the
recipe as shipped. Settings are chosen by this, so the test split stays untouched.

python benchmarks/quickstart/choices.py              # the default recipe, seed 0
python benchmarks/quickstart/choices.py --quick      # the fast recipe
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

SHIPPED = "as shipped"
VARIANTS: dict[str, list[str]] = {
    SHIPPED: [],
    "curation by the literal rule": ["curate.centre=none", "curate.resolution=0"],
    "curation centred, not rounded": ["curate.resolution=0"],
    "no vision stage": ["train.stages.vision=null"],
}


def main() -> int:
    """Run the variants, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fast recipe")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = "fast" if args.quick else "quickstart"
    runs: dict[str, dict[str, Any]] = {}
    # One workspace: steps that a variant does not change are made once.
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as workspace:
        for name, overrides in VARIANTS.items():
            runs[name] = evaluate(recipe, [f"seed={args.seed}", *overrides], Path(workspace))
            by_kind = ", ".join(f"{kind} {score:.3f}" for kind, score in runs[name]["by_source"].items())
            print(f"{name}: {runs[name]['accuracy']:.4f} ({by_kind})", flush=True)
            # After every run, so that an interrupted benchmark leaves what it measured.
            path = write_result(f"{recipe}-choices", claims(runs), {"seed": args.seed, "runs": runs})
    print(f"written: {path}")
    return 0


def evaluate(recipe: str, overrides: list[str], workspace: Path) -> dict[str, Any]:
    """Run the steps up to the evaluation and return accuracy, whole and by kind of question."""
    command = [
        str(Path(sys.executable).with_name("nvila")),
        "evaluate",
        recipe,
        "evaluate.split=validation",
        *overrides,
    ]
    before = set(workspace.glob("artifacts/evaluate-quantized/*/results.json"))
    subprocess.run([*command, "--workspace", str(workspace), "--json"], check=True, capture_output=True)
    (found,) = set(workspace.glob("artifacts/evaluate-quantized/*/results.json")) - before
    results = json.loads(found.read_text(encoding="utf-8"))
    return {
        "overrides": overrides,
        "accuracy": results["accuracy"],
        "by_source": {kind: tally["accuracy"] for kind, tally in results["by_source"].items()},
    }


def claims(runs: dict[str, dict[str, Any]]) -> list[Claim]:
    """Turn runs into claims: what is shipped is the best of what was tried."""
    shipped = runs[SHIPPED]["accuracy"]
    found = [claim("shipped", "validation accuracy as shipped", [shipped], "reported", True)]
    for name, run in runs.items():
        if name != SHIPPED:
            slug = "-".join(name.replace(",", "").split())
            what = f"validation accuracy, {name}"
            found.append(claim(slug, what, [run["accuracy"]], "below what is shipped", run["accuracy"] < shipped))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
