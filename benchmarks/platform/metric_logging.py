"""What 100 metrics a step to a real MLflow server cost a training, and how many a server takes.

A model of the quickstart's kind trains through the real loop, in one process with one thread, so that the server has a
core of its own. Blocks of steps take turns, in an order that moves on: `none` logs nothing; `ours` hands 100 values a
step to the tracker; `elsewhere` logs nothing, while another process gives the server as many, which tells what the
machine's second core costs the first; `client` calls MLflow's own client at every step, which waits for its answer. A
ratio is that of neighbouring blocks, from the sums of their steps. Then values are logged as fast as a caller can, and
counted on the server.

python benchmarks/platform/metric_logging.py              # 14 rounds of blocks, three times 50,000 values
python benchmarks/platform/metric_logging.py --quick      # 2 rounds, once 10,000 values
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench_result import Claim, claim, write_result
from training.telemetry import training

from nvila.training.observer import StageStart, StepRecord
from nvila_platform.mlflow_backend import connect
from nvila_platform.settings import Settings
from nvila_platform.tracking import Tracker, open_tracker

MODES = ("none", "ours", "elsewhere", "client")
BLOCK_STEPS = 20
# What the block before left behind (a batch on its way to the server) is not counted.
SETTLE_STEPS = 8
VALUES_A_STEP = 100
GOAL = 1.02


class Turns:
    """Logs as the turn says, and times every step from call to call."""

    def __init__(self, tracker: Tracker, client: Any, run_id: str, elsewhere: subprocess.Popen[str]) -> None:
        self.blocks: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
        self.calls: list[float] = []
        self._tracker, self._client, self._run_id, self._elsewhere = tracker, client, run_id, elsewhere
        self._last: tuple[float, str, int] | None = None

    def on_stage_start(self, start: StageStart) -> None:
        """Nothing is logged of it."""

    def on_step(self, record: StepRecord) -> None:
        """Count the step before to its block, and log this one in its own."""
        now = time.perf_counter()
        if self._last is not None:
            before, mode, place = self._last
            if place >= SETTLE_STEPS:
                self.blocks[mode][-1].append(now - before)
        block, place = divmod(record.step - 1, BLOCK_STEPS)
        round_, turn = divmod(block, len(MODES))
        mode = MODES[(turn + round_) % len(MODES)]
        if place == 0:
            self.blocks[mode].append([])
            self._tell("on" if mode == "elsewhere" else "off")
        self._last = (now, mode, place)
        values = {f"metric_{number}": record.loss + number for number in range(VALUES_A_STEP)}
        if mode == "ours":
            began = time.perf_counter()
            self._tracker.log_metrics(values, record.step)
            self.calls.append(time.perf_counter() - began)
        elif mode == "client":
            self._log_with_client(values, record.step)

    def on_notice(self, text: str) -> None:
        """Nothing is logged of it."""

    def on_stage_end(self, stage: str) -> None:
        """Nothing is logged of it."""

    def ratios(self, mode: str, base: str) -> list[float]:
        """Return the time of each block over that of the other kind in the same round."""
        pairs = zip(self.blocks[mode], self.blocks[base], strict=False)
        return [sum(one) / sum(other) for one, other in pairs if len(one) == len(other) != 0]

    def _log_with_client(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, one, now, step) for name, one in values.items()])

    def _tell(self, word: str) -> None:
        assert self._elsewhere.stdin is not None
        self._elsewhere.stdin.write(f"{word}\n")
        self._elsewhere.stdin.flush()


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of blocks, once 10,000 values")
    parser.add_argument("--elsewhere", nargs=3, metavar="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.elsewhere:
        return log_elsewhere(*args.elsewhere)
    rounds, values, floods = (2, 10_000, 1) if args.quick else (14, 50_000, 3)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch:
        claims, details = measure(Path(scratch), rounds, values, floods)
    for one in claims:
        print(f"{one.id:<20} {one.ratio:<10} ({one.low} to {one.high})  goal: {one.goal}")
    name = "platform-metric-logging-quick" if args.quick else "platform-metric-logging"
    print(f"written: {write_result(name, claims, details)}")
    return 0


def measure(scratch: Path, rounds: int, values: int, floods: int) -> tuple[list[Claim], dict[str, Any]]:
    """Train beside one server, then flood it."""
    from nvila_platform.mlflow_ui import start_ui

    local = Settings.load(scratch / "workspace", {})
    with start_ui(local, port=0) as server:
        settings = replace(local, tracking_uri=server.url)
        turns = train_in_turns(scratch / "out", settings, rounds)
        rates = [flood(settings, values) for _ in range(floods)]
    notes = f"{rounds} rounds of blocks of {BLOCK_STEPS} steps, the first {SETTLE_STEPS} of each left out"
    ours, elsewhere = turns.ratios("ours", "none"), turns.ratios("elsewhere", "none")
    claims = [
        claim(
            "metric-logging", f"step time with {VALUES_A_STEP} metrics a step to a server over none", ours,
            f"at most {GOAL}", shows_goal(ours), f"{notes}; met if the upper quartile is",
        ),
        claim(
            "metric-elsewhere", "step time while another process logs as many over none", elsewhere, "reported", True,
            "what the server's work costs the core beside it; nothing is logged by the process that trains",
        ),
        claim(
            "metric-client", "step time with MLflow's own client, called at every step, over ours",
            turns.ratios("client", "ours"), "reported", True, notes,
        ),
        claim(
            "metric-call-us", "the call that logs a step, microseconds", [second * 1e6 for second in turns.calls],
            "reported", True, f"{VALUES_A_STEP} values, in the thread that trains",
        ),
        claim(
            "metrics-a-second", "metrics a second until the server has them all", rates, "reported", True,
            f"{values:,} values as fast as the caller can, {VALUES_A_STEP} a call; then counted on the server",
        ),
    ]  # fmt: skip
    milliseconds = {
        mode: [round(1000 * sum(block) / len(block), 2) for block in blocks if block]
        for mode, blocks in turns.blocks.items()
    }
    return claims, {"step_ms": milliseconds, "ours_ratios": [round(one, 4) for one in ours]}


def shows_goal(ratios: list[float]) -> bool:
    """Whether rounds agree that the goal is met: a median that they do not agree on shows nothing."""
    return quantiles(ratios, n=4, method="inclusive")[-1] <= GOAL


def train_in_turns(out: Path, settings: Settings, rounds: int) -> Turns:
    """Train for all blocks and return what was timed."""
    from nvila.training.run import train

    out.mkdir(parents=True)
    config, inputs = training(out, len(MODES) * rounds * BLOCK_STEPS + 1)
    client = connect(settings)
    with open_tracker(settings, "ours") as tracker, elsewhere(settings) as process:
        run_id = tracker.wait_run_id(120)
        if run_id is None:
            raise SystemExit("the server does not answer")
        turns = Turns(tracker, client, run_id, process)
        train(config, inputs["datasets"], inputs["images"], inputs["tokenizer"], out, observers=(turns,))
    return turns


@contextmanager
def elsewhere(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """Start the process that logs in the place of this one; it begins and stops on a line of its input."""
    interval_s = "0.075"  # about that of a step here
    words = ["--elsewhere", str(settings.workspace.with_name("elsewhere")), settings.tracking_uri, interval_s]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()  # it is ready
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def log_elsewhere(workspace: str, address: str, interval_s: str) -> int:
    """Log values at the pace of a training while the last line said `on`."""
    logging = threading.Event()
    ended = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            (logging.set if line.strip() == "on" else logging.clear)()
        ended.set()

    settings = replace(Settings.load(Path(workspace), {}), tracking_uri=address)
    with open_tracker(settings, "elsewhere") as tracker:
        tracker.wait_run_id(120)
        threading.Thread(target=listen, daemon=True).start()
        print("ready", flush=True)
        step = 0
        while not ended.wait(float(interval_s)):
            if logging.is_set():
                step += 1
                tracker.log_metrics({f"metric_{number}": float(number) for number in range(VALUES_A_STEP)}, step)
    return 0


def flood(settings: Settings, values: int) -> float:
    """Log as fast as a caller can; return the values a second until the server has them all."""
    tracker = open_tracker(settings, "flood")
    run_id = tracker.wait_run_id(120)
    began = time.perf_counter()
    for step in range(values // VALUES_A_STEP):
        tracker.log_metrics({f"metric_{number}": float(step) for number in range(VALUES_A_STEP)}, step)
    tracker.close(timeout_s=600)
    took = time.perf_counter() - began
    client = connect(settings)
    for name in ("metric_0", f"metric_{VALUES_A_STEP - 1}"):
        found = len(client.get_metric_history(str(run_id), name))
        if found != values // VALUES_A_STEP:
            raise SystemExit(f"the server has {found} of {values // VALUES_A_STEP} values of {name}")
    return values / took


if __name__ == "__main__":
    raise SystemExit(main())
