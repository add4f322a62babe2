"""From logits to what callers read: choose tokens, put text into outboxes, end requests.

Everything here is called with the engine's lock held.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence, Set

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nvila.errors import DeadlineError, NvilaError
from nvila.inference.choosing import choose_all
from nvila.inference.request import Delta, FinishReason, Request, Sink
from nvila.inference.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Delivery:
    """Carries answers, and errors, to their requests.

    Args:
        scheduler: Holds the requests; those that end give back their blocks.
        tokenizer: Tokenizer of the model.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int]) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._made: list[tuple[Request, Sink, Delta]] = []

    def choose(self, rows: Sequence[tuple[Request, Tensor]]) -> None:
        """Choose the next token, from its logits (V), of every request whose prompt is complete."""
        ready = [(request, logits) for request, logits in rows if not request.done and not request.pending]
        for request, outcome in choose_all(ready, self._tokenizer, self._stop_ids):
            if isinstance(outcome, Exception):
                self.fail(request, outcome)
            else:
                self._take(request, outcome)
        self._hand_out()

    def expire(self, now: float) -> None:
        """Fail the requests whose deadline has passed."""
        for request in (*self._scheduler.running, *self._scheduler.waiting):
            if request.deadline is not None and now >= request.deadline:
                self.fail(
                    request, DeadlineError("the answer took longer than the request allows", "ask for fewer tokens")
                )

    def fail(self, request: Request, error: Exception, *, spoiled: bool = False) -> None:
        """End a request with an error; `spoiled` erases the keys and values that it wrote."""
        if not isinstance(error, NvilaError):
            # As text: a log record with the traceback itself would keep its frames, see below.
            logger.error("request %d failed:\n%s", request.number, "".join(traceback.format_exception(error)))
        drop_frames(error)
        request.outbox.append(error)
        self.end(request, spoiled=spoiled)

    def end(self, request: Request, *, spoiled: bool = False) -> None:
        """End a request and free its memory."""
        request.done = True
        # It leads to the caller, who has the request: together they would live on until the collector comes by.
        request.sink = None
        self._scheduler.remove(request, spoiled=spoiled)
        request.features = None
        for medium in request.media:
            medium.release()

    def _take(self, request: Request, token: int) -> None:
        """Add a chosen token to a request's answer, and end it where it ends."""
        complete = request.constraint is not None and request.constraint.complete
        if token in self._stop_ids:
            self._post(request, request.text.rest(), "stop")
            return
        request.ids.append(token)
        request.usage.completion_tokens += 1
        piece = request.text.add(token)
        if request.text.stopped:
            self._post(request, piece, "stop")
        elif complete:
            self._post(request, piece + request.text.rest(), "stop")
        elif request.usage.completion_tokens >= request.limit:
            self._post(request, piece + request.text.rest(), "length")
        elif piece:
            self._post(request, piece, None)

    def _post(self, request: Request, text: str, reason: FinishReason | None) -> None:
        piece = Delta(text, reason, tuple(request.logprobs))
        request.logprobs.clear()
        if request.sink is None:
            request.outbox.append(piece)
        else:
            self._made.append((request, request.sink, piece))
        if reason is not None:
            self.end(request)

    def _hand_out(self) -> None:
        """Call the sinks, for all requests of a step together.

        Choosing gives up the interpreter now and then. What is handed out between would wake its reader, each time.
        """
        made, self._made = self._made, []
        for request, sink, piece in made:
            try:
                sink(piece)
            except Exception as e:
                # Its own caller's fault; the step goes on for the others.
                if request.done:
                    request.outbox.append(e)
                else:
                    self.fail(request, e)


def drop_frames(outcome: object) -> None:
    """Drop the tracebacks of an error, and of those behind it; anything else is left alone.

    Their frames lead to the caller that happened to run the step, and back to the error. Until the collector comes by,
    that caller's streams would live on, and a forgotten one would go on holding its blocks.
    """
    one = outcome if isinstance(outcome, BaseException) else None
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
