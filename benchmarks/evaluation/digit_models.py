"""Small models trained on the built-in digit tasks and evaluated as the command does; finished runs are kept.

A run is a folder: stages and checkpoints while it trains, `run.json` when it is scored. Started again, a benchmark
goes on where it was, also with more seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvila.data.records import Sample
from nvila.data.tokenizers import build_word_tokenizer
from nvila.evaluation.answer_log import AnswerLog
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.registry import find_task
from nvila.evaluation.results import summarize
from nvila.evaluation.rows import open_rows
from nvila.evaluation.runner import TaskRun, score_all
from nvila.progress import Reporter
from nvila.training.config import BaseModels, TrainConfig
from nvila.training.run import train

MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Media:
    """Media by key, made once and kept."""

    make: Callable[[str], bytes]
    kept: dict[str, bytes]

    def encoded(self, key: str) -> bytes:
        """Return the bytes of one medium."""
        if key not in self.kept:
            self.kept[key] = self.make(key)
        return self.kept[key]

    def image(self, key: str) -> Any:
        """Decode one image."""
        import io

        from PIL import Image

        return Image.open(io.BytesIO(self.encoded(key))).convert("RGB")


def tower(size: int, patch: int, hidden: int = 64, layers: int = 3) -> dict[str, Any]:
    """Return a small vision tower."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
    }


def decoder(hidden: int = 96, layers: int = 2) -> dict[str, Any]:
    """Return a small language model."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "max_position_embeddings": MAX_LENGTH,
    }


def trained_and_scored(
    folder: Path,
    config: TrainConfig,
    datasets: Mapping[str, Sequence[Sample]],
    media: Media,
    task_names: Sequence[str],
    vision: Path | None = None,
) -> dict[str, Any]:
    """Train a model and evaluate it on built-in tasks; a run that is finished is read."""
    done = folder / "run.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    # The tokenizer is of all texts that a run may see, so that it is the same for every variant.
    texts = [message.text for samples in datasets.values() for sample in samples for message in sample.messages]
    tokenizer = build_word_tokenizer(texts, model_max_length=MAX_LENGTH)
    if vision is not None:
        language = new_language(
            folder.with_name(f"language-{folder.name}"), config.model.language, tokenizer, config.seed
        )
        base = BaseModels(vision=str(vision), language=str(language))
        config = replace(config, model=replace(config.model, base=base))
    started = time.process_time()
    model_folder = train(config, datasets, media, tokenizer, folder, _Progress(folder.name), videos=media)
    seconds = time.process_time() - started
    found = {"seconds": round(seconds, 1), **score(model_folder, folder / "answers", task_names)}
    done.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def new_language(folder: Path, config: Mapping[str, Any], tokenizer: Any, seed: int) -> Path:
    """Write a new language model, for a model that starts from parts."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = {name: value for name, value in config.items() if name != "model_type"}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), bos_token_id=None, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(model_folder: Path, answers: Path, task_names: Sequence[str]) -> dict[str, Any]:
    """Evaluate a model on built-in tasks: by task the number of samples, the main metric, and that by category."""
    from nvila.assembly import load_model

    model, processor = load_model(model_folder)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for name in task_names:
        task = find_task(name)
        rows = open_rows(task, None)
        log = AnswerLog.open(answers, task, str(model_folder), {})
        samples = TaskRun(task=task, rows=rows, log=log, load=lambda: ModelAnswerer(model, processor)).run()
        result = summarize(task, rows.name, score_all(task, rows, log, samples=samples), seed=0)
        main = task.scorer.main
        found[name] = {
            "samples": result.outcome.total,
            "value": result.estimates[main].value,
            "categories": {group: values[main] for group, (_, values) in result.categories.items()},
        }
    return found


class _Progress(Reporter):
    """Prints a line now and then."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, 0.0

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Print, but not more often than every ten seconds."""
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            loss = f", loss {metrics['loss']:.3f}" if metrics and "loss" in metrics else ""
            print(f"{self._name}: {phase} {done}/{total}{loss}", flush=True)

    def notice(self, text: str) -> None:
        """Print."""
        print(f"{self._name}: {text}", flush=True)
