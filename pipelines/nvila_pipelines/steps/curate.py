"""DeltaLoss curation: train two scorers on a part of the data, score everything, keep the best of every source."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila_pipelines.steps.context import StepContext

Scorer = Literal["small", "large"]

if TYPE_CHECKING:
    from nvila.curation.scoring import AnswerScore
    from nvila.curation.selection import Normalize
    from nvila.data.media import ImageTable
    from nvila.data.records import Sample
    from nvila.data.tensors import PixelCache
    from nvila_pipelines.recipe_schema import CurateSection

STEP = "curate"
SCORERS: tuple[Scorer, ...] = ("small", "large")


def run(context: StepContext) -> dict[str, float]:
    """Score the training split and select from it; a recipe without curation keeps all.

    Outputs: `scores.parquet`, `selection.parquet`, `ignore/`, `quarantine.jsonl`, `selected.jsonl`; without curation
    only the last.
    """
    from nvila.curation.choosing import write_selection
    from nvila.data.dataset import IMAGES_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.records import write_jsonl
    from nvila.data.tensors import PixelCache

    config, data = context.recipe.curate, context.inputs["data"]
    if config is None and not (data / IMAGES_FILE).is_file():
        return {"kept": float(write_jsonl(context.out_dir / "selected.jsonl", []))}  # stages read their data themselves
    samples = load_samples(data, "train")
    if config is None:
        return {"kept": float(write_jsonl(context.out_dir / "selected.jsonl", samples))}
    images = ImageTable.open(data / IMAGES_FILE)
    keys = [key for sample in samples for key in sample.images]
    scores: dict[Scorer, list[AnswerScore]] = {}
    caches: dict[int, PixelCache] = {}
    for scorer in SCORERS:
        size = context.recipe.scorer_config(scorer).model.vision["image_size"]
        caches[size] = caches.get(size) or PixelCache.build(images, keys, size)
        scores[scorer] = _score(context, scorer, samples, images, caches[size])
    deltas = _merged_deltas(context.out_dir, samples, scores, config.normalize)
    ranks, kept = _ranked(samples, deltas, config)
    write_selection(context.out_dir, kept, ranks)
    selected = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
    write_jsonl(context.out_dir / "selected.jsonl", selected)
    usable = [index for index, delta in enumerate(deltas) if delta is not None]
    means = {
        f"nll_{scorer}": sum(scores[scorer][index].nll for index in usable) / max(1, len(usable)) for scorer in SCORERS
    }
    return {"scored": float(len(usable)), "kept": float(len(selected)), **means}


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
    assert recipe.curate is not None
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


def _merged_deltas(
    out: Path, samples: Sequence[Sample], scores: Mapping[Scorer, Sequence[AnswerScore]], normalize: Normalize
) -> list[float | None]:
    """Write the scores as any data set's are written, and return delta; None for a sample that has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nvila.curation.merging import SCORES, merge
    from nvila.curation.shards import SCHEMA, Shards

    finite = [all(math.isfinite(scores[scorer][index].nll) for scorer in SCORERS) for index in range(len(samples))]
    columns = {
        "index": list(range(len(samples))),
        "id": [sample.id for sample in samples],
        "source": [sample.source for sample in samples],
        "where": [f"train.jsonl:{number}" for number in range(1, len(samples) + 1)],
        "status": ["ok" if usable else "not_finite" for usable in finite],
        "reason": [None if usable else "a scorer gave no number" for usable in finite],
    }
    for scorer in SCORERS:
        columns[f"nll_{scorer}"] = [score.nll for score in scores[scorer]]
        columns[f"tokens_{scorer}"] = [score.num_tokens for score in scores[scorer]]
    shards = Shards(directory=out / ".shards", size=len(samples) + 1, digest=STEP)
    shards.publish(0, pa.table(columns, schema=SCHEMA))
    merge(shards, out, normalize)
    deltas: list[float | None] = pq.read_table(out / SCORES)["delta"].to_pylist()
    return deltas


def _ranked(
    samples: Sequence[Sample], deltas: Sequence[float | None], config: CurateSection
) -> tuple[list[float | None], list[bool]]:
    """Return what the samples are ranked by, and which are kept; a sample without a delta is not."""
    from nvila.curation.selection import centre, round_to, select_top

    usable = [(index, delta) for index, delta in enumerate(deltas) if delta is not None]
    rows, found = [samples[index] for index, _ in usable], [delta for _, delta in usable]
    if config.centre == "answer":
        found = centre(found, [(sample.source, sample.question, sample.answer) for sample in rows])
    found = round_to(found, config.resolution)
    chosen = select_top(found, [sample.source for sample in rows], config.keep_rate)
    ranks: list[float | None] = [None] * len(samples)
    kept = [False] * len(samples)
    for (index, _), rank, keep in zip(usable, found, chosen, strict=True):
        ranks[index], kept[index] = rank, keep
    return ranks, kept
