"""Running a task: ask what is not answered yet, then score everything.

Questions are asked in blocks of `batch_size` in the order of the data, and a block belongs to one process. So what is
asked together does not depend on how many processes there are, or on where a run was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Protocol

from nvila.errors import DataError
from nvila.evaluation.answer_log import Answer, AnswerLog
from nvila.evaluation.asking import Asker, Question
from nvila.evaluation.rows import TaskRows
from nvila.evaluation.scorers.contract import Marks
from nvila.evaluation.task import GenerationSettings, Task
from nvila.progress import SILENT, Reporter

logger = logging.getLogger(__name__)


class PromptTooLongError(DataError):
    """A prompt leaves no room for an answer in the model's context."""


class Answerer(Protocol):
    """Whoever answers: a model here, or an endpoint."""

    def answer(self, questions: Sequence[Question], settings: GenerationSettings) -> Sequence[str | Answer]:
        """Answer questions together, in their order; an `Answer` without a text says why there is none.

        Raises:
            DataError: One of them cannot be asked; which one shows when they are asked one by one.
        """


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample without a score: where it is, why, and whether because it does not fit into the model's context."""

    index: int
    where: str
    problem: str
    too_long: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its answer and marks."""

    question: Question
    answer: str
    marks: Marks


@dataclass(frozen=True, slots=True)
class Outcome:
    """All samples of a task, in the order of the data."""

    scored: list[Scored]
    failures: list[Failure]

    @property
    def total(self) -> int:
        """Samples that were to be scored."""
        return len(self.scored) + len(self.failures)

    @property
    def too_long(self) -> str | None:
        """Why the model cannot be asked this task at all, if no prompt of it fits into the model's context."""
        if self.scored or not self.failures or not all(failure.too_long for failure in self.failures):
            return None
        return self.failures[0].problem


@dataclass(slots=True, kw_only=True)
class TaskRun:
    """One process's part of a task.

    Args:
        task: The task.
        rows: Its data.
        log: Where answers are kept.
        load: Gives the answerer; asked when there is something to answer.
        batch_size: Questions asked together.
        limit: Samples from the front of the data; None takes all.
        rank: This process.
        world: Number of processes.
        reporter: Receives progress in samples.
    """

    task: Task
    rows: TaskRows
    log: AnswerLog
    load: Callable[[], Answerer]
    batch_size: int = 32
    limit: int | None = None
    rank: int = 0
    world: int = 1
    reporter: Reporter = SILENT
    _known: dict[str, Answer] = field(init=False, default_factory=dict)

    def run(self) -> list[Question | Failure]:
        """Answer this process's questions; what is answered already is left alone, what failed is tried again.

        Returns:
            This process's samples in the order of the data, without media.
        """
        self._known = {digest: answer for digest, answer in self.log.answers().items() if answer.text is not None}
        total = _total(self.rows, self.limit)
        blocks = range(self.rank, -(-total // self.batch_size), self.world)
        own = sum(min(self.batch_size, total - block * self.batch_size) for block in blocks)
        samples: list[Question | Failure] = []
        for block in self._blocks():
            questions = [item for item in block if isinstance(item, Question)]
            if any(question.digest not in self._known for question in questions):
                self._ask(questions)
            samples += [item.without_media() if isinstance(item, Question) else item for item in block]
            self.reporter.progress(self.task.name, len(samples), own)
        return samples

    def _blocks(self) -> Iterator[list[Question | Failure]]:
        def mine(index: int) -> bool:
            return index // self.batch_size % self.world == self.rank

        samples = read_samples(self.task, self.rows, self.limit, wanted=mine)
        for _, block in groupby(samples, key=lambda item: item.index // self.batch_size):
            yield list(block)

    def _ask(self, questions: Sequence[Question]) -> None:
        """Ask a block whole, so that each answer is given beside the same others as without an interruption."""
        try:
            answers = self._said(questions)
        except DataError as e:
            if len(questions) > 1:
                logger.info("%s: a batch failed, asking one by one: %s", self.task.name, e)
            answers = [self._alone(question) for question in questions]
        fresh = [
            (question.digest, answer)
            for question, answer in zip(questions, answers, strict=True)
            if question.digest not in self._known
        ]
        self.log.append(self.rank, fresh)
        self._known |= {digest: answer for digest, answer in fresh if answer.text is not None}

    def _alone(self, question: Question) -> Answer:
        try:
            return self._said([question])[0]
        except DataError as e:
            return Answer(None, str(e), too_long=isinstance(e, PromptTooLongError))

    def _said(self, questions: Sequence[Question]) -> list[Answer]:
        settings = self.task.file.generation
        said = self.load().answer(questions, settings)
        answers = [Answer(one) if isinstance(one, str) else one for one in said]
        return [one if one.text is None else Answer(_cut(one.text, settings.stop)) for one in answers]


def score_all(
    task: Task,
    rows: TaskRows,
    log: AnswerLog,
    limit: int | None = None,
    *,
    samples: Iterable[Question | Failure] | None = None,
) -> Outcome:
    """Score all answers of a task.

    Samples that could not be read or asked are failures: they are counted apart, never as wrong answers.

    Args:
        task: The task.
        rows: Its data.
        log: The answers.
        limit: Samples from the front of the data; None takes all.
        samples: All samples, from a caller that has read them; None reads the data.
    """
    known = log.answers()
    scored, failures = [], []
    for item in read_samples(task, rows, limit) if samples is None else samples:
        if isinstance(item, Failure):
            failures.append(item)
            continue
        answer = known.get(item.digest, Answer(None, "it was not asked"))
        if answer.text is None:
            failures.append(Failure(item.index, item.id, answer.problem or "no answer", answer.too_long))
        else:
            scored.append(Scored(item.without_media(), answer.text, task.scorer.score(answer.text, item.reference)))
    return Outcome(scored, failures)


def read_samples(
    task: Task, rows: TaskRows, limit: int | None = None, *, wanted: Callable[[int], bool] = lambda index: True
) -> Iterator[Question | Failure]:
    """Yield the questions of a task in the order of the data; a row that cannot be asked about is a failure."""
    asker = Asker(task, rows)
    for index, row in enumerate(islice(rows.read(task.columns), limit)):
        if not wanted(index):
            continue
        where = f"{rows.name}:{index + 1}"
        if row.fields is None:
            yield Failure(index, where, row.problem or "the row cannot be read")
            continue
        try:
            yield asker.question(index, row.fields)
        except DataError as e:
            yield Failure(index, where, str(e))


def check_failures(task: Task, outcome: Outcome, max_failed: float) -> None:
    """Refuse a result with too many failures.

    Raises:
        DataError: There are no scores, or the share of failures is above `max_failed`.
    """
    failed, total = len(outcome.failures), outcome.total
    if total == 0:
        raise DataError(f"the data of {task.name} holds no samples", "check the file")
    if failed and (not outcome.scored or failed / total > max_failed):
        first = outcome.failures[0]
        raise DataError(
            f"{failed} of {total} samples of {task.name} have no score; the first: {first.where}: {first.problem}",
            "mend the data, or allow more with --max-failed",
        )


def _total(rows: TaskRows, limit: int | None) -> int:
    count = rows.count()
    return count if limit is None else min(count, limit)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
