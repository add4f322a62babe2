"""Accuracy on small digits on large pages, over tiling and token compression: what tables 1 and 2 of the paper ask.

A page of 256x256 pixels is seen as one tile of 48, or by Dynamic-S2 at 48 and 144 pixels, its tokens compressed 2x2 or
3x3. All models have the same tower, which knows digits as large as 144 pixels show them, and take the same steps: one
digit on a tile, reading whole pages (vision pretraining: everything learns), and then the questions. The settings were
found by hand on the training loss of seed 0, in six short trials. Processor time of one thread is told.

python benchmarks/evaluation/digit_pages.py --work runs         # one seed; finished runs are kept, --seeds adds more
python benchmarks/evaluation/digit_pages.py --quick             # one seed, few steps: does it run?
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result
from evaluation.digit_crops import PREFIX, Crops
from evaluation.digit_models import MAX_LENGTH, Media, decoder, tower, trained_and_scored
from evaluation.digit_tower import pretrained_tower

from nvila.data.digit_pages import DIGIT, PAGES, DigitPages
from nvila.data.digits_vqa import WORDS
from nvila.data.records import Sample, vqa_sample
from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.vision.projectors import num_output_tokens

TASK, TILE, PATCH, DIGIT_SIDE = "digit_pages", 48, 8, 7
_FULL, _QUICK = (1500, 900, 900), (20, 8, 8)
VARIANTS = {
    "single-2x2": ("resize", "mlp_downsample_2x2_fix"),
    "s2-2x2": ("dynamic_s2", "mlp_downsample_2x2_fix"),
    "s2-3x3": ("dynamic_s2", "mlp_downsample_3x3_fix"),
}


def main() -> int:
    """Train what is not trained yet, score, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run?")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="one model of each kind for every seed")
    parser.add_argument("--work", type=Path, help="folder of finished runs (default: one that is thrown away)")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="train these, write no result file")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        runs: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in args.only}
        for seed in args.seeds:
            for variant in args.only:
                runs[variant][seed] = run(work, variant, seed, _QUICK if args.quick else _FULL)
                print(variant, seed, runs[variant][seed], flush=True)
    if list(runs) == list(VARIANTS):
        name = "evaluation-digit-pages-quick" if args.quick else "evaluation-digit-pages"
        print(f"written: {write_result(name, claims(runs), {'steps': _QUICK if args.quick else _FULL, 'runs': runs})}")
    return 0


def claims(runs: dict[str, dict[int, dict[str, Any]]]) -> list[Claim]:
    """Compare the kinds of model, seed by seed, in points of accuracy."""

    def points(a: str, b: str) -> list[float]:
        return [100 * (runs[a][seed][TASK]["value"] - runs[b][seed][TASK]["value"]) for seed in runs[a]]

    seeds = len(runs["s2-2x2"])
    minutes = sum(run["seconds"] for variant in runs.values() for run in variant.values()) / 60
    notes = f"seeds: {seeds}; {minutes:.0f} minutes of one core for all models, towers apart"
    gain, loss = points("s2-2x2", "single-2x2"), points("s2-2x2", "s2-3x3")
    # The last scale has 3 x 3 tiles of 6 x 6 features.
    rate = (
        9
        * num_output_tokens(VARIANTS["s2-3x3"][1], TILE // PATCH)
        / (9 * num_output_tokens(VARIANTS["s2-2x2"][1], TILE // PATCH))
    )
    found = [
        claim(
            "s2-over-single-tile",
            "accuracy of Dynamic-S2 minus that of a single tile, points",
            gain,
            "at least 20",
            min(gain) >= 20,
            notes,
        ),
        claim(
            "3x3-below-2x2",
            "accuracy of 2x2 minus that of 3x3 after vision pretraining, points",
            loss,
            "at most 3",
            max(loss) <= 3,
            notes,
        ),
        claim("3x3-tokens", "visual tokens of 3x3 over those of 2x2", [rate], "under 0.5", rate < 0.5),
    ]
    for variant, by_seed in runs.items():
        for kind in ("corner", "yes_no_present"):
            values = [100 * run[TASK]["categories"][kind] for run in by_seed.values()]
            what = f"accuracy on questions of kind {kind}, {variant}, percent"
            found.append(claim(f"{variant}-{kind.replace('_', '-')}", what, values, "reported", True))
    return found


def run(work: Path, variant: str, seed: int, steps: tuple[int, int, int]) -> dict[str, Any]:
    """Train and score one model; `steps` are those of the tower, of reading pages, and of questions."""
    lr = 2e-3
    pages = DigitPages()
    vision, _ = pretrained_tower(
        work / f"tower-{seed}", tower(TILE, PATCH), (DIGIT_SIDE,), seed=seed, steps=steps[0], inverted=True
    )
    tiling, projector = VARIANTS[variant]
    model = ModelConfig(
        vision=tower(TILE, PATCH),
        language=decoder(),
        projector=projector,
        select_layer=-1,
        max_length=MAX_LENGTH,
        tiling=tiling,  # type: ignore[arg-type]
        s2_scales=(TILE, 3 * TILE) if tiling == "dynamic_s2" else (),
        max_tiles=9,
    )
    common: dict[str, Any] = {
        "images_per_step": 16,
        "schedule": "cosine",
        "warmup_steps": 50,
        "lr": {"vision": lr / 5, "projector": lr, "language": lr},
    }
    config = TrainConfig(
        model=model,
        backend="torch",
        attention="sdpa",
        betas=(0.9, 0.98),
        weight_decay=0.05,
        seed=seed,
        stages=(
            StageConfig(
                name="align", data="crops", steps=steps[1] // 2, tiling="resize", **common | {"images_per_step": 32}
            ),
            StageConfig(name="vision", data="read", steps=steps[1], **common),
            StageConfig(name="instruct", data="asked", steps=steps[2], samples_per_image=4, **common),
        ),
    )
    crops = Crops(tile=TILE, digit=DIGIT_SIDE, drawn=DIGIT, inverted=True)
    data = {"crops": crops.samples(), "read": list(read_aloud(pages)), "asked": list(pages.questions("train"))}
    return trained_and_scored(
        work / f"{variant}-{seed}",
        config,
        data,
        Media(lambda key: crops.png(key) if key.startswith(PREFIX) else pages.png(key), {}),
        [TASK],
        vision=vision,
    )


def read_aloud(pages: DigitPages) -> list[Sample]:
    """Return the pages of vision pretraining: all digits, corner by corner."""
    return [
        vqa_sample(
            id=f"read-{page}",
            source="read",
            image=f"train/{page}",
            question="read the page.",
            answer=" ".join(WORDS[digit] for digit in pages.shown(f"train/{page}")),
        )
        for page in range(PAGES["train"])
    ]


if __name__ == "__main__":
    raise SystemExit(main())
