"""Tasks written in a few lines, rows of their data, and someone who answers without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import DataError
from nvila.evaluation.asking import Question
from nvila.evaluation.task import GenerationSettings, Task, parse_task

BASE: dict[str, Any] = {
    "version": 1,
    "title": "Demo",
    "fields": {"question": "q", "answer": "a"},
    "prompt": "{question}",
    "scorer": "exact_match",
}
MakeTask = Callable[..., Task]
WriteRows = Callable[..., Path]


@pytest.fixture
def make_task() -> MakeTask:
    def make(name: str = "demo", **changed: Any) -> Task:
        # JSON is YAML.
        return parse_task(json.dumps(BASE | changed), name=name, where=f"{name}.yaml")

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


class Echo:
    """Answers with a digest of all questions that were asked together, so that another batch shows.

    Args:
        refuse: Text of a question that cannot be asked.
        stop_after: Batches after which the machine "dies".
    """

    def __init__(self, refuse: str | None = None, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self._refuse, self._stop_after = refuse, stop_after

    def answer(self, questions: Sequence[Question], settings: GenerationSettings) -> list[str]:
        if self._stop_after is not None and len(self.batches) >= self._stop_after:
            raise KeyboardInterrupt
        texts = [question.prompt for question in questions]
        self.batches.append(texts)
        if self._refuse in texts:
            raise DataError(f"{self._refuse} cannot be asked", "leave it out")
        together = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
        return [f"{text} {together} STOP more" for text in texts]
