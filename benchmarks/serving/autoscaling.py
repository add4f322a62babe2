"""Does autoscaling settle? A load step on simulated pods that are as fast as a server recorded here.

First a real server process is started, which gives the cold start in its parts, and asked by 1 to 32 clients at once;
its own /metrics tell how many requests ran and waited. Then the cluster of scaling.py is simulated with that speed and
that cold start: a calm quarter of an hour, a step to six times the load, a step back. What charts/nvila-serving asks
for, the mean of two minutes and at most a fifth of the pods less a minute, against the latest scrape and the defaults
of Kubernetes, which is what a ScaledObject says that was written in a minute.

python benchmarks/serving/autoscaling.py           # --plot FILE draws it
python benchmarks/serving/autoscaling.py --quick   # few requests, nothing written
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result
from scaling import PodSpeed, Policy, Timeline, simulate, stepped
from served import NAME, body, build, together

from nvila_platform.serving import start_server

_CLIENTS = (1, 2, 4, 8, 16, 32)
_CALM_S, _BUSY_S, _AFTER_S = 900, 2700, 3600
_FACTOR = 6
_SEEDS = range(5)
# As in the values of charts/nvila-serving.
_DOWN_SHARE, _MEAN_S = 0.2, 120
_SHARE_OF_BEST = 0.4
# Assumed for scheduling, pulling the image and copying the model.
_PULL_S = 20.0


def main() -> int:
    """Record, simulate, print the figures, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, nothing written")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the first run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder:
        model = Path(folder) / "model"
        build(model, small=args.quick)
        starts = [_cold_start(model) for _ in range(1 if args.quick else 3)]
        speed, recorded = _record(model, 16 if args.quick else 64)
    cold = {part: median(start[part] for start in starts) for part in starts[0]}
    print("cold start, s:", {part: round(seconds, 2) for part, seconds in cold.items()})
    print("recorded:", recorded)
    # Well under what a pod can do at best. Nearer to its best, one pod less makes the requests in hand grow without
    # bound, and one more makes them so few that two would be taken away: the number would never rest.
    target = speed.load(_SHARE_OF_BEST * speed.best)
    policy = Policy(target=target, start_s=cold["process"] + _PULL_S, down_share=_DOWN_SHARE, mean_s=_MEAN_S)
    calm = 0.8 * speed.rate(target)
    load = stepped([(0, calm), (_CALM_S, _FACTOR * calm), (_CALM_S + _BUSY_S, calm)])
    seconds = _CALM_S + _BUSY_S + _AFTER_S
    ours = [simulate(load, seconds, speed, policy, seed) for seed in _SEEDS]
    peer = [simulate(load, seconds, speed, replace(policy, down_share=1.0, mean_s=0), seed) for seed in _SEEDS]
    claims = _claims(ours, peer, cold)
    for one in claims:
        print(f"{one.id}: {one.ratio} ({one.low} to {one.high}), goal {one.goal}: {'met' if one.met else 'not met'}")
    if args.plot:
        _draw(ours[0], peer[0], args.plot)
    if args.quick:
        return 0
    details = {"cold_start_s": cold, "recorded": recorded, "target": target, "calm_requests_per_s": calm}
    print(f"written: {write_result('serving-autoscaling', claims, details)}")
    return 0


# ---- Recording.


def _cold_start(model: Path) -> dict[str, float]:
    """Start a server; return the seconds of its parts: until the port answers, until the model is ready."""
    began = time.monotonic()
    with start_server(model, NAME, env={"OMP_NUM_THREADS": "1"}, timeout_s=400.0) as server:
        ready = time.monotonic() - began
        answered = time.monotonic()
        asyncio.run(together(server.base_url, [body(1, 4)], 1))
        first = time.monotonic() - answered
    imports = _imports()
    return {"process": ready + first, "imports": imports, "model": max(0.0, ready - imports), "first_answer": first}


def _imports() -> float:
    import subprocess

    program = "import nvila.inference.engine, nvila_platform.serving.kserve_server"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.monotonic() - began


def _record(model: Path, requests: int) -> tuple[PodSpeed, list[dict[str, float]]]:
    """Ask a server by several clients at once; return its speed by what its metrics say it had in hand."""
    found = []
    with start_server(
        model, NAME, env={"OMP_NUM_THREADS": "1"}, args=("--max-requests", "64"), timeout_s=400.0
    ) as server:
        asyncio.run(together(server.base_url, [body(number, 8) for number in range(8)], 4))
        for clients in _CLIENTS:
            sent = [body(1000 * clients + number, 16) for number in range(max(requests, 2 * clients))]
            with _Sampler(server.base_url) as sampler:
                seen, seconds = asyncio.run(together(server.base_url, sent, clients))
            done = sum(one.status == 200 for one in seen)
            found.append({"clients": clients, "in_flight": sampler.mean, "requests_per_s": done / seconds})
    # What is in hand grows with the clients; a sample that does not is no point of a curve.
    points = [found[0]]
    for one in found[1:]:
        if one["in_flight"] > points[-1]["in_flight"]:
            points.append(one)
    speed = PodSpeed(
        in_flight=tuple(one["in_flight"] for one in points), rates=tuple(one["requests_per_s"] for one in points)
    )
    return speed, found


class _Sampler:
    """Scrapes what the server has in hand while a block runs."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        self._stop = threading.Event()
        self._values: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        busy = [value for value in self._values if value > 0]
        return mean(busy) if busy else 0.0

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            with urllib.request.urlopen(self._url, timeout=10) as answer:  # noqa: S310 - 127.0.0.1
                text = answer.read().decode()
            found = re.findall(r"^nvila:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE)
            self._values.append(sum(map(float, found)))


# ---- What came out.


def _claims(ours: list[Timeline], peer: list[Timeline], cold: dict[str, float]) -> list[Claim]:
    busy, after, end = _CALM_S, _CALM_S + _BUSY_S, _CALM_S + _BUSY_S + _AFTER_S
    late = busy + 900
    strays = [line.strays(late, after) for line in ours]
    theirs = [line.strays(late, after) for line in peer]
    settle = [line.settled(busy, after) for line in ours]
    their_settle = [line.settled(busy, after) for line in peer]
    down = [line.settled(after, end) for line in ours]
    waits = [sorted(line.wait_s[after - 1800 : after])[int(0.95 * 1800)] for line in ours]
    # The first minutes have a queue in any case; what comes after it is the policy's.
    dips = [max(line.wait_s[busy + 300 : after]) for line in ours]
    their_dips = [max(line.wait_s[busy + 300 : after]) for line in peer]
    pods = [line.level(late, after) for line in ours]
    their_pods = [line.level(late, after) for line in peer]
    known = [float(value) for value in settle if value is not None]
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in cold.items() if part != "process")
    return [
        claim(
            "strays-under-load",
            "pods beside the median, at most, from 15 to 45 minutes after a step to six times the load",
            strays,
            "at most 2: no oscillation",
            max(strays) <= 2,
            f"five seeds of arrivals; with the latest scrape and the defaults of Kubernetes: {sorted(theirs)}",
        ),
        claim(
            "settled-after",
            "seconds from the step until the number of pods stays within one of its later median",
            known or [float("inf")],
            "under 15 minutes",
            len(known) == len(settle) and max(known) < 900,
            f"with the defaults of Kubernetes: {their_settle}",
        ),
        claim(
            "back-after",
            "seconds from the step back until the number of pods stays within one of its later median",
            [float(value) for value in down if value is not None] or [float("inf")],
            "under 15 minutes",
            all(value is not None and value < 900 for value in down),
            "",
        ),
        claim(
            "longest-wait",
            "longest time in the system from 5 minutes after the step on, seconds",
            dips,
            "reported",
            True,
            f"with a median of {median(pods):g} pods; with the defaults of Kubernetes, {median(their_pods):g} pods: "
            f"{sorted(round(value, 2) for value in their_dips)}",
        ),
        claim("wait-settled", "p95 of seconds in the system, last half hour of the load", waits, "reported", True, ""),
        claim(
            "cold-start",
            "seconds from starting the process to its first answer",
            [cold["process"]],
            "reported",
            True,
            f"{parts}; a pod's image pull and the copy of the model come on top, {_PULL_S:g} s are assumed for them",
        ),
    ]


def _draw(ours: Timeline, peer: Timeline, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    minutes = [second / 60 for second in range(len(ours.pods))]
    above.step(minutes, peer.pods, color="#9aa5b1", label="latest scrape, defaults of Kubernetes")
    above.step(minutes, ours.pods, color="#1f6fb2", label="mean of two minutes, at most a fifth less a minute")
    above.set_ylabel("pods")
    above.legend(frameon=False)
    below.plot(minutes, ours.load, color="#1f6fb2", linewidth=0.8)
    below.set_ylabel("requests in hand")
    below.set_xlabel("minutes")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {"dpi": 110} if path.suffix == ".png" else {}
    figure.savefig(path, **arguments)


if __name__ == "__main__":
    raise SystemExit(main())
