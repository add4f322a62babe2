"""Answers on disk: every answer is kept once it is given, so a run that was killed goes on where it was.

One folder holds the answers of one model to one version of one task. Each process appends whole batches to a file of
its own; a line that a crash cut short is passed over. What an answer depends on is in the folder's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.errors import ResourceError
from nvila.evaluation.task import Task

ABOUT = "about.json"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a question; `problem` instead when it could not be asked.

    Args:
        text: What it said.
        problem: Why there is nothing.
        too_long: That was because the prompt does not fit into the model's context.
    """

    text: str | None
    problem: str | None = None
    too_long: bool = False


class AnswerLog:
    """The answers of one model to one version of one task.

    Args:
        directory: Where they are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def open(cls, root: Path, task: Task, model: str, settings: Mapping[str, Any]) -> AnswerLog:
        """Open the log of a task.

        Args:
            root: Folder of all logs.
            task: The task; another version, or another text of its file, has another log.
            model: Digest of the model.
            settings: What else an answer depends on, such as the type of the weights.

        Raises:
            ResourceError: The folder cannot be written.
        """
        about = {"model": model, "task": task.name, "version": task.version, "digest": task.digest, **settings}
        text = json.dumps(about, sort_keys=True, indent=2)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory = root / f"{task.name}-v{task.version}-{key}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ABOUT).write_text(text + "\n", encoding="utf-8")
        except OSError as e:
            raise ResourceError(f"answers cannot be kept in {directory}: {e.strerror}", "choose another --out") from e
        return cls(directory)

    def others(self, task: Task, model: str) -> list[int]:
        """Return versions of the task, other than this one, of which answers of the model are kept."""
        found = set()
        for file in self.directory.parent.glob(f"{task.name}-v*/{ABOUT}"):
            about = _parsed(file.read_bytes())
            if about.get("task") == task.name and about.get("model") == model:
                found.add(int(about["version"]))
        return sorted(found - {task.version})

    def answers(self) -> dict[str, Answer]:
        """Return what is known, by digest of the question; of several lines an answer counts before a problem."""
        found: dict[str, Answer] = {}
        for file in sorted(self.directory.glob("answers-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                entry = _parsed(line)
                if isinstance(entry.get("sample"), str) and isinstance(entry.get("answer"), str):
                    found[entry["sample"]] = Answer(entry["answer"])
                elif isinstance(entry.get("sample"), str):
                    problem = Answer(None, str(entry.get("problem")), too_long=entry.get("too_long") is True)
                    found.setdefault(entry["sample"], problem)
        return found

    def append(self, rank: int, answers: Sequence[tuple[str, Answer]]) -> None:
        """Add answers of a batch in one write, and have them on the disk.

        Raises:
            ResourceError: The disk is full, or the file cannot be written.
        """
        lines = [
            json.dumps(
                {"sample": digest, "answer": answer.text}
                if answer.text is not None
                else {"sample": digest, "problem": answer.problem} | ({"too_long": True} if answer.too_long else {}),
                ensure_ascii=False,
            )
            for digest, answer in answers
        ]
        path = self.directory / f"answers-{rank:03d}.jsonl"
        # A line that was cut short must not swallow the next one.
        data = ("\n" + "\n".join(lines) + "\n").encode("utf-8", errors="replace")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise ResourceError(f"answers cannot be written to {path}: {e.strerror}", "make room, run it again") from e


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
