"""What `nvila curate` needs for more records, and what a second process brings.

Memory is the largest resident set of all processes of the command together, for data sets of tiny generated images:
16x16 pixels, ten questions to each, as visual question answering has them. The models are as small as they get, one
layer 16 and 32 wide, so that a million records pass in minutes; what is held of a record does not depend on them.

python benchmarks/curation/scale.py                     # 10k, 100k and 1M records; one and two processes in turn
python benchmarks/curation/scale.py --only memory       # or: --only processes, which wants two idle cores
python benchmarks/curation/scale.py --quick

Parts that are left out keep what an earlier run has written.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import RESULTS, Claim, claim, write_result
from curation.models import easy_vqa_texts, save_untrained

COLORS = ("red", "green", "blue", "yellow")
NUM_IMAGES = 2000
QUESTIONS_PER_IMAGE = 10
IMAGE_SIDE = 16
PARTS = ("processes", "memory")
_SAMPLE_S = 0.2


def main() -> int:
    """Measure, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records")
    parser.add_argument("--only", choices=PARTS, help="measure one part and keep the other as it was")
    args = parser.parse_args()
    counts = (2_000, 20_000) if args.quick else (10_000, 100_000, 1_000_000)
    name = "curation-scale-quick" if args.quick else "curation-scale"
    details = earlier(name)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder_name:
        folder = Path(folder_name)
        if args.only in (None, "processes"):
            data = "digits-vqa" if args.quick else "easy-vqa"
            details["processes"] = processes(folder, 1 if args.quick else 3, data)
            write_result(name, claims(details), details)
        if args.only in (None, "memory"):
            details["memory"] = {}
            for count, run in memory(folder, counts):
                details["memory"][str(count)] = run
        path = write_result(name, claims(details), details)
    print(f"written: {path}")
    return 0


def earlier(name: str) -> dict[str, Any]:
    """Return what an earlier run has measured of each part."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["details"]) if path.exists() else {}


def memory(folder: Path, counts: Sequence[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """Curate data sets of growing size, one after the other."""
    texts = [f"which color is it? {' '.join(COLORS)}"]
    tiny = {
        size: save_untrained(folder / size, width=width, layers=1, image_size=IMAGE_SIDE, texts=texts)
        for size, width in (("small", 16), ("large", 32))
    }
    for count in counts:
        data = write_data(folder / f"data-{count}", count)
        out = folder / f"out-{count}"
        run = curate(data, tiny, out, processes=1)
        print(f"{count} records: {run}", flush=True)
        yield count, run
        shutil.rmtree(out)


def processes(folder: Path, repeats: int, data: str) -> dict[str, list[dict[str, float]]]:
    """Score one data set with one and with two processes of one thread, in turn."""
    texts = [*easy_vqa_texts(), "which digit is this? is it larger than odd even smaller zero one two three four"]
    models = {
        size: save_untrained(folder / f"p-{size}", width=width, layers=layers, texts=texts)
        for size, width, layers in (("small", 64, 2), ("large", 96, 3))
    }
    runs: dict[str, list[dict[str, float]]] = {"1": [], "2": []}
    for repeat in range(repeats):
        for number in (1, 2):
            run = curate(data, models, folder / f"p-{number}-{repeat}", processes=number)
            runs[str(number)].append(run)
            print(f"{number} process(es): {run}", flush=True)
    return runs


def write_data(folder: Path, count: int) -> Path:
    """Write a LLaVA data set of tiny images of one colour."""
    from PIL import Image

    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        color = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), color).save(folder / "images" / f"{number}.png")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as out:
        for number in range(count):
            turns = [
                {"from": "human", "value": "<image>\nwhich color is it?"},
                {"from": "gpt", "value": draw.choice(COLORS)},
            ]
            image = f"images/{number // QUESTIONS_PER_IMAGE % NUM_IMAGES}.png"
            out.write(json.dumps({"id": str(number), "image": image, "conversations": turns}) + "\n")
    return folder / "data.jsonl"


def curate(data: Path | str, models: dict[str, Path], out: Path, *, processes: int) -> dict[str, float]:
    """Run the command; seconds of the whole and of scoring alone, and peak memory of all processes in MiB."""
    command = [str(Path(sys.executable).with_name("nvila")), "curate", str(data), "--out", str(out)]
    for size, path in models.items():
        command += [f"--{size}", str(path)]
    command += ["--processes", str(processes), "--threads", "1", "--shard-size", "1024", "--log-format", "json"]
    command += ["--workspace", str(out.parent / "workspace"), "--json"]
    started = time.monotonic()
    log = out.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        memory = _Memory(process.pid)
        code = process.wait()
    seconds = time.monotonic() - started
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{said}\n{' '.join(command)} failed with {code}")
    shards = sorted((out / "shards").glob("scores-*.parquet"), key=lambda path: path.stat().st_mtime)
    # From the first shard of the last process to begin, so that start-up does not count.
    scoring = shards[-1].stat().st_mtime - shards[processes - 1].stat().st_mtime
    scored = len(shards) - processes
    return {
        "seconds": round(seconds, 1),
        "shards_per_second": round(scored / scoring, 3) if scoring else 0.0,
        "peak_mib": round(memory.stop() / 2**20, 1),
    }


class _Memory(threading.Thread):
    """Samples the resident memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        import psutil

        while not self._done.wait(_SAMPLE_S):
            try:
                root = psutil.Process(self._pid)
                family = [root, *root.children(recursive=True)]
                self._peak = max(self._peak, sum(one.memory_info().rss for one in family))
            except psutil.Error:
                continue

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._done.set()
        self.join()
        return self._peak


def claims(details: dict[str, Any]) -> list[Claim]:
    """Turn what there is into claims."""
    found = []
    if runs := details.get("processes"):
        pairs = list(zip(runs["1"], runs["2"], strict=True))
        scoring = [two["shards_per_second"] / one["shards_per_second"] for one, two in pairs]
        whole = ", ".join(f"{one['seconds'] / two['seconds']:.2f}" for one, two in pairs)
        found.append(
            claim(
                "two-processes",
                "scoring throughput of two processes over one, a thread each",
                scoring,
                "at least 1.7",
                sorted(scoring)[len(scoring) // 2] >= 1.7,
                f"of the whole command, with start-up, merging and report: {whole}",
            )
        )
    if len(runs := details.get("memory", {})) > 1:
        peaks = [run["peak_mib"] for run in runs.values()]
        ratios = [peak / peaks[0] for peak in peaks]
        found.append(
            claim(
                "memory",
                f"peak memory over that of {next(iter(runs))} records, up to {list(runs)[-1]} records",
                ratios,
                "flat within 15%",
                max(ratios) <= 1.15,
                "MiB: " + ", ".join(f"{count}: {run['peak_mib']}" for count, run in runs.items()),
            )
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
