"""The server over the bare engine, over one request at a time, and at up to twice its capacity.

The same model and requests each time: 16 threads that read from an `Engine` in this process, then 16 clients that
stream over HTTP from a server process, then from one that answers one request at a time, in turns. At last requests
arrive by chance at 0.5 to 2 times the rate that the server managed, whether it answers or not.

What the server adds to a request is counted request by request, in these same rounds: the time that its client saw,
less the time that the engine in the server's process had it (timed_server.py), from being asked to handing out the
piece: parsing, waiting for a worker, writing and reading. What the server takes from the engine's own speed is not
in it: that is in the tokens a second over the bare engine.

The clients do no more than read, but they do it on the same cores: what they take is told in the notes. Processor time
a token is counted as well, of the server's process and, for the bare engine, of this one; a busy machine moves it less
than it moves the clock.

python benchmarks/serving/load.py
python benchmarks/serving/load.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from bench_result import claim, write_result
from served import NAME, Seen, ask, body, build, client, question, together
from timed_server import TIMES

from nvila.data.records import Message, Part
from nvila.inference.engine import Delta, Engine, EngineConfig, SamplingParams
from nvila_platform.serving import RunningServer, start_server

_CLIENTS = 16
_HERE = str(Path(__file__).resolve().parent)
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_GOAL_MS, _GOAL_SHARE, _GOAL_ONE, _GOAL_GOODPUT = 5.0, 0.9, 4.0, 0.9
_LOADS = (0.5, 1.0, 1.5, 2.0)


def main() -> int:
    """Run, print the figures, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of few tokens, nothing written")
    args = parser.parse_args()
    repeats, requests, tokens, seconds = (1, 16, 8, 3.0) if args.quick else (5, 48, 32, 12.0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder:
        model = Path(folder) / "model"
        build(model, small=args.quick)
        engine = Engine.load(model, EngineConfig(max_running=_CLIENTS))
        seen: list[list[Seen]] = []
        times = Path(folder) / "times.json"
        with _server(model, times) as server, _server(model) as single:
            rounds = [_round(engine, server, single, number, requests, tokens, seen) for number in range(repeats + 1)]
            rate = median(one["server"]["requests_per_s"] for one in rounds[1:])
            loads = [asyncio.run(_open_loop(server, rate * load, seconds, tokens, load)) for load in _LOADS]
        added = [_added(ones, json.loads(times.read_text(encoding="utf-8"))) for ones in seen]
    # The first round warms up.
    rounds, added = rounds[1:], added[1:]
    claims = _claims(added, rounds, loads)
    for one in claims:
        print(f"{one.id}: {one.ratio} ({one.low} to {one.high}), goal {one.goal}: {'met' if one.met else 'not met'}")
    for load in loads:
        print(load)
    if args.quick:
        return 0
    print(f"written: {write_result('serving-load', claims, {'added': added, 'rounds': rounds, 'open_loop': loads})}")
    return 0


def _server(model: Path, times: Path | None = None) -> Any:
    """Start the server: the one that notes its engine's times, or one that answers one request at a time."""
    if times is None:
        one = ("--max-running", "1", "--max-requests", "64")
        return start_server(model, NAME, env=_ONE_THREAD, args=one, timeout_s=400.0)
    env = _ONE_THREAD | {TIMES: str(times), "PYTHONPATH": os.pathsep.join((_HERE, os.environ.get("PYTHONPATH", "")))}
    args = ("--max-running", str(_CLIENTS))
    return start_server(model, NAME, env=env, args=args, timeout_s=400.0, module="timed_server")


def _added(seen: Sequence[Seen], times: dict[str, list[float]]) -> dict[str, float]:
    """Return the quartiles, over the requests of a round, of what the server added to both times of the engine."""
    found: dict[str, float] = {}
    for place, which in ((1, "first"), (2, "whole")):
        extra = []
        for one in seen:
            engine = times[str(one.number)]
            took = one.first_s if which == "first" else one.total_s
            extra.append((took - (engine[place] - engine[0])) * 1000)
        low, middle, high = quantiles(extra, n=4, method="inclusive")
        found |= {
            f"{which}_p25_ms": round(low, 2),
            f"{which}_p50_ms": round(middle, 2),
            f"{which}_p75_ms": round(high, 2),
        }
    return found


def _processor_s(process: psutil.Process) -> float:
    """Return the processor time that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _round(
    engine: Engine,
    server: RunningServer,
    single: RunningServer,
    number: int,
    requests: int,
    tokens: int,
    kept: list[list[Seen]],
) -> dict[str, dict[str, float]]:
    """Ask all three in turn, which of the first two comes first by turns; what the server's clients saw is kept."""
    first = (number + 1) * 10_000
    sent = [body(first + one, tokens) for one in range(requests)]
    process = psutil.Process(server.pid)
    found: dict[str, dict[str, float]] = {}
    for which in ("engine", "server") if number % 2 else ("server", "engine"):
        here, there = time.process_time(), _processor_s(process)
        if which == "engine":
            seen, seconds = _bare(engine, first, requests, tokens)
            cpu_s = time.process_time() - here
        else:
            seen, seconds = asyncio.run(together(server.base_url, sent, _CLIENTS, light=True))
            cpu_s = _processor_s(process) - there
            clients_s = time.process_time() - here
            kept.append(seen)
        made = sum(one.tokens for one in seen)
        found[which] = _figures(seen, seconds) | {"cpu_ms_a_token": round(cpu_s * 1000 / made, 4)}
    found["server"]["clients_cpu_ms_a_token"] = round(clients_s * 1000 / made, 4)
    found["one_at_a_time"] = _figures(
        *asyncio.run(together(single.base_url, sent[: requests // 2], _CLIENTS, light=True))
    )
    return found


def _bare(engine: Engine, first: int, requests: int, tokens: int) -> tuple[list[Seen], float]:
    """Ask the engine itself, from as many threads as the server has."""
    left = list(range(first, first + requests))
    seen: list[Seen] = []

    def work() -> None:
        while left:
            number = left.pop()
            began, one = time.perf_counter(), Seen(status=200)
            message = Message(role="user", content=(Part(type="text", value=question(number)),))
            generation = engine.stream([message], {}, SamplingParams(max_tokens=tokens, temperature=1.0, seed=number))

            def take(delta: Delta, began: float = began, one: Seen = one) -> None:
                one.first_s = one.first_s or time.perf_counter() - began
                one.text += delta.text

            generation.deliver(take)
            one.tokens, one.total_s = generation.usage.completion_tokens, time.perf_counter() - began
            seen.append(one)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, time.perf_counter() - began


def _figures(seen: list[Seen], seconds: float) -> dict[str, float]:
    firsts = sorted(one.first_s for one in seen)
    return {
        "tokens_per_s": round(sum(one.tokens for one in seen) / seconds, 2),
        "requests_per_s": round(len(seen) / seconds, 3),
        "first_p50_ms": round(median(firsts) * 1000, 2),
        "first_p99_ms": round(quantiles(firsts, n=100, method="inclusive")[-1] * 1000, 2),
        "total_p50_ms": round(median(one.total_s for one in seen) * 1000, 2),
    }


async def _open_loop(server: RunningServer, rate: float, seconds: float, tokens: int, load: float) -> dict[str, float]:
    """Send requests at a rate by chance; nobody waits for an answer before the next is sent."""
    draw = random.Random(round(load * 10))
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    tasks: list[asyncio.Task[Seen]] = []
    async with client(server.base_url) as http:
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:
            number = 1_000_000 + round(load * 100_000) + len(tasks)
            tasks.append(asyncio.create_task(ask(http, body(number, tokens))))
            await asyncio.sleep(draw.expovariate(rate))
        seen = await asyncio.gather(*tasks)
        took = time.perf_counter() - began
    served = [one for one in seen if one.status == 200]
    return {
        "load": load,
        "sent": len(seen),
        "served": len(served),
        "shed_429": sum(one.status == 429 for one in seen),
        "other": sum(one.status not in (200, 429) for one in seen),
        "goodput_per_s": round(len(served) / took, 3),
        "first_p50_ms": round(median(one.first_s for one in served) * 1000, 1),
        "first_p99_ms": round(quantiles([one.first_s for one in served], n=100, method="inclusive")[-1] * 1000, 1),
        "rss_growth_mib": round((process.memory_info().rss - before) / 2**20, 1),
        "sent_for_s": round(now, 1),
    }


def _claims(
    added: list[dict[str, float]], rounds: list[dict[str, dict[str, float]]], loads: list[dict[str, float]]
) -> list[Any]:
    first = [one["first_p50_ms"] for one in added]
    whole = [one["whole_p50_ms"] for one in added]
    share = [one["server"]["tokens_per_s"] / one["engine"]["tokens_per_s"] for one in rounds]
    over = [one["server"]["tokens_per_s"] / one["one_at_a_time"]["tokens_per_s"] for one in rounds]
    cpu = [one["server"]["cpu_ms_a_token"] / one["engine"]["cpu_ms_a_token"] for one in rounds]
    clients = median(one["server"]["clients_cpu_ms_a_token"] for one in rounds)
    bare = median(one["engine"]["cpu_ms_a_token"] for one in rounds)
    peak = max(load["goodput_per_s"] for load in loads)
    at_twice = loads[-1]["goodput_per_s"] / peak
    shed = all(load["other"] == 0 for load in loads)
    how = "22M parameters with weights of chance, 40 words in, 32 tokens out, one thread of torch each"
    return [
        claim(
            "first-token-added",
            "ms from sending to the first piece that are not the engine's, p50 of the requests of 16 streams",
            first,
            "under 5",
            max(first) < _GOAL_MS,
            f"{how}; {len(added)} rounds; upper quartiles {sorted(one['first_p75_ms'] for one in added)}",
        ),
        claim(
            "request-added",
            "ms from sending to the end of the answer that are not the engine's, p50 of the requests of 16 streams",
            whole,
            "under 5",
            max(whole) < _GOAL_MS,
            f"as above; upper quartiles {sorted(one['whole_p75_ms'] for one in added)}",
        ),
        claim(
            "processor-time-a-token",
            "processor time a token of the server's process over that of the bare engine, at 16 streams",
            cpu,
            "reported",
            True,
            f"the clients, in another process, take {clients:.2f} ms more, beside {bare:.2f} of the bare engine",
        ),
        claim(
            "throughput-kept",
            "tokens/s through the server over the bare engine at 16 streams",
            share,
            "at least 0.9",
            median(share) >= _GOAL_SHARE,
            how,
        ),
        claim(
            "over-one-at-a-time",
            "tokens/s of 16 clients over a server that answers one request at a time",
            over,
            "at least 4",
            median(over) >= _GOAL_ONE,
            how,
        ),
        claim(
            "goodput-at-twice",
            "requests answered a second at twice the capacity, over the peak of all loads; the rest gets 429",
            [at_twice],
            "at least 0.9, no other errors",
            at_twice >= _GOAL_GOODPUT and shed,
            "one run a load, arrivals by chance",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
