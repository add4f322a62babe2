"""What training on half the data costs or gains: DeltaLoss against all of it, a random half and a clustered half.

The pool is real data with planted faults (see `pool.py`). For every seed, two scorers learn from a trusted part of the
images; one base model, pretrained on captions, is then tuned on each selection for the same number of epochs, so half
the data is half the training.

python benchmarks/curation/quality.py              # seeds 0, 1, 2
python benchmarks/curation/quality.py --quick      # one seed, a small pool
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq
from bench_result import Claim, claim, write_result
from curation.pool import Pool, PoolSizes, build_pool
from transformers import PreTrainedTokenizerBase

from nvila.assembly import load_model
from nvila.data.media import ImageTable
from nvila.data.records import Sample
from nvila.data.tensors import PixelCache
from nvila.data.tokenizers import build_word_tokenizer
from nvila.evaluation.answering import answer_questions
from nvila.evaluation.scores import exact_match
from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.training.run import train

RATE = 0.5
METHODS = ("all", "deltaloss", "random", "cluster")
IMAGE_SIZE = 64
MAX_LENGTH = 128
BATCH = 32


def main() -> int:
    """Run the seeds, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a small pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; give each OMP_NUM_THREADS of its own")
    args = parser.parse_args()
    seeds = args.seeds[:1] if args.quick else args.seeds
    sizes = PoolSizes(images=(900, 350), test_questions=300) if args.quick else PoolSizes()
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for run in pool.map(partial(run_seed, sizes=sizes), seeds):
            runs.append(run)
            name = "curation-quality-quick" if args.quick else "curation-quality"
            # After every run, so that an interrupted benchmark leaves what it measured.
            path = write_result(name, claims(runs), {"rate": RATE, "runs": runs})
    print(f"written: {path}")
    return 0


def run_seed(seed: int, sizes: PoolSizes) -> dict[str, Any]:
    """Measure one seed in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder:
        return measure(seed, sizes, Path(folder))


def measure(seed: int, sizes: PoolSizes, folder: Path) -> dict[str, Any]:
    """Score the pool of a seed, select in every way, tune on each selection, and evaluate."""
    started = time.monotonic()
    pool = build_pool(sizes, seed)
    bench = _Bench(pool, seed, folder)
    base = bench.fit("base", LARGE, {"text": pool.text, "captions": pool.captions}, PRETRAINING)
    large = bench.fit("large", LARGE, {"reference": pool.reference}, [scorer_stage(len(pool.reference))], base)
    small = bench.fit("small", SMALL, {"captions": pool.captions, "reference": pool.reference}, SMALL_STAGES)
    data = pool.write(folder / "data")
    run: dict[str, Any] = {"seed": seed, "pool": len(pool.samples), "methods": {}}
    run["scorers"] = {"small": bench.accuracy(small), "large": bench.accuracy(large)}
    for method in METHODS:
        chosen = pool.samples if method == "all" else select(pool, data, small, large, method, seed, folder)
        tuned = bench.fit(f"tuned-{method}", LARGE, {"pool": chosen}, [tuning_stage(len(chosen))], base)
        run["methods"][method] = {
            "kept": len(chosen),
            "accuracy": bench.accuracy(tuned),
            "ignored_bad_labels": _ignored(pool.mislabelled, chosen),
            "ignored_copies": _ignored(pool.redundant, chosen),
        }
        print(f"seed {seed} {method}: {run['methods'][method]}", flush=True)
    run["seconds"] = round(time.monotonic() - started, 1)
    return run


def select(pool: Pool, data: Path, small: Path, large: Path, method: str, seed: int, folder: Path) -> list[Sample]:
    """Run `nvila curate` as anybody would and return the samples that it kept; scores are made once."""
    out = folder / "curated"
    command = [str(Path(sys.executable).with_name("nvila")), "curate", str(data), "--out", str(out)]
    command += ["--small", str(small), "--large", str(large), "--keep-rate", str(RATE)]
    command += ["--method", method, "--workspace", str(folder / "workspace")]
    command += [] if method == "deltaloss" else ["--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-2000:]}\n{' '.join(command)} failed with {done.returncode}")
    table = pq.read_table(out / "selection.parquet", columns=["id", "kept"])
    kept = {name for name, keep in zip(table["id"].to_pylist(), table["kept"].to_pylist(), strict=True) if keep}
    return [sample for sample in pool.samples if sample.id in kept]


class _Bench:
    """One seed's data and the few things that are done with it."""

    def __init__(self, pool: Pool, seed: int, folder: Path) -> None:
        self._pool, self._seed, self._folder = pool, seed, folder
        texts = [message.text for sample in pool.text for message in sample.messages]
        self._tokenizer: PreTrainedTokenizerBase = build_word_tokenizer(texts, model_max_length=MAX_LENGTH)
        everything = [*pool.captions, *pool.reference, *pool.samples, *pool.test]
        keys = dict.fromkeys(key for sample in everything for key in sample.images)
        self._images = ImageTable({key: pool.media[key].read() for key in keys}, "the pool")
        self._pixels = PixelCache.build(self._images, list(keys), IMAGE_SIZE)

    def fit(
        self,
        name: str,
        model: ModelConfig,
        datasets: dict[str, Sequence[Sample]],
        stages: Sequence[StageConfig],
        start: Path | None = None,
    ) -> Path:
        """Train stages, after another model's where `start` is given, and return the model's folder."""
        out = self._folder / name
        if start is not None:
            # A stage whose folder exists is finished, so training goes on from that model.
            shutil.copytree(start, out / "1-start")
            stages = [replace(stages[0], name="start"), *stages]
        config = TrainConfig(
            model=model, stages=tuple(stages), backend="torch", attention="eager", betas=(0.9, 0.98), seed=self._seed
        )
        return train(config, datasets, self._images, self._tokenizer, out, pixels=self._pixels)

    def accuracy(self, path: Path) -> float:
        """Share of right answers on the clean test questions."""
        model, processor = load_model(path)
        answers = answer_questions(model, processor, self._pool.test, self._pixels)
        right = [exact_match(text, sample.answer) for text, sample in zip(answers, self._pool.test, strict=True)]
        return round(fmean(right), 4)


def _ignored(planted: frozenset[str], chosen: Sequence[Sample]) -> float:
    return round(1 - sum(sample.id in planted for sample in chosen) / len(planted), 4)


def claims(runs: list[dict[str, Any]]) -> list[Claim]:
    """Turn runs into claims: ratios of accuracies, seed by seed."""

    def column(method: str, field: str) -> list[float]:
        return [run["methods"][method][field] for run in runs]

    found = []
    for other, goal in (("all", 1.0), ("random", 1.0), ("cluster", 1.0)):
        pairs = zip(column("deltaloss", "accuracy"), column(other, "accuracy"), strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        text = "all of the data" if other == "all" else f"a {other} half"
        met = min(ratios) >= goal if other == "all" else min(ratios) > goal
        found.append(
            claim(
                f"deltaloss-{other}",
                f"accuracy after training on the DeltaLoss half, over {text}",
                ratios,
                "at least 1.0 with every seed" if other == "all" else "above 1.0 with every seed",
                met,
                "accuracies: "
                + "; ".join(
                    f"{name} " + " ".join(f"{value:.3f}" for value in column(name, "accuracy"))
                    for name in runs[0]["methods"]
                ),
            )
        )
    found.append(
        claim(
            "bad-labels",
            "share of planted bad labels among what DeltaLoss ignores",
            column("deltaloss", "ignored_bad_labels"),
            "reported",
            True,
            "a random half ignores 0.5",
        )
    )
    return found


def _tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "vision_use_head": False,
    }


def _decoder(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "max_position_embeddings": 256,
    }


def _model(tower: tuple[int, int], decoder: tuple[int, int]) -> ModelConfig:
    return ModelConfig(
        vision=_tower(*tower),
        language=_decoder(*decoder),
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=MAX_LENGTH,
    )


def _stage(name: str, data: str, steps: int, **options: Any) -> StageConfig:
    defaults: dict[str, Any] = {"images_per_step": BATCH, "samples_per_image": 1, "warmup_steps": 20}
    return StageConfig(name=name, data=data, steps=steps, **(defaults | {"schedule": "cosine"} | options))


EVERYTHING = {"vision": 3e-4, "projector": 1e-3, "language": 1e-3}
LARGE = _model((64, 3), (96, 2))
SMALL = _model((32, 2), (32, 1))
PRETRAINING = [
    _stage("text", "text", 60, lr={"language": 2e-3}),
    _stage("vision", "captions", 500, lr={"vision": 3e-3, "projector": 3e-3, "language": 5e-4}, max_shift_pixels=3),
]
SMALL_STAGES = [
    _stage("vision", "captions", 60, lr={"vision": 3e-3, "projector": 3e-3, "language": 3e-3}),
    _stage("reference", "reference", 100, lr={"vision": 1e-3, "projector": 2e-3, "language": 2e-3}),
]


def scorer_stage(num_samples: int, epochs: float = 8) -> StageConfig:
    """Stage that teaches the large scorer the trusted samples."""
    return _stage("reference", "reference", round(epochs * num_samples / BATCH), lr=EVERYTHING)


def tuning_stage(num_samples: int, epochs: float = 6) -> StageConfig:
    """Stage that tunes the base model on a selection; steps follow its size."""
    return _stage("instruct", "pool", round(epochs * num_samples / BATCH), lr=EVERYTHING, max_shift_pixels=2)


if __name__ == "__main__":
    raise SystemExit(main())
