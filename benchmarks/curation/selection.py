"""Times choosing from saved scores, and its memory, from three to ten million records.

Scores are drawn at random for twenty sources of unequal size. A process of its own then does what `nvila curate --out
DIR --keep-rate 0.5` does behind scoring: ranks, and writes the selection and the ignore lists.

python benchmarks/curation/selection.py            # 3 and 10 million records, three repeats
python benchmarks/curation/selection.py --quick    # 0.1 and 1 million, one repeat
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

SOURCES = 20
KEEP_RATE = 0.5
_ROWS_AT_ONCE = 100_000
_LIMIT_S = 60
_FLAT = 1.15
_NOTE = "the database keeps to 256 MB and then spills; fewer than about 3 million records do not fill that"

# Runs in a process of its own, whose peak memory is that of choosing alone.
_CHOOSE = """
import json, resource, sys, time
from pathlib import Path
import numpy, pyarrow, duckdb
from nvila.curation.choosing import Rule, choose, write_selection
out, rule = Path(sys.argv[1]), Rule(keep_rate=float(sys.argv[2]), method=sys.argv[3])
started = time.perf_counter()
kept = choose(out, rule)
counts = write_selection(out, kept)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": round(seconds, 2), "mib": round(peak, 1), "kept": sum(c.kept for c in counts.values())}))
"""


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records, one repeat")
    args = parser.parse_args()
    few, many = (100_000, 1_000_000) if args.quick else (3_000_000, 10_000_000)
    runs: dict[int, list[dict[str, Any]]] = {few: [], many: []}
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch:
        folders = {size: Path(scratch) / str(size) for size in runs}
        for size, folder in folders.items():
            folder.mkdir()
            write_scores(folder, size)
        for _ in range(1 if args.quick else 3):
            for size, folder in folders.items():
                runs[size].append(choose(folder))
                run = runs[size][-1]
                print(f"{size:>12,} records {run['seconds']:8.2f} s {run['mib']:8.1f} MiB", flush=True)
    path = write_result(
        "curation-selection-quick" if args.quick else "curation-selection",
        claims(runs[few], runs[many], few, many),
        {"sources": SOURCES, "keep_rate": KEEP_RATE, "runs": {str(size): found for size, found in runs.items()}},
    )
    print(f"written: {path}")
    return 0


def write_scores(folder: Path, size: int) -> None:
    """Write a table of random scores as merging leaves it; the larger a source's number, the fewer records it has."""
    import numpy as np
    import pyarrow as pa

    from nvila.curation.merging import SCORES, SCORES_SCHEMA
    from nvila.curation.shards import ParquetFile

    numbers = np.random.default_rng(0)
    weights = 1 / np.arange(1, SOURCES + 1)
    names = np.array([f"source-{number:02d}" for number in range(SOURCES)])
    with ParquetFile(folder / SCORES, SCORES_SCHEMA) as file:
        for start in range(0, size, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, size - start)
            small, large = numbers.exponential(3, count), numbers.exponential(2, count)
            columns = {
                "id": [f"record-{start + row:09d}" for row in range(count)],
                "source": names[numbers.choice(SOURCES, count, p=weights / weights.sum())],
                "nll_small": small,
                "nll_large": large,
                "delta": small - large,
                "num_answer_tokens": numbers.integers(1, 200, count, dtype=np.int32),
                "status": ["ok"] * count,
            }
            file.write(pa.table(columns, schema=SCORES_SCHEMA))


def choose(folder: Path, method: str = "deltaloss") -> dict[str, Any]:
    """Choose once in a process of its own."""
    command = [sys.executable, "-c", _CHOOSE, str(folder), str(KEEP_RATE), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def claims(few: list[dict[str, Any]], many: list[dict[str, Any]], size: int, largest: int) -> list[Claim]:
    """Turn runs into claims."""
    seconds = [run["seconds"] / _LIMIT_S for run in many]
    memory = [more["mib"] / less["mib"] for less, more in zip(few, many, strict=True)]
    middle = sorted(seconds)[len(seconds) // 2]
    growth = sorted(memory)[len(memory) // 2]
    what = f"time of choosing from {largest:,} scores over {_LIMIT_S} s"
    flat = f"peak memory of choosing from {largest:,} scores over that of {size:,}"
    return [
        claim("selection-time", what, seconds, "at most 1", middle <= 1),
        claim("selection-memory", flat, memory, f"at most {_FLAT}", growth <= _FLAT, _NOTE),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
