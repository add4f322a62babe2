"""What `nvila sweep` was asked for: models, data as a task, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nvila.evaluation.rows import TaskRows
    from nvila.evaluation.sweep.points import Choices
    from nvila.evaluation.task import Task

CostName = Literal["ttft", "tokens", "memory"]
# The field of a point's costs, and how people read it.
COSTS: dict[CostName, tuple[str, str]] = {
    "ttft": ("ttft_ms", "time to the first token, ms"),
    "tokens": ("tokens", "visual tokens"),
    "memory": ("memory_mib", "memory, MiB"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptModel:
    """A model of a sweep: its folder, what it is called, and the identity of its files."""

    folder: Path
    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptData:
    """The data of a sweep, as a task with its rows, and their identity."""

    task: Task
    rows: TaskRows
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """A sweep.

    Args:
        models: The model, and others to be set beside it.
        data: What is asked.
        choices: What to try.
        out: Folder of points, answers and pages.
        loss: What the recommended point may lose against the best, as a fraction of the metric.
        cost: What it is to be cheap in.
        limit: Samples from the front of the data; None takes all.
        probes: Samples that costs are measured on.
        batch_size: Questions asked together.
        threads: Threads.
        dtype: Type of wide weights.
        device: `cpu` or `cuda`.
        seed: Of resampling.
        max_failed: Largest share of samples without a score.
    """

    models: tuple[SweptModel, ...]
    data: SweptData
    choices: Choices
    out: Path
    loss: float = 0.01
    cost: CostName = "ttft"
    limit: int | None = None
    probes: int = 8
    batch_size: int = 32
    threads: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    max_failed: float = 0.1

    def depends(self, model: SweptModel, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that the measurement of a point depends on."""
        return {
            "model": model.digest,
            "point": dict(point),
            "task": self.data.task.digest,
            "data": self.data.digest,
            "limit": self.limit,
            "probes": self.probes,
            "threads": self.threads,
            "dtype": self.dtype,
            "device": self.device,
            "seed": self.seed,
        }


def own_data_task(name: str, scorer: str, max_new_tokens: int) -> Task:
    """Return the task of questions and answers of one's own.

    Raises:
        ConfigError: The scorer is unknown, or needs more than an answer.
    """
    import json

    from nvila.evaluation.task import parse_task

    file = {
        "version": 1,
        "title": name,
        "fields": {"id": "id", "question": "question", "answer": "answer", "category": "category"},
        "prompt": "{question}",
        "group_by": "category",
        "generation": {"max_new_tokens": max_new_tokens},
        "scorer": scorer,
    }
    return parse_task(json.dumps(file), name=name, where=f"--scorer {scorer}")
