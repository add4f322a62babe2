"""Training speed against transformers' Trainer with its LLaVA class, at equal loss.

Both train the same parts from the same weights on the same samples: questions about real easy-VQA pictures, whole
dialogues about one, and long texts. A step holds as many tokens on average in both, in fp32, with AdamW over all
parameters. The Trainer draws samples at random and pads them to the longest, as it does by default; it is timed once
more with `train_sampling_strategy="group_by_length"`. Its samples are tokenised and its pictures decoded beforehand.
NVILA reads its samples from a folder, decodes and tokenises them while it trains, joins them without padding and makes
logits of supervised positions only. The head has the share of the decoder's parameters that Qwen2.5-1.5B's has.

Repeats alternate. The losses of both on the same held-out samples are compared before, between and after them.

Trainer needs accelerate: pip install -c constraints.txt "nvila[device-map]".

python benchmarks/training/against_trainer.py
python benchmarks/training/against_trainer.py --quick
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from torch import Tensor, nn
from training.mixed_data import questions, write_data
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nvila.configuration import NVILAConfig
from nvila.data.collation import collate
from nvila.data.conversation import Encoded
from nvila.data.feeding import BatchFeed
from nvila.data.mixtures import Registry
from nvila.data.stage_data import StageData, open_stage_data
from nvila.data.token_budget import TokenBudget
from nvila.data.tokenizers import build_word_tokenizer, token_id
from nvila.losses import IGNORE_INDEX
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.training.loop import model_inputs
from nvila.training.run import set_attention

GOAL = 1.8
MAX_LENGTH = 512
LEARNING_RATE = 1e-3
VOCABULARY = 1024
HELD_OUT = 32
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "vision_use_head": False,
}
LANGUAGE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
}
# LLaVA's projector names by ours.
PROJECTOR = {"layers.0": "linear_1", "layers.2": "linear_2"}


@dataclass(slots=True)
class Timing:
    """What a contestant did in one repeat."""

    samples: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Samples a second of wall time."""
        return self.samples / self.seconds


@dataclass(slots=True)
class Contest:
    """Both contestants and the figures of their repeats."""

    repeats: dict[str, list[Timing]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, ours: str, theirs: str, *, processor: bool = False) -> list[float]:
        """How many times as many samples a second, repeat by repeat."""
        pairs = zip(self.repeats[ours], self.repeats[theirs], strict=True)
        if processor:
            return [a.samples / a.processor_seconds * b.processor_seconds / b.samples for a, b in pairs]
        return [a.speed / b.speed for a, b in pairs]


def main() -> int:
    """Run, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repeats")
    parser.add_argument("--samples-per-step", type=int, default=8, help="samples of a Trainer step")
    args = parser.parse_args()
    repeats, steps = (2, 3) if args.quick else (5, 25)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder:
        contest, details = run(Path(folder), args.samples_per_step, repeats, steps, 120 if args.quick else 2000)
    claims = conclude(contest)
    for one in claims:
        print(f"{one.id}: {one.ratio:.4g} ({one.low:.4g} to {one.high:.4g}), goal {one.goal}, met {one.met}")
    if not args.quick:
        print(f"written: {write_result('training-against-trainer', claims, details)}")
    return 0


def run(folder: Path, batch: int, repeats: int, steps: int, count: int) -> tuple[Contest, dict[str, Any]]:
    """Time all contestants by turns."""
    tokenizer = build_word_tokenizer((text for q in questions() for text in q), model_max_length=MAX_LENGTH)
    ours, theirs = build_models(tokenizer)
    processor = NVILAProcessor.from_config(cast("NVILAConfig", ours.config), tokenizer)
    write_data(folder / "train", count, seed=0)
    write_data(folder / "held-out", HELD_OUT, seed=1)
    lengths, prepared = prepare(open_feed(folder, "train", processor, 4 * MAX_LENGTH))
    _, held_out = prepare(open_feed(folder, "held-out", processor, 4 * MAX_LENGTH))
    feed = open_feed(folder, "train", processor, equal_budget(folder, processor, batch, lengths))
    grouped = LlavaForConditionalGeneration(theirs.config)
    grouped.load_state_dict(theirs.state_dict())
    contestants: dict[str, tuple[nn.Module, Callable[[], Timing]]] = {
        "nvila": (ours, nvila_steps(ours, feed, tokenizer.pad_token_id, steps)),
        "trainer": (theirs, trainer_steps(theirs, prepared, batch, steps, folder, "random")),
        "trainer-grouped": (grouped, trainer_steps(grouped, prepared, batch, steps, folder, "group_by_length")),
    }
    contest = Contest()
    for name, (model, _) in contestants.items():
        contest.losses[name] = [held_out_loss(model, held_out)]
    for number in range(repeats + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for name in names:
            model, train = contestants[name]
            timing = train()
            if number:  # the first repeat warms up
                contest.repeats.setdefault(name, []).append(timing)
            contest.losses[name].append(held_out_loss(model, held_out))
            print(f"{number} {name}: {timing.speed:.1f} samples/s, loss {contest.losses[name][-1]:.4f}", flush=True)
    feed.close()
    samples = {name: sum(one.samples for one in row) / repeats / steps for name, row in contest.repeats.items()}
    details = {
        "samples_per_step": {name: round(number, 2) for name, number in samples.items()},
        "lengths": {"mean": round(mean(lengths), 1), "median": median(lengths), "longest": max(lengths)},
        "samples_per_trainer_step": batch,
        "steps_per_repeat": steps,
        "samples_per_second": {name: [round(one.speed, 2) for one in row] for name, row in contest.repeats.items()},
        "held_out_loss": {name: [round(loss, 5) for loss in row] for name, row in contest.losses.items()},
        "waited_for_data_s": round(feed.waited_s, 3),
    }
    return contest, details


def conclude(contest: Contest) -> list[Claim]:
    """Turn the figures into claims."""
    speed = contest.ratios("nvila", "trainer")
    processor = contest.ratios("nvila", "trainer", processor=True)
    grouped = contest.ratios("nvila", "trainer-grouped")
    start = abs(contest.losses["nvila"][0] - contest.losses["trainer"][0])
    # Random batches of a small set: the curves cross, so both are compared as a whole.
    curve = [a / b for a, b in zip(contest.losses["nvila"][1:], contest.losses["trainer"][1:], strict=True)]
    note = "Trainer pads samples to the longest; NVILA joins them without padding, with logits of supervised positions"
    return [
        claim("speed", "samples/s over those of Trainer", speed, f"at least {GOAL}", median(speed) >= GOAL, note),
        claim(
            "processor-time",
            "the same by processor time, which a busy machine moves less",
            processor,
            f"at least {GOAL}",
            median(processor) >= GOAL,
        ),
        claim(
            "speed-grouped",
            "samples/s over those of Trainer with group_by_length",
            grouped,
            "reported",
            True,
            "sorting by length saves the padding and makes batches less random",
        ),
        claim(
            "loss-at-start",
            "difference of the losses on the same held-out samples before training",
            [start],
            "at most 0.001",
            start <= 1e-3,
        ),
        claim(
            "loss-after-training",
            "held-out loss over that of Trainer, after each repeat",
            curve,
            "0.9 to 1.1 at the end",
            0.9 <= curve[-1] <= 1.1,
            "as many steps of as many tokens, of other random samples",
        ),
    ]


def equal_budget(folder: Path, processor: NVILAProcessor, batch: int, lengths: Sequence[int]) -> int:
    """Return the token budget with which a step holds as many samples on average as one of the Trainer.

    A step ends before the sample that does not fit, so a budget of `batch` mean lengths would hold fewer.
    """
    wanted = round(batch * mean(lengths))
    feed = open_feed(folder, "train", processor, wanted)
    held = len(lengths) / feed.steps_in(1)
    feed.close()
    return round(wanted * batch / held)


def open_feed(folder: Path, name: str, processor: NVILAProcessor, batch_tokens: int) -> BatchFeed:
    """Open a folder as a training stage does."""
    budget = TokenBudget(
        batch_tokens=batch_tokens, micro_batch_tokens=batch_tokens, max_length=MAX_LENGTH, pack=True, flat=True
    )
    stage = StageData(expression=str(folder / name), budget=budget, max_bad=0.0)
    return open_stage_data(stage, Registry().open(stage.expression), processor, folder / "index")


def build_models(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[NVILAForConditionalGeneration, LlavaForConditionalGeneration]:
    """Build both models with the same weights."""
    torch.manual_seed(0)
    image, video = token_id(tokenizer, "<image>"), token_id(tokenizer, "<vila/video>")
    language = LANGUAGE | {"pad_token_id": tokenizer.pad_token_id}
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=dict(VISION),
            text_config=dict(language),
            image_token_index=image,
            vision_feature_select_strategy="full",
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
    )
    ours = NVILAForConditionalGeneration(
        NVILAConfig(
            vision_config=dict(VISION),
            text_config=dict(language),
            mm_projector_type="mlp2x_gelu",
            image_token_id=image,
            video_token_id=video,
        )
    )
    ours.model.vision_tower.load_state_dict(theirs.model.vision_tower.state_dict())
    ours.model.language_model.load_state_dict(theirs.model.language_model.state_dict())
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
    projector = theirs.model.multi_modal_projector.state_dict()
    renamed = {
        mine + name.removeprefix(other): tensor
        for mine, other in PROJECTOR.items()
        for name, tensor in projector.items()
        if name.startswith(other)
    }
    ours.model.mm_projector.load_state_dict(renamed)
    return ours, theirs


def prepare(feed: BatchFeed) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the lengths of all samples of an epoch, and the samples as the Trainer takes them."""
    prepared = []
    for _ in range(feed.steps_in(1)):
        for micro in next(feed):
            for one in (one for row in micro for one in row):
                prepared.append(plain(one, feed.tensors(one.images, one.videos)))
    feed.close()
    return [len(one["input_ids"]) for one in prepared], prepared


def plain(one: Encoded, media: dict[str, Tensor]) -> dict[str, Any]:
    """One sample as lists and pixels."""
    return {"input_ids": list(one.ids), "labels": list(one.labels), "length": len(one.ids), **media}


def pad(samples: Sequence[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Collate as people do for the Trainer: pad to the longest."""
    longest = max(len(one["input_ids"]) for one in samples)

    def rows(name: str, fill: int) -> Tensor:
        return torch.tensor([one[name] + [fill] * (longest - len(one[name])) for one in samples])

    mask = [[1] * len(one["input_ids"]) + [0] * (longest - len(one["input_ids"])) for one in samples]
    batch = {
        "input_ids": rows("input_ids", pad_token_id),
        "labels": rows("labels", IGNORE_INDEX),
        "attention_mask": torch.tensor(mask),
    }
    pixels = [one["pixel_values"] for one in samples if "pixel_values" in one]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


@torch.no_grad()
def held_out_loss(model: Any, samples: Sequence[dict[str, Any]]) -> float:
    """Mean loss over all supervised tokens of the same samples, in the same batches."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(samples), 8):
        batch = pad(samples[start : start + 8])
        supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(model(**batch).loss) * supervised
        count += supervised
    return total / count


def nvila_steps(
    model: NVILAForConditionalGeneration, feed: BatchFeed, pad_token_id: int, steps: int
) -> Callable[[], Timing]:
    """Return a function that trains for some steps: the training loop without its reports."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    set_attention(model, "sdpa")

    def train() -> Timing:
        model.train()
        timing, begin, processor = Timing(), time.perf_counter(), time.process_time()
        for _ in range(steps):
            micro_batches = next(feed)
            supervised = sum(one.num_supervised for micro in micro_batches for row in micro for one in row)
            for micro in micro_batches:
                batch = collate(micro, pad_token_id)
                loss = model(**model_inputs(batch, feed.tensors(batch.images, batch.videos), flat=True)).loss
                (loss * (batch.num_supervised / supervised)).backward()
                timing.samples += batch.num_samples
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        timing.seconds, timing.processor_seconds = time.perf_counter() - begin, time.process_time() - processor
        return timing

    return train


class _Stopwatch(TrainerCallback):
    """Takes the time from the first step to the last, without what Trainer does before and after."""

    def __init__(self) -> None:
        self.timing = Timing()
        self._begin = self._processor = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin, self._processor = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.timing.seconds = time.perf_counter() - self._begin
        self.timing.processor_seconds = time.process_time() - self._processor


def trainer_steps(
    model: Any, samples: list[dict[str, Any]], batch: int, steps: int, folder: Path, strategy: str
) -> Callable[[], Timing]:
    """Return a function that trains for some steps with Trainer; optimizer state carries over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    turn = iter(range(10**6))

    def train() -> Timing:
        watch = _Stopwatch()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder / "trainer"),
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                train_sampling_strategy=strategy,
                max_grad_norm=1.0,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                remove_unused_columns=False,
                disable_tqdm=True,
                seed=next(turn),
            ),
            train_dataset=samples,
            data_collator=pad,
            optimizers=(optimizer, None),
            callbacks=[watch],
        )
        trainer.train()
        watch.timing.samples = batch * steps
        return watch.timing

    return train


if __name__ == "__main__":
    raise SystemExit(main())
