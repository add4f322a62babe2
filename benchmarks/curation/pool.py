"""A pool of real questions with known faults, to see what a selection keeps of it.

easy-VQA and scikit-learn's handwritten digits as questions. A part of the answers is replaced by another answer of the
same kind (mislabelled), and a few samples are there many times over (redundant). A part of the images never enters the
pool: it is what the scorers learn from, as a data set that somebody trusts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nvila.data import easy_vqa
from nvila.data.builtin import open_builtin
from nvila.data.digits_vqa import WORDS
from nvila.data.readers.record import MediaSource
from nvila.data.records import Message, Part, Sample, vqa_sample, write_jsonl

SETS = ("easy-vqa", "digits-vqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """How much of everything.

    Args:
        images: Images of each set, reference part included.
        reference: Share of the images that the scorers learn from.
        questions: Questions of every image.
        mislabelled: Share of the pool with a wrong answer.
        redundant: Share of the pool that are copies.
        copies: How often a copied sample is there.
        test_questions: Of each of the two sets.
    """

    images: tuple[int, int] = (3600, 1400)
    reference: float = 0.2
    questions: int = 3
    mislabelled: float = 0.3
    redundant: float = 0.2
    copies: int = 20
    test_questions: int = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What the experiment works on; `mislabelled` and `redundant` are the ids of the planted samples."""

    samples: list[Sample]
    reference: list[Sample]
    captions: list[Sample]
    text: list[Sample]
    test: list[Sample]
    mislabelled: frozenset[str]
    redundant: frozenset[str]
    media: Mapping[str, MediaSource]

    def write(self, folder: Path) -> Path:
        """Write the pool as a data set that anybody could have: JSON lines beside a folder of images."""
        for key in {key for sample in self.samples for key in sample.images}:
            path = folder / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.media[key].read())
        write_jsonl(folder / "pool.jsonl", (_with_files(sample) for sample in self.samples))
        return folder / "pool.jsonl"


def build_pool(sizes: PoolSizes, seed: int) -> Pool:
    """Build the pool of a seed."""
    draw = random.Random(seed)
    media: dict[str, MediaSource] = {}
    train, test = [], []
    for name, num_images in zip(SETS, sizes.images, strict=True):
        train += _of_images(_read(name, media), num_images, sizes.questions, draw)
        test += _some(_read(f"{name}:test", media), sizes.test_questions, draw)
    samples, reference = _split(train, sizes.reference, draw)
    captions = _captions({key for sample in train for key in sample.images})
    samples, mislabelled = _mislabel(samples, sizes.mislabelled, draw)
    samples, redundant = _copy(samples, mislabelled, sizes, draw)
    draw.shuffle(samples)
    return Pool(
        samples=samples,
        reference=reference,
        captions=captions,
        text=list(easy_vqa.text_only([*captions, *reference, *samples])),
        test=test,
        mislabelled=mislabelled,
        redundant=redundant,
        media=media,
    )


def _read(name: str, media: dict[str, MediaSource]) -> list[Sample]:
    samples = []
    for record in open_builtin(name).records():
        assert record.sample is not None
        samples.append(replace(record.sample, id=f"{name}-{record.sample.id}"))
        media.update(record.media)
    return samples


def _captions(keys: set[str]) -> list[Sample]:
    """Say of every image what is on it, where its questions give that away."""
    easy = [sample for sample in _read("easy-vqa", {}) if sample.images[0] in keys]
    digits = [sample for sample in _read("digits-vqa", {}) if sample.source == "open_digit"]
    return [
        *easy_vqa.captions(easy),
        *(
            vqa_sample(
                id=f"caption-{sample.images[0]}",
                source="caption",
                image=sample.images[0],
                question=easy_vqa.CAPTION_PROMPT,
                answer=f"a {sample.answer}",
            )
            for sample in digits
            if sample.images[0] in keys and sample.answer in WORDS
        ),
    ]


def _of_images(samples: Sequence[Sample], num_images: int, questions: int, draw: random.Random) -> list[Sample]:
    """Keep `questions` random samples of `num_images` random images."""
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.images[0], []).append(sample)
    chosen = draw.sample(sorted(by_image), min(num_images, len(by_image)))
    return [sample for key in chosen for sample in _some(by_image[key], questions, draw)]


def _split(samples: Sequence[Sample], share: float, draw: random.Random) -> tuple[list[Sample], list[Sample]]:
    keys = sorted({sample.images[0] for sample in samples})
    held = set(draw.sample(keys, round(share * len(keys))))
    return (
        [sample for sample in samples if sample.images[0] not in held],
        [sample for sample in samples if sample.images[0] in held],
    )


def _mislabel(samples: Sequence[Sample], share: float, draw: random.Random) -> tuple[list[Sample], frozenset[str]]:
    """Give a share of the samples another answer of their source."""
    answers: dict[str, list[str]] = {}
    for sample in samples:
        if sample.answer not in answers.setdefault(sample.source, []):
            answers[sample.source].append(sample.answer)
    wrong = frozenset(sample.id for sample in draw.sample(list(samples), round(share * len(samples))))
    changed = [
        _answered(sample, draw.choice(sorted(set(answers[sample.source]) - {sample.answer})))
        if sample.id in wrong
        else sample
        for sample in samples
    ]
    return changed, wrong


def _copy(
    samples: list[Sample], wrong: frozenset[str], sizes: PoolSizes, draw: random.Random
) -> tuple[list[Sample], frozenset[str]]:
    """Replace a share of the right samples by copies of a few others."""
    right = [sample for sample in samples if sample.id not in wrong]
    count = round(sizes.redundant * len(samples))
    gone = {sample.id for sample in draw.sample(right, count)}
    originals = draw.sample([sample for sample in right if sample.id not in gone], max(1, count // sizes.copies))
    copies = [replace(originals[number % len(originals)], id=f"copy-{number}") for number in range(count)]
    return [sample for sample in samples if sample.id not in gone] + copies, frozenset(one.id for one in copies)


def _answered(sample: Sample, answer: str) -> Sample:
    last = Message(role="assistant", content=(Part(type="text", value=answer),))
    return replace(sample, messages=(*sample.messages[:-1], last))


def _with_files(sample: Sample) -> Sample:
    def named(part: Part) -> Part:
        return part if part.type == "text" else replace(part, value=f"{part.value}.png")

    messages = [replace(message, content=tuple(map(named, message.content))) for message in sample.messages]
    return replace(sample, messages=tuple(messages))


def _some(samples: Sequence[Sample], count: int, draw: random.Random) -> list[Sample]:
    return draw.sample(list(samples), min(count, len(samples)))
