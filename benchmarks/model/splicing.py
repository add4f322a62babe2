"""Times collation, packing and splicing of visual tokens for some images and for ten times as many.

Ten times the images are tried in two ways: ten times the rows, and rows with ten times the images in them.

python benchmarks/model/splicing.py            # 12 and 120 images of 256 tokens (48 and 480 to collate), nine repeats
python benchmarks/model/splicing.py --quick    # the same, three repeats
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

if TYPE_CHECKING:
    from torch import Tensor

    from nvila.data.conversation import Encoded

# Enough that also the smaller case asks the system for memory anew each time, as the larger one must.
_COLLATED, _SPLICED = 48, 12
_TOKENS_PER_IMAGE = 256
_TEXT_TOKENS = 64
_WIDTH = 3584  # of the 8B models; much less would fit into caches and heaps for some images, but not for ten times
_IMAGE_ID = 7
_TIMES = 10
Step = Callable[[], object]


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats")
    args = parser.parse_args()
    repeats = 3 if args.quick else 9
    small, large = steps(1), steps(_TIMES)
    runs = {name: compare(small[name], large[name], repeats) for name in small}
    for name, run in runs.items():
        few, many = min(run["few_ms"]), min(run["many_ms"])
        print(f"{name:24} {few:9.2f} ms {many:9.2f} ms {many / few:6.2f}x", flush=True)
    path = write_result(
        "model-splicing-quick" if args.quick else "model-splicing",
        claims(runs),
        {
            "collated": _COLLATED,
            "spliced": _SPLICED,
            "times": _TIMES,
            "tokens_per_image": _TOKENS_PER_IMAGE,
            "runs": runs,
        },
    )
    print(f"written: {path}")
    return 0


def steps(times: int) -> dict[str, Step]:
    """Return what is timed on so many times the images, with its inputs made."""
    from nvila.data.collation import collate
    from nvila.data.packing import collate_packed, pack

    alone = [sample(1, key) for key in range(_COLLATED * times)]
    together = [sample(_COLLATED * times // 4, key) for key in range(4)]
    rows = collate([[one] for one in alone[: _SPLICED * times]], pad_token_id=0)
    wide = collate([[sample(_SPLICED * times // 4, key)] for key in range(4)], pad_token_id=0)
    return {
        "collate, more rows": lambda: collate([[one] for one in alone], pad_token_id=0),
        "collate, longer rows": lambda: collate([[one] for one in together], pad_token_id=0),
        "pack and collate": lambda: collate_packed(pack(alone, 4 * 512), pad_token_id=0),
        "splice, more rows": splicing(rows.input_ids),
        "splice, longer rows": splicing(wide.input_ids),
    }


def sample(images: int, key: int) -> Encoded:
    """Make a sample of some images and as much text behind each; every other one is a little longer."""
    from nvila.data.conversation import Encoded

    text = _TEXT_TOKENS + key % 2
    ids = ((_IMAGE_ID,) * _TOKENS_PER_IMAGE + (1,) * text) * images
    labels = (-100,) * (len(ids) - text) + (1,) * text
    keys = tuple(f"{key}-{number}" for number in range(images))
    return Encoded(ids=ids, labels=labels, images=keys, media_end=len(ids) - text)


def splicing(input_ids: Tensor) -> Step:
    """Return one splice with its backward pass."""
    import torch

    from nvila.splicing import splice

    embeds = torch.randn(*input_ids.shape, _WIDTH, requires_grad=True)
    features = torch.randn(int((input_ids == _IMAGE_ID).sum()), _WIDTH, requires_grad=True)
    by_result = torch.ones_like(embeds)

    def run() -> None:
        embeds.grad = features.grad = None
        splice(embeds, input_ids, _IMAGE_ID, features, "image").backward(by_result)

    return run


def compare(few: Step, many: Step, repeats: int) -> dict[str, list[float]]:
    """Time both in turns, after a first run that is not counted."""
    few(), many()
    times: dict[str, list[float]] = {"few_ms": [], "many_ms": [], "ratio": []}
    for _ in range(repeats):
        # Short steps are run as often as the long one takes, so that the clock and the scheduler matter equally.
        times["few_ms"].append(_milliseconds(few, _TIMES))
        times["many_ms"].append(_milliseconds(many, 1))
        times["ratio"].append(round(times["many_ms"][-1] / times["few_ms"][-1], 3))
    return times


def _milliseconds(step: Step, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        step()
    return round((time.perf_counter() - started) / times * 1000, 4)


def claims(runs: dict[str, dict[str, Any]]) -> list[Claim]:
    """Turn runs into claims."""
    found = []
    for name, run in runs.items():
        ratios = run["ratio"]
        middle = sorted(ratios)[len(ratios) // 2]
        what = f"time of {name} with {_TIMES} times the images over the time without"
        found.append(claim(name.replace(", ", "-").replace(" ", "-"), what, ratios, "at most 11", middle <= 11))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
