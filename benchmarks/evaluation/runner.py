"""What the runner costs over a bare loop of `generate`, what batches win, and whether a resumed run is equal.

The same model answers the same questions, in turns: a bare loop (processor, generate, decode, batch by batch) and the
runner, which also reads rows, hashes, logs every answer and scores. Processor time of one thread is measured, so that
what else runs on the machine counts little. The model is new: what is said does not matter here.

python benchmarks/evaluation/runner.py            # 256 questions, five rounds
python benchmarks/evaluation/runner.py --quick    # 64 questions, two rounds
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result

from nvila.evaluation.answer_log import AnswerLog
from nvila.evaluation.asking import Question
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.registry import find_task
from nvila.evaluation.rows import open_rows
from nvila.evaluation.runner import TaskRun, read_samples, score_all
from nvila.evaluation.task import GenerationSettings

TASK, BATCH = "easy_vqa", 32


def build() -> ModelAnswerer:
    """Make a new model of the shape of the quickstart, four times as wide, so that generating is most of the work."""
    from nvila.assembly import build_model, build_processor
    from nvila.data import easy_vqa
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila_pipelines.recipe import load_recipe

    overrides = ["model.language.hidden_size=512", "model.language.intermediate_size=1024"]
    overrides += ["model.language.num_attention_heads=8"]
    config = load_recipe("quickstart", overrides).train_config().model
    texts = [text for sample in easy_vqa.questions("train") for text in (sample.question, sample.answer)]
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(texts, model_max_length=config.max_length)
    model = build_model(config, tokenizer).eval()
    return ModelAnswerer(model, build_processor(model.config, tokenizer))


class Bench:
    """One model and its questions."""

    def __init__(self, count: int) -> None:
        self.answerer, self.count, self.task = build(), count, find_task(TASK)
        self.rows = open_rows(self.task, None)
        self.settings = GenerationSettings(max_new_tokens=8)
        samples = read_samples(self.task, self.rows, count)
        self.questions = [sample for sample in samples if isinstance(sample, Question)]

    @torch.inference_mode()
    def bare(self, batch_size: int = BATCH) -> None:
        """Ask without a runner."""
        processor, model = self.answerer.processor, self.answerer.model
        for start in range(0, self.count, batch_size):
            block = self.questions[start : start + batch_size]
            conversations = [
                [{"role": "user", "content": [{"type": p.kind, p.kind: p.value} for p in q.pieces]}] for q in block
            ]
            inputs = processor.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[misc]
            processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def run(self, folder: Path, *, limit: int | None = None) -> list[tuple[str, Any]]:
        """Ask with the runner, score, and return answers with their marks."""
        limit = limit or self.count
        log = AnswerLog.open(folder, self.task, "m", {})
        samples = TaskRun(
            task=self.task, rows=self.rows, log=log, load=lambda: self.answerer, batch_size=BATCH, limit=limit
        ).run()
        return [(one.answer, one.marks) for one in score_all(self.task, self.rows, log, samples=samples).scored]


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> int:
    """Run, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions, two rounds")
    args = parser.parse_args()
    count, rounds = (64, 2) if args.quick else (256, 5)
    torch.set_num_threads(1)
    bench = Bench(count)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bench.bare()
        pairs, alone = [], []
        for number in range(rounds):
            plain = seconds(bench.bare)
            pairs.append((plain, seconds(lambda n=number: bench.run(root / str(n)))))  # type: ignore[misc]
            alone.append(seconds(lambda: bench.bare(1)) / plain)
            print(f"round {number}: bare {plain:.2f} s, runner {pairs[-1][1]:.2f} s, one by one x{alone[-1]:.2f}")
        equal = resumed_is_equal(bench, root)
    overhead = [runner / plain for plain, runner in pairs]
    claims = [
        claim(
            "runner-overhead",
            "time of a run with reading, hashing, logging and scoring over that of a bare loop of generate",
            overhead,
            "under 1.05",
            median(overhead) < 1.05,
        ),
        claim(
            "batched",
            f"time of asking one by one over that of batches of {BATCH}, both bare",
            alone,
            "at least 3",
            median(alone) >= 3,
        ),
        claim(
            "resumed-equals-uninterrupted",
            "share of answers and marks that are equal after the log was cut in the middle of a line",
            equal,
            "1",
            min(equal) == 1,
        ),
    ]
    for found in claims:
        print(f"{found.id}: {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}), {found.goal}")
    details = {"questions": count, "seconds": [[round(s, 3) for s in pair] for pair in pairs]}
    name = "evaluation-runner-quick" if args.quick else "evaluation-runner"
    print(f"written: {write_result(name, claims, details)}")
    return 0


def resumed_is_equal(bench: Bench, root: Path) -> Sequence[float]:
    """Cut the log of a finished run at three places, as a kill does, and run again."""
    whole, shares = bench.run(root / "0"), []
    for part in (1, 2, 3):
        folder = root / f"cut-{part}"
        shutil.copytree(root / "0", folder)
        [file] = folder.glob("*/answers-000.jsonl")
        file.write_bytes(file.read_bytes()[: file.stat().st_size * part // 4])
        shares.append(sum(a == b for a, b in zip(bench.run(folder), whole, strict=True)) / len(whole))
    return shares


if __name__ == "__main__":
    raise SystemExit(main())
