"""What quantization costs a trained tiny model: answers to the whole easy-VQA test set, paired, and errors of layers.

Every scheme is applied to the same trained model in one process: rounded to nearest, and calibrated on samples of the
training split (SmoothQuant, AWQ). Answers are compared one by one with those of the wide model. A second part plants
outlier channels behind the norms of the decoder, in a way that changes nothing for the wide model, and compares the
errors of rounding with those of AWQ and SmoothQuant over several seeds.

python benchmarks/inference/quantize_accuracy.py                    # trains the quickstart recipe, or finds it trained
python benchmarks/inference/quantize_accuracy.py --model M --data D # a trained model folder, and its data artifact
python benchmarks/inference/quantize_accuracy.py --quick            # the fast recipe, 1,000 questions
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

SEEDS = (0, 1, 2)
SCHEMES: tuple[tuple[str, str, str], ...] = (
    ("w8a8 tower", "w8a8", "none"),
    ("w4a16 decoder", "none", "w4a16"),
    ("w8a8 + w4a16", "w8a8", "w4a16"),
    ("int8 both", "int8", "int8"),
    ("fp8 both", "fp8", "fp8"),
)
GROUP = 32


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fast recipe, 1,000 questions")
    parser.add_argument("--model", type=Path, help="trained model folder")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl, test.jsonl and images.parquet")
    parser.add_argument("--workspace", type=Path, default=Path("nvila-workspace"), help="where a model is trained")
    args = parser.parse_args()
    import torch

    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data belong together")
    folder, data = (args.model, args.data) if args.model else trained(args.workspace, quick=args.quick)
    rows = accuracies(folder, data, 1000 if args.quick else None)
    planted = [planted_errors(folder, data, seed) for seed in (SEEDS[:1] if args.quick else SEEDS)]
    name = "inference-quantize-accuracy-quick" if args.quick else "inference-quantize-accuracy"
    details = {"rows": rows, "planted": planted, "model": "quickstart" if not args.quick else "fast"}
    print(f"written: {write_result(name, claims(rows, planted), details)}")
    return 0


def trained(workspace: Path, *, quick: bool) -> tuple[Path, Path]:
    """Return the model of a recipe and its data; trains what is not trained yet."""
    from nvila_pipelines.lifecycle import run_until
    from nvila_pipelines.recipe import load_recipe
    from nvila_platform.settings import Settings
    from nvila_platform.store import open_store
    from nvila_platform.telemetry import ProgressView

    settings, recipe = Settings.load(workspace), load_recipe("fast" if quick else "quickstart")
    with ProgressView(format=settings.log_format) as view:
        refs = [run_until(recipe, settings, step, view=view) for step in ("train", "data")]
    store = open_store(settings)
    return store.fetch(refs[0]) / "model", store.fetch(refs[1])


def samples_of(data: Path, split: str, count: int | None) -> Any:
    """Return a split, or some of it."""
    from nvila.data.readers.opening import DatasetSpec, open_dataset
    from nvila.quantization.samples import SampleSet, split_samples

    stream = open_dataset(DatasetSpec(path=str(data / f"{split}.jsonl")))
    if count is None:
        return SampleSet(stream=stream, spans=((0, stream.count()),))
    return split_samples(stream, calibrate=count, measure=1)[0]


def accuracies(folder: Path, data: Path, questions: int | None) -> list[dict[str, Any]]:
    """Answer the test questions with every form of the model."""
    from nvila.assembly import load_model
    from nvila.curation.nvila_scorer import NvilaScorer
    from nvila.evaluation.statistics import compare_paired
    from nvila.quantization.config import QuantizationConfig
    from nvila.quantization.quantize import quantize_model
    from nvila.quantization.run import Measuring, part_sizes, quantize_part
    from nvila.quantization.samples import mark_answers

    calibration, test = samples_of(data, "train", 128), samples_of(data, "test", questions)
    model, processor = load_model(folder)
    wide = [float(mark.exact) for mark in mark_answers(NvilaScorer(model, processor), test)]
    sizes = part_sizes(model)["total"]
    rows: list[dict[str, Any]] = [{"form": "wide", "accuracy": sum(wide) / len(wide), "bytes": sizes}]
    print(f"wide: {100 * rows[0]['accuracy']:.2f}% of {len(wide):,} questions", flush=True)
    for name, vision, language in SCHEMES:
        config = QuantizationConfig(vision=vision, language=language, group_size=GROUP)  # type: ignore[arg-type]  # names of schemes
        for how in ("rounded", "calibrated"):
            if how == "calibrated" and "w" not in (vision + language).replace("none", ""):
                continue
            model, processor = load_model(folder)
            scorer = NvilaScorer(model, processor)
            errors: list[float] = []
            if how == "rounded":
                quantize_model(model, config)
            else:
                for part in ("vision", "language"):
                    if config.scheme(part) != "none":
                        layers = quantize_part(scorer, part, config, Measuring(calibration=calibration))
                        errors += [layer.error / layer.rounded for layer in layers]
            marks = mark_answers(scorer, test)
            paired = compare_paired(wide, [float(mark.exact) for mark in marks], seed=0)
            rows.append(
                {
                    "form": f"{name}, {how}",
                    "accuracy": sum(mark.exact for mark in marks) / len(marks),
                    "nll": sum(mark.nll for mark in marks) / sum(mark.num_tokens for mark in marks),
                    "bytes": part_sizes(model)["total"],
                    "lost": -100 * paired.difference,
                    "low": -100 * paired.high,
                    "high": -100 * paired.low,
                    "p_value": paired.p_value,
                    "test": paired.test,
                    "better": paired.better,
                    "worse": paired.worse,
                    "error_against_rounding": errors,
                }
            )
            row = rows[-1]
            print(
                f"{row['form']}: loses {row['lost']:.3f} points ({row['low']:.3f} to {row['high']:.3f}), p "
                f"{row['p_value']:.3f}, {row['bytes']:,} bytes",
                flush=True,
            )
    return rows


def planted_errors(folder: Path, data: Path, seed: int) -> dict[str, float]:
    """Plant outlier channels behind the norms, and compare the mean layer error of rounding and of calibration."""
    import torch

    from nvila.assembly import load_model
    from nvila.curation.nvila_scorer import NvilaScorer
    from nvila.quantization.config import QuantizationConfig
    from nvila.quantization.folding import apply_fold, folds_of
    from nvila.quantization.run import Measuring, quantize_part

    model, processor = load_model(folder)
    noise = torch.Generator().manual_seed(seed)
    for blocks in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for block in blocks:
            for fold in folds_of(block):
                if "norm" in fold.before:
                    width = block.get_submodule(fold.before).weight.shape[0]
                    scale = torch.ones(width)
                    scale[torch.randperm(width, generator=noise)[: width // 16]] = 1 / 50
                    apply_fold(block, fold, scale)
    scorer = NvilaScorer(model, processor)
    config = QuantizationConfig(group_size=GROUP)
    measuring = Measuring(calibration=samples_of(data, "train", 128))
    found = {}
    for part in ("vision", "language"):
        layers = quantize_part(scorer, part, config, measuring)
        behind = [one for one in layers if one.folded]
        found[part] = sum(one.rounded for one in behind) / sum(one.error for one in behind)
    print(f"planted, seed {seed}: rounding has {found['language']:.2f}x the error of AWQ", flush=True)
    return found


def claims(rows: Sequence[dict[str, Any]], planted: Sequence[dict[str, float]]) -> list[Claim]:
    """Say what was lost, and what calibration saves."""
    found = []
    for row in rows[1:]:
        both = row["form"] == "w8a8 + w4a16, calibrated"
        notes = f"{row['test']}: {row['worse']} answers became wrong, {row['better']} right, p = {row['p_value']:.3f}"
        found.append(
            claim(
                row["form"].replace(",", "").replace(" + ", "-").replace(" ", "-"),
                f"points of accuracy lost on the easy-VQA test set, {row['form']}; the range is the 95% interval",
                [row["low"], row["lost"], row["high"]],
                "at most 1, its interval too" if both else "reported",
                not both or row["high"] <= 1,
                notes,
            )
        )
    for part, method in (("language", "AWQ"), ("vision", "SmoothQuant")):
        values = [one[part] for one in planted]
        what = f"layer error of rounding to nearest over that of {method}, {part} part with planted outlier channels"
        notes = "every sixteenth channel behind each norm is 50 times larger; range over seeds"
        found.append(claim(f"planted-{part}", what, values, "above 1", min(values) > 1, notes))
    for row in rows:
        if row.get("error_against_rounding"):
            ratios = [1 / value for value in row["error_against_rounding"]]
            form = row["form"].removesuffix(", calibrated")
            what = f"error of a layer rounded to nearest over that of the calibrated one, {form}; range over layers"
            id = f"layers-{form.replace(' + ', '-').replace(' ', '-')}"
            found.append(claim(id, what, ratios, "reported", True))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
