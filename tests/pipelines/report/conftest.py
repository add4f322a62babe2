"""A made-up finished run: real images and questions of easy-VQA, small random numbers where a model would answer."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nvila.data import easy_vqa
from nvila.data.media import write_image_table
from nvila.data.records import Sample, write_jsonl
from nvila_pipelines.report import write_report
from nvila_platform.artifacts import utc_now, write_manifest
from nvila_platform.lineage import Lineage
from nvila_platform.training.history import HISTORY_FILE

STAGES = ("align", "vision", "language", "instruct")
ATTACK = "<script>alert('question')</script> & what is the color?"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRun:
    """What `write_report` takes."""

    artifacts: dict[str, Path]
    summary: dict[str, Any]
    lineage: Lineage


MakeRun = Callable[[], FakeRun]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """Give a run that no test changes."""
    return build_run(tmp_path_factory.mktemp("finished"), num_train=300, num_test=400)


@pytest.fixture(scope="session")
def finished_page(finished: FakeRun) -> str:
    """Give the report of that run."""
    out = write_report(finished.artifacts, finished.summary, finished.lineage, Path(finished.summary["report"]))
    return out.read_text(encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Build a run of a few hundred samples below the test's folder."""
    return lambda: build_run(tmp_path / "run", num_train=300, num_test=400)


def build_run(root: Path, *, num_train: int, num_test: int) -> FakeRun:
    """Write the step directories of a run that passed the gate."""
    names = ("data", "curate", "train", "quantize", "evaluate-wide", "evaluate-quantized", "gate", "register", "serve")
    artifacts = {name: root / "artifacts" / name / "0123456789abcdef" for name in names}
    for directory in artifacts.values():
        directory.mkdir(parents=True)
    numbers = random.Random(7)
    train = list(islice(easy_vqa.questions("train"), num_train))
    test = list(islice(easy_vqa.questions("test"), num_test))
    _write_data(artifacts["data"], train, test)
    _write_curation(artifacts["curate"], train, numbers)
    _write_training(artifacts["train"], numbers)
    _write_json(artifacts["quantize"] / "sizes.json", _sizes())
    _write_json(artifacts["quantize"] / "quantization.json", _quantization())
    wide = _write_evaluation(artifacts["evaluate-wide"], "wide", test, 0.981, numbers)
    quantized = _write_evaluation(artifacts["evaluate-quantized"], "quantized", test, 0.977, numbers)
    _write_json(artifacts["gate"] / "verdict.json", _verdict(wide["accuracy"], quantized["accuracy"]))
    digest = _digest("quantize")
    registered = {"name": "nvila-quickstart", "version": "3", "alias": "candidate", "digest": digest}
    _write_json(artifacts["register"] / "registered.json", {**registered, "uri": "models:/nvila-quickstart/3"})
    served = {"asked": 50, "right": 49, "p50_ms": 38.4, "p95_ms": 61.0, "model": "models:/nvila-quickstart/3"}
    _write_json(artifacts["serve"] / "serve.json", served)
    summary = _summary(root, wide, quantized, served)
    for step, directory in artifacts.items():
        hours = summary["steps"][step] / 3600
        metrics = {"core_hours": hours, "energy_kwh_estimated": hours / 100, "cost_eur": hours / 20}
        if step == "train":
            metrics |= {f"core_hours_{stage}": hours / 5 for stage in STAGES}
        about: dict[str, Any] = {"config": {}, "inputs": {}, "code_version": "v", "started_at": utc_now()}
        write_manifest(directory, step=step, key="0" * 64, metrics=metrics, **about)
    return FakeRun(artifacts=artifacts, summary=summary, lineage=build_lineage())


def build_lineage() -> Lineage:
    """Return the lineage of a lifecycle, in which several artifacts are used more than once."""
    data = _node("data", easy_vqa=_node("", "easy-vqa"))
    curate = _node("curate", data=data)
    train = _node("train", curate=curate, data=data)
    quantize = _node("quantize", train=train, data=data)
    wide = _node("evaluate", "wide", train=train, data=data)
    quantized = _node("evaluate", "quantized", quantize=quantize, data=data)
    gate = _node("gate", wide=wide, quantized=quantized)
    return _node("register", gate=gate, quantize=quantize)


def _node(step: str, salt: str = "", **inputs: Lineage) -> Lineage:
    return Lineage(
        step=step,
        digest=_digest(step + salt),
        code_version="0.1.0+3f2a9c1d" if step else "",
        finished_at="2026-11-22T20:31:07.120Z" if step else "",
        config={},
        metrics={},
        inputs=inputs,
    )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_data(directory: Path, train: list[Sample], test: list[Sample]) -> None:
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "test.jsonl", test)
    used = {sample.images[0] for sample in (*train, *test)}
    files = [*easy_vqa.image_files("train"), *easy_vqa.image_files("test")]
    write_image_table(directory / "images.parquet", ((key, path.read_bytes()) for key, path in files if key in used))


def _write_curation(directory: Path, train: list[Sample], numbers: random.Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for sample in train:
        hard = 1.1 if sample.source.startswith("open") else 0.6
        small = abs(numbers.gauss(hard, 0.5)) + 0.01
        large = max(1e-4, small * numbers.uniform(0.05, 1.15))
        row = {"id": sample.id, "source": sample.source, "nll_small": small, "nll_large": large}
        rows.append({**row, "delta": small - large, "num_answer_tokens": 2})
    kept: set[str] = set()
    for source in {row["source"] for row in rows}:
        own = sorted((row for row in rows if row["source"] == source), key=lambda row: -row["delta"])
        kept.update(row["id"] for row in own[: len(own) // 2])
    pq.write_table(pa.Table.from_pylist(rows), directory / "scores.parquet")
    chosen = [
        {"id": row["id"], "source": row["source"], "delta": row["delta"], "kept": row["id"] in kept} for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(chosen), directory / "selection.parquet")


def _write_training(directory: Path, numbers: random.Random) -> None:
    rows = []
    ends = {"align": (3.4, 0.9), "vision": (0.9, 0.16), "language": (0.3, 0.09), "instruct": (0.12, 0.03)}
    for stage in STAGES:
        first, last = ends[stage]
        for step in range(0, 600, 20):
            loss = last + (first - last) * math.exp(-step / 120) * numbers.uniform(0.9, 1.1)
            rows.append({"stage": stage, "step": step, "loss": loss, "lr_scale": 1.0, "tokens_per_second": 5000})
    _write_rows(directory / "metrics.jsonl", rows)
    _write_rows(directory / HISTORY_FILE, list(_history(numbers)))


def _history(numbers: random.Random) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(STAGES):
        for step in range(1, 601, 12):
            skipped = {"skipped": 1.0} if stage == "vision" and step in (121, 241) else {}
            values = {
                "lr_scale": (1 + math.cos(math.pi * step / 600)) / 2,
                "grad_norm": 0.4 + math.exp(-step / 90) * numbers.uniform(1.5, 2.5),
                "skipped_steps": float((step >= 121) + (step >= 241)) if stage == "vision" else 0.0,
                "tokens_per_second": (4800 + 900 * number) * numbers.uniform(0.94, 1.04) * min(1, 0.7 + step / 60),
                "samples_per_second": 210.0 + 15 * number,
                "memory_gib": 0.81,
                **skipped,
            }
            line = {"attempt": number, "stage": stage, "step": step, "seconds": step / 22, "values": values}
            yield {**line, "usage": {"core_hours": step / 22 / 3600}}


def _sizes() -> dict[str, dict[str, int]]:
    wide = {"vision": 1_310_720, "projector": 98_304, "language": 3_407_872}
    quantized = {"vision": 351_232, "projector": 98_304, "language": 660_000}
    return {name: {**parts, "total": sum(parts.values())} for name, parts in (("wide", wide), ("quantized", quantized))}


def _quantization() -> dict[str, Any]:
    """The tower is quantized, the decoder lost too much."""
    sizes = _sizes()
    scores = {"answers": 0.98, "tokens": 0.99, "nll": 0.02, "num_samples": 400}
    lost = {"of": "answers", "points": 2.25, "low": 1.0, "high": 3.5, "p_value": 0.01, "better": 1, "worse": 10}
    fine = {"of": "tokens", "points": 0.25, "low": -0.1, "high": 0.6, "p_value": 1.0, "better": 0, "worse": 1}
    layers = [{"name": "0.mlp.fc1", "error": 0.01, "rounded": 0.02, "folded": True, "clipped": 0.0}]
    common = {"before": scores, "after": scores, "speed_before": None, "speed_after": None}

    def part(name: str, scheme: str, method: str, loss: dict[str, Any], kept: bool) -> dict[str, Any]:
        before, after = sizes["wide"][name], sizes["quantized"][name]
        changed = {"bytes_before": before, "bytes_after": after, "loss": loss, "kept": kept, "layers": layers}
        return {"part": name, "scheme": scheme, "method": method, **changed, **common}

    parts = [part("vision", "w8a8", "SmoothQuant", fine, True), part("language", "w4a16", "AWQ", lost, False)]
    return {"parts": parts, "sizes": sizes, "loss": fine, "budget": 1.0, "left_wide": ["language"], **common}


def _write_evaluation(
    directory: Path, model: str, test: list[Sample], accuracy: float, numbers: random.Random
) -> dict[str, Any]:
    answers: dict[str, list[str]] = defaultdict(list)
    for sample in test:
        answers[sample.source].append(sample.answer)
    rows: list[dict[str, Any]] = []
    for number, sample in enumerate(test):
        correct = numbers.random() < accuracy and number != 0
        others = sorted(set(answers[sample.source]) - {sample.answer}) or ["nothing"]
        row: dict[str, Any] = {"id": sample.id, "source": sample.source, "image": sample.images[0], "correct": correct}
        # The first question of the wrong ones is shown, so an attack in it would reach the page.
        question = ATTACK if number == 0 else sample.question
        prediction = sample.answer if correct else numbers.choice(others)
        rows.append({**row, "question": question, "answer": sample.answer, "prediction": prediction})
    _write_rows(directory / "predictions.jsonl", rows)
    by_source = {}
    for source in answers:
        own = [row["correct"] for row in rows if row["source"] == source]
        by_source[source] = {"correct": sum(own), "total": len(own), "accuracy": sum(own) / len(own)}
    blind = {source: Counter(own).most_common(1)[0][1] / len(own) for source, own in answers.items()}
    results = {
        "model": model,
        "split": "test",
        "num_samples": len(rows),
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "by_source": by_source,
        "baselines": {"majority": 0.373, "text_majority": 0.668, "by_source": blind},
        "samples_per_second": 812.0,
    }
    _write_json(directory / "results.json", results)
    return results


def _verdict(wide: float, quantized: float) -> dict[str, Any]:
    def check(name: str, value: float, limit: float, passed: bool, why: str) -> dict[str, Any]:
        return {"name": name, "value": value, "limit": limit, "passed": passed, "why": why}

    drop = wide - quantized
    return {
        "passed": True,
        "checks": [
            check("accuracy", quantized, 0.95, True, "the quantized model answers enough test questions"),
            check("over_text_majority", quantized - 0.668, 0.1, True, "it beats the best blind baseline"),
            check("quantization_drop", drop, 0.01, True, "quantization costs less than one point"),
        ],
        "paired": {"drop": drop, "low": drop - 0.002, "high": drop + 0.002, "better": 21, "worse": 37},
    }


def _summary(root: Path, wide: dict[str, Any], quantized: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    seconds = {"data": 6.1, "curate": 48.7, "train": 118.2, "quantize": 7.9, "evaluate-wide": 11.4}
    seconds |= {"evaluate-quantized": 13.0, "gate": 0.4, "register": 1.9, "serve": 12.6}
    stages = {stage: {"steps": 600, "learning_rate": 1e-3} for stage in STAGES}
    return {
        "run_id": "20261122-203107-3f2a",
        "workspace": str(root),
        "seconds": sum(seconds.values()) + 9.3,
        "steps": seconds,
        "usage": {"core_hours": 0.0612, "energy_kwh_estimated": 0.00061, "cost_eur": 0.0031},
        "accuracy": {
            "majority": 0.373,
            "text_majority": 0.668,
            "wide": wide["accuracy"],
            "quantized": quantized["accuracy"],
        },
        "served": {name: served[name] for name in ("asked", "right", "p50_ms")},
        "model": "models:/nvila-quickstart/3",
        "passed": True,
        "recipe": {
            "name": "quickstart",
            "seed": 0,
            "train": {"precision": "fp8", "stages": stages},
            "hub_token": "s3cr3t",
        },
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "nvila": "0.1.0"},
        "hardware": {"processor": "2 cores, x86_64", "memory": "8.0 GiB", "accelerator": None},
        "report": str(root / "report.html"),
    }
