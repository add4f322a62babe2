"""Answer every question of a split and score the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from nvila.data.records import Sample


def run(context: StepContext) -> dict[str, float]:
    """Evaluate the model of the `model` input.

    Outputs: `results.json`, `predictions.jsonl`.
    """
    from nvila.assembly import load_model
    from nvila.data.dataset import IMAGES_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.tensors import PixelCache
    from nvila.evaluation.answering import answer_questions
    from nvila.evaluation.scores import exact_match

    config, data = context.recipe.evaluate, context.inputs["data"]
    samples = load_samples(data, config.split)
    model, processor = load_model(context.inputs["model"] / "model")
    keys = [key for sample in samples for key in sample.images]
    pixels = PixelCache.build(ImageTable.open(data / IMAGES_FILE), keys, model.config.vision_config.image_size)
    started = time.monotonic()
    predictions = answer_questions(
        model, processor, samples, pixels, batch_size=config.batch_size, reporter=context.reporter
    )
    seconds = time.monotonic() - started
    correct = [exact_match(text, sample.answer) for text, sample in zip(predictions, samples, strict=True)]
    results = {
        "model": context.options["form"],
        "split": config.split,
        "num_samples": len(samples),
        **_scores(samples, correct),
        "baselines": _baselines(load_samples(data, "train"), samples),
    }
    (context.out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    with (context.out_dir / "predictions.jsonl").open("w", encoding="utf-8") as out:
        for sample, prediction, is_right in zip(samples, predictions, correct, strict=True):
            out.write(json.dumps(prediction_line(sample, prediction, is_right)) + "\n")
    # The speed stays out of the files: equal answers must give an equal digest.
    return {"accuracy": results["accuracy"], "samples_per_second": round(len(samples) / seconds, 1)}


def prediction_line(sample: Sample, prediction: str, correct: bool) -> dict[str, Any]:
    """Return one line of a predictions file."""
    return {
        "id": sample.id,
        "source": sample.source,
        "image": sample.images[0] if sample.images else None,
        "question": sample.question,
        "answer": sample.answer,
        "prediction": prediction,
        "correct": correct,
    }


def _scores(samples: Sequence[Sample], correct: Sequence[bool]) -> dict[str, Any]:
    from nvila.evaluation.scores import tally_by_source

    tallies = tally_by_source(samples, correct)
    return {
        "accuracy": sum(correct) / len(samples),
        "by_source": {
            source: {"correct": tally.correct, "total": tally.total, "accuracy": tally.accuracy}
            for source, tally in tallies.items()
        },
    }


def _baselines(train: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, Any]:
    from nvila.evaluation.scores import blind_baselines

    majority, text_majority = blind_baselines(train, samples)
    by_question = _scores(samples, text_majority)
    return {
        "majority": sum(majority) / len(samples),
        "text_majority": by_question["accuracy"],
        "by_source": {source: tally["accuracy"] for source, tally in by_question["by_source"].items()},
    }
