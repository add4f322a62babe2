"""Quality of the method matrix and of learning-rate ratios on a transfer task.

A base learns easy-VQA (captions, then questions) and is tuned on handwritten digits, which
it has never seen. Every cell is tuned with every seed on the same few images and answers the same test questions; the
last figures of each run stand in the details. The built-in pages of small digits are left out: at the tile of 64 pixels
that this base has, a digit on them has three pixels, and no method could read it.

python benchmarks/tuning/quality.py              # three seeds
python benchmarks/tuning/quality.py --quick      # one seed, three cells, few steps
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result

from nvila.assembly import load_model
from nvila.configuration import NVILAConfig
from nvila.data import easy_vqa
from nvila.data.media import ImageTable, write_image_table
from nvila.data.mixtures import Registry
from nvila.data.tokenizers import build_word_tokenizer
from nvila.evaluation.scores import exact_match
from nvila.processing import NVILAProcessor
from nvila.training.config import CheckpointConfig, PartName, StageConfig, TrainConfig
from nvila.training.run import train
from nvila.tuning.adapters import base_digest
from nvila.tuning.answering import answer_stream
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData, open_tune_data
from nvila.tuning.methods import RATIOS, learning_rates, parse_method
from nvila.tuning.run import tune
from nvila.tuning.splitting import Chosen
from nvila_pipelines.recipe import load_recipe

METHODS = ("full+full", "lora+lora", "ln+lora", "ln+qlora")
RATE = 2e-3
ROWS = 4000


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three cells, few steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps, asked = ([0], 20, 100) if args.quick else ([0, 1, 2], 100, 300)
    cells = [(method, 1.0 if method == "full+full" else 10.0) for method in METHODS]
    cells += [("ln+lora", ratio) for ratio in RATIOS if ratio != 10.0]
    if args.quick:
        cells = [cells[0], cells[2], cells[4]]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as name:
        folder = Path(name)
        base = train_base(folder / "base", quick=args.quick)
        data = open_data(base, folder / "index")
        test = Registry().open("digits-vqa:test")
        before = score(base, data, asked)
        print(f"base: {before:.3f} of {asked} answers, {test.count()} test questions in all")
        for seed in seeds:
            for method, ratio in cells:
                accuracy, loss = run_cell(base, data, folder / "out", method, ratio, seed, steps, asked)
                runs.append({"method": method, "ratio": ratio, "seed": seed, "accuracy": accuracy, "loss": loss})
                print(runs[-1], flush=True)
    path = write_result(
        "tuning-quality-quick" if args.quick else "tuning-quality",
        claims(runs),
        {"base": before, "steps": steps, "rate": RATE, "runs": runs},
    )
    print(f"written: {path}")
    return 0


def claims(runs: list[dict[str, Any]]) -> list[Any]:
    """Return the figures."""

    def values(method: str, ratio: float) -> list[float]:
        return [run["accuracy"] for run in runs if (run["method"], run["ratio"]) == (method, ratio)]

    full, best = values("full+full", 1.0), values("ln+lora", 10.0)
    behind = [100 * (a - b) for a, b in zip(full, best, strict=True)]
    found = [
        claim(
            "ln-lora-behind-full",
            "points of accuracy that ln+lora (ratio 10) is behind full tuning on handwritten digits, by seed",
            behind,
            "at most 2 on average",
            mean(behind) <= 2.0,
            f"means {100 * mean(full):.1f} and {100 * mean(best):.1f}; one fixed rate for all",
        )
    ]
    ratios = sorted({run["ratio"] for run in runs if run["method"] == "ln+lora"})
    means = {ratio: 100 * mean(values("ln+lora", ratio)) for ratio in ratios}
    winner = max(means, key=means.__getitem__)
    gain = [100 * (a - b) for a, b in zip(values("ln+lora", winner), values("ln+lora", 1.0), strict=True)]
    found.append(
        claim(
            "ratio-gain",
            f"points that ln+lora gains with ratio {winner:g}, the best of those tried, over ratio 1, by seed",
            gain,
            "shown",
            True,
            "; ".join(f"ratio {ratio:g}: {value:.1f}" for ratio, value in means.items()),
        )
    )
    table = {(run["method"], run["ratio"]) for run in runs}
    for method, ratio in sorted(table):
        found.append(
            claim(
                f"accuracy-{method}-ratio-{ratio:g}",
                f"accuracy of {method} with ratio {ratio:g} on test digits, by seed",
                values(method, ratio),
                "shown",
                True,
            )
        )
    return found


def train_base(folder: Path, *, quick: bool) -> Path:
    """Train a base on easy-VQA whose words include those of the digits."""
    questions = [sample for sample in easy_vqa.questions("train") if int(sample.images[0].rpartition("/")[2]) < 1200]
    captions = list(easy_vqa.captions(questions))
    digits = [record.sample for record in Registry().open("digits-vqa").records(stop=ROWS)]
    words = [text for s in (*questions, *captions, *digits) if s is not None for text in (s.question, s.answer)]
    folder.mkdir(parents=True)
    keys = {sample.images[0] for sample in questions}
    table = folder / "images.parquet"
    write_image_table(table, ((key, path.read_bytes()) for key, path in easy_vqa.image_files("train") if key in keys))
    model = load_recipe("fast").train_config().model
    parts: dict[PartName, float] = {"vision": 2e-3, "projector": 2e-3, "language": 2e-3}
    stages = (
        StageConfig(
            name="captions", data="captions", steps=20 if quick else 300, lr=parts, images_per_step=32,
            warmup_steps=20, schedule="linear",
        ),
        StageConfig(
            name="questions", data="questions", steps=20 if quick else 300, lr={**parts, "vision": 2e-4},
            images_per_step=8, samples_per_image=8, warmup_steps=20, schedule="cosine",
        ),
    )  # fmt: skip
    config = TrainConfig(
        model=model,
        stages=stages,
        backend="torch",
        attention="eager",
        checkpoints=CheckpointConfig(every_minutes=None),
    )
    made = train(
        config,
        {"captions": captions, "questions": questions},
        ImageTable.open(table),
        build_word_tokenizer(words, model_max_length=model.max_length),
        folder / "train",
    )
    return made


def open_data(base: Path, index: Path) -> TuneData:
    """Open the first digits, a tenth of them held out."""
    stream = Registry().open("digits-vqa")
    few = Chosen(stream, "digits", tuple(range(ROWS)))
    return open_tune_data(
        few, NVILAProcessor.from_pretrained(base), NVILAConfig.from_pretrained(base), index, held_out=0.1
    )


def run_cell(
    base: Path, data: TuneData, folder: Path, name: str, ratio: float, seed: int, steps: int, asked: int
) -> tuple[float, float]:
    """Tune once; returns accuracy on test questions and the lowest held-out loss."""
    method = parse_method(name, rank=16, alpha=32.0)
    tokens = data.batch_tokens(32)
    config = TuneConfig(
        method=method,
        rates=learning_rates(method, RATE, ratio=ratio),
        batch_tokens=tokens,
        micro_batch_tokens=tokens,
        max_length=data.max_length,
        steps=steps,
        eval_every=max(1, steps // 2),
        patience=None,
        attention="eager",
        seed=seed,
        checkpoints=CheckpointConfig(every_minutes=None),
    )
    tuned = tune(config, base, base_digest(base), data, folder / f"{name}-{ratio:g}-{seed}")
    assert tuned.best is not None
    return score(tuned.directory, data, asked), tuned.best.loss


def score(model_folder: Path, data: TuneData, asked: int) -> float:
    """Return the share of test questions that are answered right."""
    model, processor = load_model(model_folder)
    stream = Registry().open("digits-vqa:test")
    every = max(1, stream.count() // asked)
    spread = Chosen(stream, "test", tuple(range(0, every * asked, every)))
    answered = answer_stream(model, processor, spread, limit=asked, batch_size=64)
    return mean(float(exact_match(one.said, one.wanted)) for one in answered)


if __name__ == "__main__":
    raise SystemExit(main())
