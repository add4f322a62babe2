"""Serve the registered model and ask it test questions as a client would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from nvila.data.media import ImageTable
    from nvila.data.records import Sample
    from nvila_platform.serving.client import ChatClient


def run(context: StepContext) -> dict[str, float]:
    """Start the model server on loopback, ask questions over HTTP with the OpenAI client, stop it.

    Outputs: `serve.json`, `answers.jsonl`.
    """
    from nvila.data.dataset import IMAGES_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila_platform.registry import resolve
    from nvila_platform.serving.client import ChatClient, start_server
    from nvila_platform.store import open_store

    registered = json.loads((context.inputs["registration"] / "registered.json").read_text(encoding="utf-8"))
    address = f"models:/{registered['name']}@{registered['alias']}"
    version = resolve(context.settings, address)
    model_dir = open_store(context.settings).fetch(version.ref) / "model"
    data = context.inputs["data"]
    samples = spread(load_samples(data, "test"), context.recipe.serve.questions)
    images = ImageTable.open(data / IMAGES_FILE)
    context.reporter.progress("start server", 0, len(samples))
    server = start_server(
        model_dir,
        version.name,
        env=context.settings.to_env(),
        log_path=context.log_path,
        version=str(version.version),
        digest=version.digest,
    )
    with server as running, ChatClient(running.base_url, version.name) as client:
        lines = [_ask(client, sample, images) for sample in _with_progress(samples, context)]
    return _write(context.out_dir, lines, address)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Pick `count` samples evenly over the whole split."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def _ask(client: ChatClient, sample: Sample, images: ImageTable) -> dict[str, Any]:
    from nvila.evaluation.scores import exact_match
    from nvila_pipelines.steps.evaluate import prediction_line

    answer = client.ask(sample.question, images.encoded(sample.images[0]))
    line = prediction_line(sample, answer.text, exact_match(answer.text, sample.answer))
    return line | {"seconds": round(answer.seconds, 4), "request_id": answer.request_id}


def _with_progress(samples: Sequence[Sample], context: StepContext) -> Iterator[Sample]:
    for done, sample in enumerate(samples):
        context.reporter.progress("ask", done, len(samples))
        yield sample
    context.reporter.progress("ask", len(samples), len(samples))


def _write(out: Path, lines: list[dict[str, Any]], address: str) -> dict[str, float]:
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    seconds = sorted(line["seconds"] for line in lines)
    cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
    summary = {
        "asked": len(lines),
        "right": sum(line["correct"] for line in lines),
        "p50_ms": round(cuts[9] * 1000, 1),
        "p95_ms": round(cuts[18] * 1000, 1),
        "model": address,
    }
    (out / "serve.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return {name: float(value) for name, value in summary.items() if not isinstance(value, str)}
