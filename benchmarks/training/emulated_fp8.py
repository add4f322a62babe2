"""Training of a tiny recipe in emulated FP8 against bf16: the loss it ends with, in training and on held-out samples.

All stages of nvila-lite-2b-tiny are trained with each precision from the same weights on the same rows in the same
order. The last stage's loss is averaged over its last steps; the saved model is then asked, in fp32, for the loss of
validation questions about images that no stage saw.

Two controls run along. fp32 shows what the rounding of bf16 does. `moved` moves every value by as much as FP8 rounding
would, in a random direction: were the emulation wrong or one-sided, it would end elsewhere than FP8. A training that
took another path ends elsewhere by chance, so seeds are averaged, with the interval that Student's t gives the mean;
the worst single seed is reported beside it.

Trainings are the same to the bit every time on one machine, so `--keep FILE` notes every finished one and goes on from
there when the program is started again.

python benchmarks/training/emulated_fp8.py              # six seeds, fewer of what is only compared
python benchmarks/training/emulated_fp8.py --settings   # other groups and formats, three seeds; another result file
python benchmarks/training/emulated_fp8.py --longer     # the last stage with four times its steps, three seeds
python benchmarks/training/emulated_fp8.py --quick      # one seed
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, write_result
from transformers.utils.logging import disable_progress_bar

from nvila.assembly import load_model
from nvila.curation.scoring import nvila_hidden, score_rows
from nvila.data.collation import Batch
from nvila.data.dataset import IMAGES_FILE, load_samples
from nvila.data.media import ImageTable
from nvila.data.records import Sample, read_jsonl
from nvila.data.tokenizers import build_word_tokenizer
from nvila.training.config import Fp8Config, PrecisionConfig, TrainConfig
from nvila.training.media import Feed
from nvila.training.observer import StageStart, StepRecord
from nvila.training.precision import fp8_emulated
from nvila.training.run import train
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import load_recipe
from nvila_pipelines.steps.curate import texts
from nvila_pipelines.steps.runner import run_step
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

RECIPE = "nvila-lite-2b-tiny"
BOUND = 0.02
ROWS = 16
LAST_STEPS = 20
LENGTHS = {"recipe": [], "longer": ["train.stages.instruct.steps=240"]}
LENGTH_WORDS = {"recipe": "the recipe as it is", "longer": "with four times the steps of its last stage"}
# Seeds of each variant, from 0 on; what is asked for is judged by the most.
SEEDS = {"bf16": 6, "fp8": 6, "fp8_everything": 5, "fp32": 3, "moved": 1}
# Student's t for the 95% interval of a mean, by the number of seeds.
STUDENT_T = {3: 4.303, 5: 2.776, 6: 2.571}
FP8 = {
    "fp8": "emulated FP8",
    "fp8_everything": "emulated FP8 with FP8 AdamW and FP8 saved activations",
}
CONTROLS = {"fp32": "fp32", "moved": "values moved by as much as FP8 would, in random directions,"}
# Settings of the emulation that may do better.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups_16": ("emulated FP8 with a scale for 16 values", {"group_size": 16}),
    "e4m3_gradients": ("emulated FP8 with E4M3 gradients", {"backward": "e4m3"}),
}


class Run(TypedDict):
    """Losses of one seed: by variant, `training` and `held_out`."""

    seed: int
    losses: dict[str, dict[str, float]]


class Losses:
    """Keeps the losses of every stage."""

    def __init__(self) -> None:
        self.by_stage: dict[str, list[float]] = {}

    def on_stage_start(self, start: StageStart) -> None:
        """Begin a stage."""
        self.by_stage[start.stage] = []

    def on_step(self, record: StepRecord) -> None:
        """Keep a loss."""
        self.by_stage[record.stage].append(record.loss)

    def on_notice(self, text: str) -> None:
        """Show what the training has to say."""
        print(f"  {text}", file=sys.stderr)

    def on_stage_end(self, stage: str) -> None:
        """There is nothing to do."""


@dataclass(frozen=True, slots=True)
class Data:
    """Results of the recipe's first steps."""

    samples: Path
    selection: Path

    def of_stages(self) -> dict[str, list[Sample]]:
        """Return what stages may name."""
        selected: list[Sample] = list(read_jsonl(self.selection / "selected.jsonl"))
        return {"selected": selected} | {name: list(load_samples(self.samples, name)) for name in ("captions", "text")}


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON lines of finished trainings, to go on from")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--longer", action="store_true", help="four times the steps of the last stage")
    kind.add_argument("--settings", action="store_true", help="other settings of the emulation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    length = "longer" if args.longer else "recipe"
    if args.settings:
        labels = {"fp8": FP8["fp8"]} | {name: words for name, (words, _) in SETTINGS.items()}
    else:
        labels = FP8 | CONTROLS
    seeds = range(1 if args.quick else 3 if args.longer or args.settings else 6)
    with tempfile.TemporaryDirectory(prefix="emulated-fp8-") as folder:
        run = new_run(load_recipe(RECIPE), Settings.load(Path(folder), {}))
        store = open_store(run.settings)
        samples = run_step("data", load_recipe(RECIPE), {}, run)
        selection = run_step("curate", load_recipe(RECIPE), {"data": samples}, run)
        data = Data(store.fetch(samples), store.fetch(selection))
        config = load_recipe(RECIPE, LENGTHS[length]).train_config()
        kept = Kept(args.keep, length)
        runs = measure(config, data, seeds, list(labels), Path(folder), kept)
    found = [one for name, words in labels.items() for one in claims(length, name, words, runs)]
    name = "training-emulated-fp8" + "-longer" * args.longer + "-settings" * args.settings + "-quick" * args.quick
    details = {"recipe": RECIPE, "last_steps": LAST_STEPS, "overrides": LENGTHS[length], "runs": runs}
    print(f"written: {write_result(name, found, details)}")
    return 0


def variant(config: TrainConfig, name: str) -> TrainConfig:
    """Return the training with a precision, or with everything that FP8 can be used for."""
    fp8 = replace(config.precision.fp8, backend="emulated")
    if name in ("fp32", "bf16"):
        return replace(config, precision=PrecisionConfig(name="fp32" if name == "fp32" else "bf16", fp8=Fp8Config()))
    if name == "fp8_everything":
        everything = PrecisionConfig(name="fp8", fp8=replace(fp8, save_activations=True))
        return replace(config, precision=everything, optimizer="fp8_adamw")
    if name in SETTINGS:
        fp8 = replace(fp8, **SETTINGS[name][1])
    return replace(config, precision=PrecisionConfig(name="fp8", fp8=fp8))


@contextmanager
def moved_instead(seed: int) -> Iterator[None]:
    """Have the emulation add errors of the size that rounding makes, up or down by chance."""
    rounded, generator = fp8_emulated.round_to_fp8, torch.Generator().manual_seed(seed)

    def moved(x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None) -> torch.Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return x + signs * (rounded(x, dtype, group_size) - x).abs()

    fp8_emulated.round_to_fp8 = moved
    try:
        yield
    finally:
        fp8_emulated.round_to_fp8 = rounded


class Kept:
    """Losses of finished trainings, in memory and, where a path is given, in a file."""

    def __init__(self, path: Path | None, length: str) -> None:
        self._path, self._length = path, length
        self._found: dict[tuple[int, str], dict[str, float]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            one = json.loads(line)
            if one["length"] == length:
                self._found[one["seed"], one["name"]] = one["losses"]

    def get(self, seed: int, name: str) -> dict[str, float] | None:
        """Return the losses of a training that has finished."""
        return self._found.get((seed, name))

    def add(self, seed: int, name: str, losses: dict[str, float]) -> None:
        """Note a training."""
        self._found[seed, name] = losses
        if self._path is not None:
            line = json.dumps({"length": self._length, "seed": seed, "name": name, "losses": losses})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measure(
    config: TrainConfig, data: Data, seeds: Sequence[int], names: Sequence[str], folder: Path, kept: Kept
) -> list[Run]:
    """Train bf16 and every variant from every seed and take the two losses of each."""
    runs = [Run(seed=seed, losses={}) for seed in seeds]
    for name in ("bf16", *names):
        for run in runs[: SEEDS.get(name)]:
            seed = run["seed"]
            losses = kept.get(seed, name)
            if losses is None:
                with moved_instead(seed) if name == "moved" else nullcontext():
                    losses = measure_one(variant(replace(config, seed=seed), name), data, folder / f"{name}-{seed}")
                kept.add(seed, name, losses)
            run["losses"][name] = losses
            print(f"seed {seed} {name}: {losses}", flush=True)
    return runs


def measure_one(config: TrainConfig, data: Data, folder: Path) -> dict[str, float]:
    """Train, and return the two losses."""
    datasets = data.of_stages()
    tokenizer = build_word_tokenizer(texts(datasets["text"]), model_max_length=config.model.max_length)
    losses, images = Losses(), ImageTable.open(data.samples / IMAGES_FILE)
    model = train(config, datasets, images, tokenizer, folder, observers=[losses])
    final = fmean(losses.by_stage[config.stages[-1].name][-LAST_STEPS:])
    return {"training": final, "held_out": held_out_loss(model, config, data)}


@torch.inference_mode()
def held_out_loss(directory: Path, config: TrainConfig, data: Data) -> float:
    """Return the mean loss of an answer's token over the validation split."""
    model, processor = load_model(directory)
    model.eval()
    samples = load_samples(data.samples, "validation")
    stage = replace(config.stages[-1], data="validation")
    groups, media = Feed({"validation": samples}, ImageTable.open(data.samples / IMAGES_FILE)).stage(
        stage, config.model, processor
    )

    def hidden(batch: Batch) -> torch.Tensor:
        return nvila_hidden(model, batch, media.tensors(batch.images, batch.videos))

    pad = model.config.text_config.pad_token_id
    scores = [
        score
        for start in range(0, len(groups), ROWS)
        for score in score_rows(groups[start : start + ROWS], hidden, model.lm_head, pad)
    ]
    return sum(score.nll for score in scores) / sum(score.num_tokens for score in scores)


def claims(length: str, name: str, words: str, runs: Sequence[Run]) -> list[Claim]:
    """Compare a variant with bf16: the mean over seeds with its interval, and the worst seed."""
    made = []
    for kind, where in (
        ("training", f"training loss, mean of the last {LAST_STEPS} steps"),
        ("held_out", "held-out loss"),
    ):
        pairs = [(run["losses"]["bf16"][kind], run["losses"][name][kind]) for run in runs if name in run["losses"]]
        ratios = [found / bf16 for bf16, found in pairs]
        mean, (low, high) = fmean(ratios), interval(ratios)
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        what = f"{LENGTH_WORDS[length]}, {where}: {words} over bf16"
        id = f"{length}-{name}-{kind}".replace("_", "-")
        goal = name in FP8
        inside = max(abs(low - 1), abs(high - 1)) <= BOUND
        made += [
            Claim(
                id=id,
                what=f"{what}, mean over {len(ratios)} seeds and the 95% interval of that mean",
                ratio=round(mean, 4),
                low=round(low, 4),
                high=round(high, 4),
                goal=f"mean within {BOUND:.0%} of 1" if goal else "no goal: a comparison",
                met=not goal or abs(mean - 1) <= BOUND,
                notes=(
                    f"the whole interval is {'' if inside else 'not '}within {BOUND:.0%}"
                    if len(ratios) > 1
                    else "one seed"
                )
                + "; bf16 and this, by seed: "
                + "; ".join(f"{bf16:.4f}, {found:.4f}" for bf16, found in pairs),
            ),
            Claim(
                id=f"{id}-worst",
                what=f"{what}, the seed that is farthest from 1, and the range of all",
                ratio=round(worst, 4),
                low=round(min(ratios), 4),
                high=round(max(ratios), 4),
                goal="reported",
                met=True,
                notes=f"{sum(abs(ratio - 1) <= BOUND for ratio in ratios)} of {len(ratios)} seeds within {BOUND:.0%}",
            ),
        ]
    return made


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean by Student's t; of a single value, that value."""
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    half = STUDENT_T[len(ratios)] * stdev(ratios) / math.sqrt(len(ratios))
    return fmean(ratios) - half, fmean(ratios) + half


if __name__ == "__main__":
    raise SystemExit(main())
