"""A long run of everything at once: random arrivals, lengths, media, cancellations, deadlines and poisoned requests.

A small model with random weights, so that there are very many requests, in an engine that is too small for them:
requests wait, are shed, are preempted, and both caches are evicted all the time. Every answer is compared with what
`generate` says to the same question alone (sampled and constrained ones with what the engine said alone). Callers meet
after each round, and the engine must be empty then.

python benchmarks/inference/soak.py                 # 30 minutes
python benchmarks/inference/soak.py --minutes 0.5
python benchmarks/inference/soak.py --quick         # 20 seconds, no result file
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result
from soak_questions import POISON, Question, build_engine, make_questions, poison

from nvila.errors import DeadlineError, OverloadedError
from nvila.inference.engine import Engine

_CLIENTS = 10
_ROUND_S = 10.0
_THINK_S = 0.02
_LOOK_S, _LOOKS = 0.1, 1200
_WARM = 0.2  # share of the time before memory is looked at
_GROWTH = 1.0  # percent of memory behind the warm-up that may be noise


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    dirty_rounds: int = 0
    preemptions: int = 0
    rss: list[tuple[float, float]] = field(default_factory=list)
    live: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> int:
        """Requests that were sent."""
        return self.outcomes.total()

    def note(self, outcome: str, problem: str | None = None) -> None:
        """Count a request; a problem is one that must not happen."""
        with self.lock:
            self.outcomes[outcome] += 1
            if problem is not None:
                self.wrong.append(problem)


def main() -> int:
    """Run, print what happened, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 20.0 if args.quick else 60 * args.minutes
    tally = soak(seconds, seed=args.seed, tell=True)
    per_hour, percent, size = growth(tally.rss)
    print(f"{tally.asked} requests: {dict(tally.outcomes)}; {tally.preemptions} preemptions")
    print(f"wrong or lost: {len(tally.wrong)} {tally.wrong[:3]}; rounds that left blocks behind: {tally.dirty_rounds}")
    print(f"memory {size:.0f} MiB, {per_hour:+.2f} MiB an hour, {percent:+.2f}% between quarters 2 and 4")
    if args.quick:
        return 1 if tally.wrong or tally.dirty_rounds else 0
    flat = abs(percent) < _GROWTH
    note = f"{seconds / 60:g} minutes, {tally.asked} requests: " + ", ".join(
        f"{count} {name}" for name, count in sorted(tally.outcomes.items())
    )
    claims = [
        claim(
            "soak-answers", "answers that are lost, mixed up or wrong", [len(tally.wrong)], "0", not tally.wrong, note
        ),
        claim(
            "soak-blocks",
            "rounds after which a KV block, a request or a tile was left behind",
            [tally.dirty_rounds],
            "0",
            not tally.dirty_rounds,
            f"callers meet every {_ROUND_S:g} s; {tally.preemptions} preemptions",
        ),
        claim(
            "soak-memory",
            "growth of resident memory behind the warm-up in percent, median of the last quarter over the second",
            [percent],
            f"below {_GROWTH:g}",
            flat,
            f"of {size:.0f} MiB; slope {per_hour:+.2f} MiB an hour",
        ),
    ]
    rss = [(round(at, 1), round(mib, 2)) for at, mib in tally.rss[:: max(1, len(tally.rss) // 200)]]
    live = [(round(mib, 2), blocks) for mib, blocks in tally.live[:: max(1, len(tally.live) // 200)]]
    details = {"seconds": seconds, "outcomes": dict(tally.outcomes), "wrong": tally.wrong[:20], "rss_mib": rss}
    details["live_mib_and_python_blocks"] = live
    print(f"written: {write_result('inference-soak', claims, details)}")
    return 0


def soak(seconds: float, *, seed: int = 0, tell: bool = False) -> Tally:
    """Ask for some time and return what happened."""
    engine = build_engine()
    questions = make_questions(engine)
    tally = Tally()
    hook = engine.model.model.language_model.register_forward_pre_hook(poison(engine, questions), with_kwargs=True)
    began = time.monotonic()
    number = 0
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            _round(engine, questions, tally, min(left, _ROUND_S), seed + 1000 * number)
            number += 1
            tally.rss.append((time.monotonic() - began, resident_mib()))
            tally.live.append((live_mib(), sys.getallocatedblocks()))
            if tell and number % 6 == 0:
                print(f"{time.monotonic() - began:.0f} s: {tally.asked} requests, {len(tally.wrong)} wrong", flush=True)
    finally:
        hook.remove()
    tally.preemptions = engine.stats().preemptions
    return tally


def growth(rss: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return MiB an hour and percent of growth behind the warm-up, and the memory then; zeros for too few points."""
    points = rss[int(len(rss) * _WARM) :]
    if len(points) < 8:
        return 0.0, 0.0, rss[-1][1] if rss else 0.0
    slope = linear_regression([at for at, _ in points], [mib for _, mib in points]).slope
    quarter = len(points) // 4
    early, late = (median(mib for _, mib in some) for some in (points[quarter : 2 * quarter], points[-quarter:]))
    return 3600 * slope, 100 * (late / early - 1), late


def resident_mib() -> float:
    """Return the memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


class _MallInfo(ctypes.Structure):
    """What glibc says of its heaps (mallinfo2), bytes; only two of its fields are read."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def live_mib() -> float:
    """Return the memory that is in use by somebody, without what the allocator keeps for later.

    Memory that is in use and stays the same while resident memory grows is no leak but holes between blocks.
    """
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return float(found.uordblks + found.hblkhd) / 2**20


def _round(engine: Engine, questions: Sequence[Question], tally: Tally, seconds: float, seed: int) -> None:
    """Let all callers ask for some time, wait for them, and look whether the engine is empty."""
    until = time.monotonic() + seconds
    dice = [random.Random(seed + client) for client in range(_CLIENTS)]
    threads = [threading.Thread(target=_client, args=(engine, questions, tally, until, one)) for one in dice]
    for thread in threads:
        thread.daemon = True  # a caller that hangs must not keep the program alive
        thread.start()
    # Looks at the threads count, not the clock: the whole program may be stopped for a while.
    for _ in range(_LOOKS):
        if not any(thread.is_alive() for thread in threads):
            break
        time.sleep(_LOOK_S)
    else:
        tally.note("lost", "a caller never got an answer")
        raise RuntimeError("a caller waits for ever")
    stats = engine.stats()
    if stats.running or stats.waiting or stats.blocks_used:
        tally.dirty_rounds += 1


def _client(engine: Engine, questions: Sequence[Question], tally: Tally, until: float, dice: random.Random) -> None:
    while time.monotonic() < until:
        time.sleep(dice.expovariate(1 / _THINK_S))
        _ask(engine, dice.choice(questions), tally, dice)


def _ask(engine: Engine, question: Question, tally: Tally, dice: random.Random) -> None:
    """Send one request, in one of the ways callers behave, and judge what comes back."""
    timeout_s = dice.choice((None, None, None, 0.001, 0.02, 0.2))
    leave_after = dice.choice((None, None, None, 0, 1, 5))
    length = dice.randint(1, question.params.max_tokens)
    left = False
    try:
        running = engine.stream(question.messages, question.media, question.params_for(length), timeout_s=timeout_s)
        for count, _ in enumerate(running):
            if leave_after is not None and count >= leave_after:
                left = True
                if dice.random() < 0.5:  # others just stop reading
                    running.close()
                break
    except OverloadedError:
        tally.note("shed")
        return
    except DeadlineError:
        tally.note("late", None if timeout_s is not None else f"{question.name}: late without a deadline")
        return
    except Exception as e:
        expected = question.name == POISON and ("poisoned" in str(e) or "not finite" in str(e))
        tally.note("poisoned", None if expected else f"{question.name}: {type(e).__name__}: {e}")
        return
    said = running.token_ids
    tally.note("cancelled" if left else "answered", question.judge(said, length, whole=not left))


if __name__ == "__main__":
    sys.exit(main())
