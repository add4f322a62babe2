"""Training of a tiny recipe in emulated FP8 against bf16: the loss it ends with, in training and on held-out samples.

All stages of nvila-lite-2b-tiny are trained with each precision from the same weights on the same rows in the same
order. The last stage's loss is averaged over its last steps; the saved model is then asked, in fp32, for the loss of
validation questions about images that no stage saw. fp32 runs along: how far it is from bf16 says what rounding
alone does to such a training. With --longer the last stage has four times its steps.

python benchmarks/training/emulated_fp8.py              # three seeds
python benchmarks/training/emulated_fp8.py --longer     # half an hour on a busy core; another result file
python benchmarks/training/emulated_fp8.py --quick      # one seed
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
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
# What is compared with bf16.
VARIANTS = {
    "fp32": "fp32",
    "fp8": "emulated FP8",
    "fp8_everything": "emulated FP8 with FP8 AdamW and FP8 saved activations",
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
    parser.add_argument("--longer", action="store_true", help="four times the steps of the last stage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    seeds, lengths = [0] if args.quick else [0, 1, 2], ["longer" if args.longer else "recipe"]
    found: list[Claim] = []
    details: dict[str, object] = {"recipe": RECIPE, "last_steps": LAST_STEPS}
    with tempfile.TemporaryDirectory(prefix="emulated-fp8-") as folder:
        run = new_run(load_recipe(RECIPE), Settings.load(Path(folder), {}))
        store = open_store(run.settings)
        samples = run_step("data", load_recipe(RECIPE), {}, run)
        selection = run_step("curate", load_recipe(RECIPE), {"data": samples}, run)
        data = Data(store.fetch(samples), store.fetch(selection))
        for length in lengths:
            config = load_recipe(RECIPE, LENGTHS[length]).train_config()
            runs = [measure(config, data, seed, Path(folder) / length) for seed in seeds]
            found += claims(length, runs)
            details[length] = {"overrides": LENGTHS[length], "runs": runs}
    name = "training-emulated-fp8" + "-longer" * args.longer + "-quick" * args.quick
    print(f"written: {write_result(name, found, details)}")
    return 0


def variant(config: TrainConfig, name: str) -> TrainConfig:
    """Return the training with a precision, or with everything that FP8 can be used for."""
    fp8 = replace(config.precision.fp8, backend="emulated")
    if name in ("fp32", "bf16"):
        return replace(config, precision=PrecisionConfig(name="fp32" if name == "fp32" else "bf16", fp8=Fp8Config()))
    if name == "fp8":
        return replace(config, precision=PrecisionConfig(name="fp8", fp8=fp8))
    everything = PrecisionConfig(name="fp8", fp8=replace(fp8, save_activations=True))
    return replace(config, precision=everything, optimizer="fp8_adamw")


def measure(config: TrainConfig, data: Data, seed: int, folder: Path) -> Run:
    """Train every variant from one seed and take its two losses."""
    found: dict[str, dict[str, float]] = {}
    for name in ("bf16", *VARIANTS):
        seeded = variant(replace(config, seed=seed), name)
        datasets = data.of_stages()
        tokenizer = build_word_tokenizer(texts(datasets["text"]), model_max_length=config.model.max_length)
        losses, images = Losses(), ImageTable.open(data.samples / IMAGES_FILE)
        model = train(seeded, datasets, images, tokenizer, folder / f"{name}-{seed}", observers=[losses])
        final = fmean(losses.by_stage[config.stages[-1].name][-LAST_STEPS:])
        found[name] = {"training": final, "held_out": held_out_loss(model, config, data)}
        print(f"{folder.name} seed {seed} {name}: {found[name]}", flush=True)
    return {"seed": seed, "losses": found}


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


def claims(length: str, runs: Sequence[Run]) -> list[Claim]:
    """Compare every variant with bf16, seed by seed."""
    made = []
    for name in VARIANTS:
        for kind, where in (
            ("training", f"training loss, mean of the last {LAST_STEPS} steps"),
            ("held_out", "held-out loss"),
        ):
            pairs = [(run["losses"]["bf16"][kind], run["losses"][name][kind]) for run in runs]
            ratios = [found / bf16 for bf16, found in pairs]
            bound = name != "fp32"
            made.append(
                claim(
                    f"{length}-{name}-{kind}".replace("_", "-"),
                    f"{LENGTH_WORDS[length]}, {where}: {VARIANTS[name]} over bf16",
                    ratios,
                    f"within {BOUND:.0%} of 1 with every seed" if bound else "no goal: what rounding alone does",
                    not bound or max(abs(ratio - 1) for ratio in ratios) <= BOUND,
                    "bf16 and this, by seed: " + "; ".join(f"{bf16:.4f}, {found:.4f}" for bf16, found in pairs),
                )
            )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
