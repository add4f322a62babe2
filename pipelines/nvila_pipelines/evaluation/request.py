"""What an evaluation is asked to do, and its form on disk for launched processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# In the folder of results: answers by model and task, and scratch files of a run.
ANSWERS, SCRATCH, FIXTURES = "answers", ".evaluate", ".fixtures"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """An evaluation.

    Args:
        model: Folder of the model; of an endpoint, the name that it serves the model under.
        model_name: Its name in result files.
        model_digest: Its identity; answers are kept by it.
        tasks: Names, files and tags of tasks.
        out: Folder of results and answers.
        data: Place of the data by task name.
        fixture: Use the fixtures of tasks that have no built-in data.
        limit: Samples of each task, from the front; None takes all.
        frames: Frames sampled of every video; None takes the task's number, or the model's.
        batch_size: Questions asked together.
        processes: Local processes.
        threads: Threads of a process.
        dtype: Type of the weights: `fp32` or `bf16`.
        device: `cpu` or `cuda`.
        seed: Of resampling, and of torch.
        max_failed: Largest share of samples without a score.
        url: Address of an OpenAI endpoint that is asked instead of a model here; empty for none.
        served_digest: Digest that the endpoint tells of its model; None where it tells none.
        concurrency: Requests that the endpoint gets at once.
        retries: How often a request that failed for a passing reason is sent again.
        timeout_s: Longest wait for one answer of the endpoint.
    """

    model: str
    model_name: str
    model_digest: str
    tasks: tuple[str, ...]
    out: str
    data: Mapping[str, str] = field(default_factory=dict)
    fixture: bool = False
    limit: int | None = None
    frames: int | None = None
    batch_size: int = 32
    processes: int = 1
    threads: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    max_failed: float = 0.1
    url: str = ""
    served_digest: str | None = None
    concurrency: int = 8
    retries: int = 3
    timeout_s: float = 60.0

    @property
    def folder(self) -> Path:
        """Folder of results and answers."""
        return Path(self.out)

    def save(self, path: Path, **more: Any) -> None:
        """Write it for launched processes, with what else they need to know."""
        path.write_text(json.dumps({"request": asdict(self), **more}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> tuple[EvaluationRequest, dict[str, Any]]:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        request = raw.pop("request")
        return cls(**request | {"tasks": tuple(request["tasks"])}), raw
