"""One answer on its way from a worker thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from nvila_platform.serving.errors import ApiError

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
Events: TypeAlias = "asyncio.Queue[Event]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: str
    usage: Usage
    logprobs: Sequence[TokenLogprob] = ()


class Mailbox:
    """Carries events from worker threads into an event loop, and wakes it once for all that come together.

    Waking it is a system call, after which two threads want the interpreter; a step of the model has an event for every
    request in it.

    Args:
        loop: Where the readers are.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._events: list[tuple[Events, Event]] = []

    def post(self, reader: Events, event: Event) -> None:
        """Hand an event to a reader, from any thread.

        Raises:
            RuntimeError: The loop is closed.
        """
        with self._lock:
            self._events.append((reader, event))
            first = len(self._events) == 1
        if first:
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for reader, event in events:
            reader.put_nowait(event)


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
    mailbox: Mailbox
    trace: RequestTrace | None = None
    events: Events = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    generation: Generation | None = None

    def post(self, event: Event) -> None:
        """Hand an event to the event loop, from any thread."""
        try:
            self.mailbox.post(self.events, event)
        except RuntimeError:
            # The loop is closed: nobody is left to read.
            self.cancelled.set()


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
        if isinstance(event, End):
            self._usage = event.usage
            self._done = True
            if self.on_end is not None:
                self.on_end(self._letters)
        elif event is not None:
            self._letters += len(event.text)
        return event

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
        if not self._done:
            self._cancel(self._job)

    async def _next(self, within_s: float | None) -> Delta | End | None:
        left_s = max(0.0, self._job.deadline - time.monotonic())
        last = within_s is None or left_s <= within_s
        try:
            event = await self._soon(left_s if last or within_s is None else within_s)
        except TimeoutError as e:
            if not last:
                return None
            self.cancel()
            raise ApiError(
                504, "timeout", "the answer took longer than this server allows; ask for fewer tokens"
            ) from e
        if isinstance(event, ApiError):
            self._done = True
            raise event
        return event

    async def _soon(self, within_s: float) -> Event:
        """Return the next event.

        Raises:
            TimeoutError: There was none in time.
        """
        events = self._job.events
        if within_s > 0 and not events.empty():
            return events.get_nowait()  # without a timer
        async with asyncio.timeout(within_s):
            return await events.get()
