"""The easy-VQA data set: 5,000 small images of one coloured shape, 48,248 questions with one-word answers.

The package `easy-vqa` carries the images, so nothing is downloaded. The source of a question is its kind, which is
also what curation and the evaluation tables group by.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nvila.data.records import Sample, vqa_sample
from nvila.errors import CapabilityError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("open_shape", "open_color", "yes_no_shape", "yes_no_color")
CAPTION_PROMPT = "describe the image."

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
# One fixed validation split, so that settings chosen on it stay comparable between seeds of the training.
SPLIT_SEED = 0


def question_kind(question: str) -> str:
    """Return which of the four `KINDS` a question is.

    Example:
        >>> question_kind("is there a red shape?")
        'yes_no_color'
    """
    if question.startswith("what"):
        return "open_color" if "color" in question else "open_shape"
    return "yes_no_color" if any(color in question.split() for color in COLORS) else "yes_no_shape"


def questions(split: Split) -> Iterator[Sample]:
    """Yield every question of a split in the package's order; images are keyed `<split>/<image id>`."""
    package = _package()
    read = package.get_train_questions if split == "train" else package.get_test_questions
    for number, (question, answer, image) in enumerate(zip(*read(), strict=True)):
        yield vqa_sample(
            id=f"{split}-{number:05d}",
            source=question_kind(question),
            image=f"{split}/{image}",
            question=question,
            answer=answer,
        )


def image_files(split: Split) -> Iterator[tuple[str, Path]]:
    """Yield (key, file) of every image of a split."""
    package = _package()
    read = package.get_train_image_paths if split == "train" else package.get_test_image_paths
    for image, path in read().items():
        yield f"{split}/{image}", Path(path)


def captions(samples: list[Sample]) -> Iterator[Sample]:
    """Derive a caption such as "a blue rectangle" for every image whose questions give both words away."""
    known: dict[str, dict[str, str]] = {}
    for sample in samples:
        known.setdefault(sample.images[0], {}).update(_facts(sample))
    for key, facts in known.items():
        if {"shape", "color"} <= facts.keys():
            yield vqa_sample(
                id=f"caption-{key}",
                source="caption",
                image=key,
                question=CAPTION_PROMPT,
                answer=f"a {facts['color']} {facts['shape']}",
            )


def text_only(samples: list[Sample]) -> Iterator[Sample]:
    """Drop the images: every distinct pair of question and answer once, to learn how language goes here."""
    first = {(sample.question, sample.answer): sample for sample in reversed(samples)}
    for sample in sorted(first.values(), key=lambda sample: sample.id):
        yield vqa_sample(
            id=f"text-{sample.id}", source="text", image=None, question=sample.question, answer=sample.answer
        )


def split_validation(samples: list[Sample], num_images: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out all questions of `num_images` random images; return (training, validation)."""
    keys = sorted({sample.images[0] for sample in samples})
    held = set(random.Random(seed).sample(keys, num_images))
    return (
        [sample for sample in samples if sample.images[0] not in held],
        [sample for sample in samples if sample.images[0] in held],
    )


def _facts(sample: Sample) -> dict[str, str]:
    """Read colour and shape off one question and its answer; a denied word says nothing."""
    answer, words = sample.answer, sample.question.rstrip("?").split()
    if sample.source == "open_color":
        return {"color": answer}
    if sample.source == "open_shape":
        return {"shape": answer}
    denied = bool({"no", "not"} & set(words))
    if (answer == "yes") == denied:
        return {}
    return {("color" if word in COLORS else "shape"): word for word in words if word in COLORS + SHAPES}


def _package():  # type: ignore[no-untyped-def]  # the package has no types
    try:
        import easy_vqa
    except ImportError as e:
        raise CapabilityError("the package easy-vqa is not installed", "pip install 'nvila[quickstart]'") from e
    return easy_vqa
