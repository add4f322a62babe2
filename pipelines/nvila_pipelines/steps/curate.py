"""DeltaLoss curation: train two scorers on a part of the data, score everything, keep the best of every source."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila_pipelines.steps.context import StepContext

Scorer = Literal["small", "large"]

if TYPE_CHECKING:
    from nvila.curation.scoring import AnswerScore
    from nvila.data.media import ImageTable
    from nvila.data.records import Sample
    from nvila.data.tensors import PixelCache

SCORERS: tuple[Scorer, ...] = ("small", "large")


def run(context: StepContext) -> dict[str, float]:
    """Score the training split and select from it.

    Outputs: `scores.parquet`, `selection.parquet`, `selected.jsonl`.
    """
    from nvila.curation.selection import centre, delta_losses, round_to, select_top
    from nvila.data.dataset import IMAGES_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.records import write_jsonl
    from nvila.data.tensors import PixelCache

    config, data = context.recipe.curate, context.inputs["data"]
    samples = load_samples(data, "train")
    images = ImageTable.open(data / IMAGES_FILE)
    keys = [key for sample in samples for key in sample.images]
    scores: dict[Scorer, list[AnswerScore]] = {}
    caches: dict[int, PixelCache] = {}
    for scorer in SCORERS:
        size = context.recipe.scorer_config(scorer).model.vision["image_size"]
        caches[size] = caches.get(size) or PixelCache.build(images, keys, size)
        scores[scorer] = _score(context, scorer, samples, images, caches[size])
    deltas = delta_losses(scores["small"], scores["large"], config.normalize)
    ranks = deltas
    if config.centre == "answer":
        ranks = centre(deltas, [(sample.source, sample.question, sample.answer) for sample in samples])
    ranks = round_to(ranks, config.resolution)
    kept = select_top(ranks, [sample.source for sample in samples], config.keep_rate)
    _write_tables(context.out_dir, samples, scores, deltas, ranks, kept)
    selected = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
    write_jsonl(context.out_dir / "selected.jsonl", selected)
    return {
        "scored": float(len(samples)),
        "kept": float(len(selected)),
        **{f"nll_{scorer}": sum(score.nll for score in scores[scorer]) / len(samples) for scorer in SCORERS},
    }


def scorer_subset(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """Return all samples of a random share of the images."""
    keys = sorted({sample.images for sample in samples})
    chosen = set(random.Random(seed).sample(keys, max(1, round(fraction * len(keys)))))
    return [sample for sample in samples if sample.images in chosen]


def _score(
    context: StepContext, scorer: Scorer, samples: list[Sample], images: ImageTable, pixels: PixelCache
) -> list[AnswerScore]:
    """Train one scorer and score all samples with it."""
    from nvila.assembly import load_model
    from nvila.curation.scoring import score_answers
    from nvila.data.conversation import ConversationEncoder
    from nvila.data.dataset import load_samples
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.progress import PrefixedReporter
    from nvila.training.run import train

    recipe, data = context.recipe, context.inputs["data"]
    config = recipe.scorer_config(scorer)
    subset = scorer_subset(samples, recipe.curate.fraction, recipe.seed)
    chosen = {sample.images for sample in subset}
    datasets = {
        "selected": subset,
        "captions": [sample for sample in load_samples(data, "captions") if sample.images in chosen],
        "text": load_samples(data, "text"),
    }
    tokenizer = build_word_tokenizer(texts(datasets["text"]), model_max_length=config.model.max_length)
    folder = context.out_dir / ".scorers" / scorer
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(
        train(config, datasets, images, tokenizer, folder, PrefixedReporter(context.reporter, scorer), pixels=pixels)
    )
    encoder = ConversationEncoder(tokenizer, processor.num_image_tokens, config.model.max_length)
    return score_answers(model, encoder, samples, pixels, reporter=context.reporter, phase=f"{scorer} score")


def texts(samples: Sequence[Sample]) -> list[str]:
    """Return every text of the samples, for the tokenizer's vocabulary."""
    return [message.text for sample in samples for message in sample.messages]


def _write_tables(
    out: Path,
    samples: Sequence[Sample],
    scores: dict[Scorer, list[AnswerScore]],
    deltas: Sequence[float],
    ranks: Sequence[float],
    kept: Sequence[bool],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    identity = {"id": [sample.id for sample in samples], "source": [sample.source for sample in samples]}
    table = {
        **identity,
        "nll_small": [score.nll for score in scores["small"]],
        "nll_large": [score.nll for score in scores["large"]],
        "delta": list(deltas),
        "num_answer_tokens": [score.num_tokens for score in scores["large"]],
    }
    pq.write_table(pa.table(table), out / "scores.parquet")
    pq.write_table(pa.table({**identity, "delta": list(ranks), "kept": list(kept)}), out / "selection.parquet")
