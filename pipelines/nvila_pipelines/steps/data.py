"""Bring a data set into the form that every later step reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from nvila.data.easy_vqa import Split
    from nvila.data.records import Sample


def run(context: StepContext) -> dict[str, float]:
    """Write the splits, captions and images of easy-VQA, and generated clips.

    Outputs: `train.jsonl`, `validation.jsonl`, `test.jsonl`, `captions.jsonl`, `text.jsonl`, `images.parquet`; with
    clips also `clips.jsonl` and `videos.parquet`. Without a built-in data set only `registry.json`, which says where
    the data are named that stages read themselves.

    Raises:
        DataError: The registry does not exist.
    """
    if context.recipe.data.dataset is None:
        from nvila_pipelines.training.mixtures import write_registry

        write_registry(context.recipe.data.registry, context.out_dir)
        return {}
    from nvila.data import easy_vqa
    from nvila.data.dataset import IMAGES_FILE
    from nvila.data.media import write_image_table
    from nvila.data.records import write_jsonl

    config, out = context.recipe.data, context.out_dir
    chosen = {split: _image_keys(split, config.max_images) for split in easy_vqa.SPLITS}
    train, validation = easy_vqa.split_validation(
        _questions("train", chosen["train"]), config.validation_images, easy_vqa.SPLIT_SEED
    )
    captions = list(easy_vqa.captions(train))
    # In the package all questions of an image follow each other; shuffled, ties that go by position favour no image.
    random.Random(easy_vqa.SPLIT_SEED).shuffle(train)
    counts = {
        "train": write_jsonl(out / "train.jsonl", train),
        "validation": write_jsonl(out / "validation.jsonl", validation),
        "test": write_jsonl(out / "test.jsonl", _questions("test", chosen["test"])),
        "captions": write_jsonl(out / "captions.jsonl", captions),
        "text": write_jsonl(out / "text.jsonl", easy_vqa.text_only(captions + train)),
    }
    images = [
        (key, path.read_bytes())
        for split in easy_vqa.SPLITS
        for key, path in easy_vqa.image_files(split)
        if key in chosen[split]
    ]
    counts["images"] = write_image_table(out / IMAGES_FILE, images)
    if config.clips:
        counts["clips"] = _write_clips(out, config.clips)
    return {name: float(count) for name, count in counts.items()}


def _write_clips(out: Path, count: int) -> int:
    """Write generated clips and the questions about them."""
    from nvila.data import moving_shapes
    from nvila.data.dataset import VIDEOS_FILE
    from nvila.data.media import write_image_table
    from nvila.data.records import write_jsonl

    write_jsonl(out / "clips.jsonl", [one for number in range(count) for one in moving_shapes.questions(number)])
    return write_image_table(out / VIDEOS_FILE, [(moving_shapes.key(n), moving_shapes.gif(n)) for n in range(count)])


def _image_keys(split: Split, max_images: int | None) -> set[str]:
    """Return the images of a split, or the same random part of them every time."""
    from nvila.data import easy_vqa

    keys = sorted(key for key, _ in easy_vqa.image_files(split))
    if max_images is None or max_images >= len(keys):
        return set(keys)
    return set(random.Random(easy_vqa.SPLIT_SEED).sample(keys, max_images))


def _questions(split: Split, keys: set[str]) -> list[Sample]:
    from nvila.data import easy_vqa

    return [sample for sample in easy_vqa.questions(split) if sample.images[0] in keys]
