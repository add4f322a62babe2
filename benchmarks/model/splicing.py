"""Times collation, packing and splicing of visual tokens for some images and for ten times as many.

Ten times the images are tried in two ways: ten times the rows, and rows with ten times the images in them. Processor
time is measured, in turns, so that what else runs on the machine counts little.

Packing fills rows of 2048 tokens: more images are more rows. The mask of pairs that eager and SDPA attention want for
such rows is timed by itself; it is made when it is asked for, and flash attention never asks.

python benchmarks/model/splicing.py            # splice 12 images of 256 tokens, collate 96, mask 192; 15 repeats
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
    from nvila.data.conversation import Encoded

# Enough that also the smaller case asks the system for memory anew each time, as the larger one must.
_COLLATED, _SPLICED = 96, 12
_MASKED = 192  # the mask of fewer would fit half into the processor's cache
_ROW_TOKENS = 2048
_LONG_ROWS = 4
_TOKENS_PER_IMAGE = 256
_TEXT_TOKENS = 64
_WIDTH = 3584  # of the 8B models; much less would fit into caches and heaps for some images, but not for ten times
_IMAGE_ID = 7
_TIMES = 10
_MASK_NOTE = "119 and 1187 MB, written once: what is timed is mostly how the system hands out new memory"
Step = Callable[[], object]


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats")
    args = parser.parse_args()
    repeats = 3 if args.quick else 15
    runs = {name: compare(make(1), make(_TIMES), repeats) for name, make in _STEPS.items()}
    for name, run in runs.items():
        few, many = min(run["few_ms"]), min(run["many_ms"])
        print(f"{name:24} {few:9.2f} ms {many:9.2f} ms {many / few:6.2f}x", flush=True)
    path = write_result(
        "model-splicing-quick" if args.quick else "model-splicing",
        claims(runs),
        {
            "collated": _COLLATED,
            "masked": _MASKED,
            "spliced": _SPLICED,
            "times": _TIMES,
            "tokens_per_image": _TOKENS_PER_IMAGE,
            "runs": runs,
        },
    )
    print(f"written: {path}")
    return 0


def collating_more_rows(times: int) -> Step:
    """Return a collation of rows of one image."""
    from nvila.data.collation import collate

    groups = [[one] for one in alone(_COLLATED * times)]
    return lambda: collate(groups, pad_token_id=0)


def collating_longer_rows(times: int) -> Step:
    """Return a collation of four rows that share the images."""
    from nvila.data.collation import collate

    groups = [[sample(_COLLATED * times // _LONG_ROWS, key)] for key in range(_LONG_ROWS)]
    return lambda: collate(groups, pad_token_id=0)


def packing(times: int) -> Step:
    """Return the packing of samples of one image and the collation of the rows."""
    from nvila.data.packing import collate_packed, pack

    samples = alone(_COLLATED * times)
    return lambda: collate_packed(pack(samples, _ROW_TOKENS), pad_token_id=0)


def masking(times: int) -> Step:
    """Return the making of the mask of pairs of packed rows."""
    from nvila.data.packing import collate_packed, pack

    batch = collate_packed(pack(alone(_MASKED * times), _ROW_TOKENS), pad_token_id=0)
    return lambda: batch.attention_mask


def splicing_more_rows(times: int) -> Step:
    """Return a splice into rows of one image."""
    return splicing(alone(_SPLICED * times))


def splicing_longer_rows(times: int) -> Step:
    """Return a splice into four rows that share the images."""
    return splicing([sample(_SPLICED * times // _LONG_ROWS, key) for key in range(_LONG_ROWS)])


def alone(count: int) -> list[Encoded]:
    """Make samples of one image."""
    return [sample(1, key) for key in range(count)]


def sample(images: int, key: int) -> Encoded:
    """Make a sample of some images and as much text behind each; every other one is a little longer."""
    from nvila.data.conversation import Encoded

    text = _TEXT_TOKENS + key % 2
    ids = ((_IMAGE_ID,) * _TOKENS_PER_IMAGE + (1,) * text) * images
    labels = (-100,) * (len(ids) - text) + (1,) * text
    keys = tuple(f"{key}-{number}" for number in range(images))
    return Encoded(ids=ids, labels=labels, images=keys, media_end=len(ids) - text)


def splicing(samples: list[Encoded]) -> Step:
    """Return one splice with its backward pass."""
    import torch

    from nvila.data.collation import collate
    from nvila.splicing import splice

    input_ids = collate([[one] for one in samples], pad_token_id=0).input_ids
    embeds = torch.randn(*input_ids.shape, _WIDTH, requires_grad=True)
    features = torch.randn(int((input_ids == _IMAGE_ID).sum()), _WIDTH, requires_grad=True)
    by_result = torch.ones_like(embeds)

    def run() -> None:
        embeds.grad = features.grad = None
        splice(embeds, input_ids, _IMAGE_ID, features, "image").backward(by_result)

    return run


_STEPS: dict[str, Callable[[int], Step]] = {
    "collate, more rows": collating_more_rows,
    "collate, longer rows": collating_longer_rows,
    "pack and collate": packing,
    "mask of packed rows": masking,
    "splice, more rows": splicing_more_rows,
    "splice, longer rows": splicing_longer_rows,
}


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
    started = time.process_time()
    for _ in range(times):
        step()
    return round((time.process_time() - started) / times * 1000, 4)


def claims(runs: dict[str, dict[str, Any]]) -> list[Claim]:
    """Turn runs into claims."""
    found = []
    for name, run in runs.items():
        ratios = run["ratio"]
        middle = sorted(ratios)[len(ratios) // 2]
        what = f"processor time of {name} with {_TIMES} times the images over the time without"
        note = _MASK_NOTE if name.startswith("mask") else ""
        found.append(claim(name.replace(", ", "-").replace(" ", "-"), what, ratios, "at most 11", middle <= 11, note))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
