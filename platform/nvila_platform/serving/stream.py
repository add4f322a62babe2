"""One answer on its way from a worker thread to the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.mailbox import Inbox, Mailbox

if TYPE_CHECKING:
    from nvila.data.records import Message
    from nvila.inference.engine import Delta, SamplingParams, TokenLogprob, Usage
    from nvila_platform.serving.engine import Generation
    from nvila_platform.serving.media import Medium
    from nvila_platform.serving.served import Target
    from nvila_platform.serving.tracing import RequestTrace


@dataclass(frozen=True, slots=True)
class End:
    """The last event of an answer."""

    usage: Usage


# Quoted, because the engine is imported only for its types.
Event: TypeAlias = "Delta | End | ApiError"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: str
    usage: Usage
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One generation, shared by the event loop (which reads events) and the worker thread (which posts them)."""

    target: Target
    messages: Sequence[Message]
    media: Mapping[str, Medium]
    params: SamplingParams
    admitted_at: float
    deadline: float
    submitted_at: float
    mailbox: Mailbox[Event]
    inbox: Inbox[Event]
    request_id: str = ""
    trace: RequestTrace | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    generation: Generation | None = None

    def post(self, event: Event) -> None:
        """Hand an event to the event loop, from any thread."""
        try:
            self.mailbox.post(self.inbox, event)
        except RuntimeError:
            # The loop is closed: nobody is left to read.
            self.cancelled.set()


def out_of_time() -> ApiError:
    """The answer to a request that took too long, whatever it waited for."""
    return ApiError(504, "timeout", "the answer took longer than this server allows; ask for less, or smaller media")


class Stream:
    """The pieces of one answer, as an asynchronous iterator.

    Args:
        job: The generation.
        cancel: Stops it.

    Attributes:
        on_end: Called with the number of letters when the answer is complete.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self.on_end: Callable[[int], None] | None = None
        self._letters = 0
        self._job = job
        self._cancel = cancel
        self._first: Delta | End | None = None
        self._done = False
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """Token counts; known once the iteration has ended."""
        assert self._usage is not None, "read before the answer was complete"
        return self._usage

    async def opened(self, within_s: float | None = None) -> bool:
        """Wait until the engine has produced something, so that a refusal can still become an HTTP status.

        Args:
            within_s: Longest wait; None waits until the deadline.

        Returns:
            Whether it has.

        Raises:
            ApiError: The engine refused the request, or its time ran out.
        """
        if self._first is None:
            self._first = await self._next(within_s)
        return self._first is not None

    async def step(self, within_s: float | None = None) -> Delta | End | None:
        """Return the next piece, or None when there is none yet after `within_s`.

        Raises:
            ApiError: The engine failed on the request, or its time ran out.
        """
        event, self._first = self._first, None
        if event is None:
            event = await self._next(within_s)
        return self._seen(event)

    def ready(self) -> Delta | End | None:
        """Return the next piece if it is here already; without waiting.

        Raises:
            ApiError: The engine failed on the request.
        """
        if self._done:
            return None
        event = self._job.inbox.take()
        return None if event is None else self._seen(self._good(event))

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            event = await self.step()
            if event is None or isinstance(event, End):
                return
            yield event

    async def collected(self) -> Completion:
        """Return the whole answer.

        Raises:
            ApiError: The engine failed on the request, or its time ran out.
        """
        texts, reason = [], "stop"
        logprobs: list[TokenLogprob] = []
        async for delta in self:
            texts.append(delta.text)
            logprobs += delta.logprobs
            reason = delta.finish_reason or reason
        return Completion(text="".join(texts), finish_reason=reason, usage=self.usage, logprobs=logprobs)

    def cancel(self) -> None:
        """Stop the generation; harmless when it has ended."""
        self._job.inbox.close()
        if not self._done:
            self._cancel(self._job)

    def _seen(self, event: Delta | End | None) -> Delta | End | None:
        if isinstance(event, End):
            self._usage = event.usage
            self._done = True
            if self.on_end is not None:
                self.on_end(self._letters)
        elif event is not None:
            self._letters += len(event.text)
        return event

    def _good(self, event: Event) -> Delta | End:
        if isinstance(event, ApiError):
            self._done = True
            raise event
        return event

    async def _next(self, within_s: float | None) -> Delta | End | None:
        left_s = max(0.0, self._job.deadline - time.monotonic())
        last = within_s is None or left_s <= within_s
        event = await self._job.inbox.next(left_s if last or within_s is None else within_s) if left_s else None
        if event is not None:
            return self._good(event)
        if not last:
            return None
        self.cancel()
        raise out_of_time()
