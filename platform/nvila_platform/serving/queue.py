"""One bounded queue and a few worker threads between the asynchronous server and the blocking engine.

A worker waits for one answer at a time. Those of an engine that batches get their tokens from common steps; which
requests share a step, and in what memory, is the engine's business.

Admission and submission are two steps: a request takes its slot before its images are decoded, so that the bound also
covers the memory that decoding needs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from nvila_platform.serving.errors import RETRY_AFTER_S, ApiError, as_api_error

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.data.records import Message
    from nvila.inference.engine import Delta, SamplingParams, Usage
    from nvila_platform.serving.engine import ChatEngine, Generation
    from nvila_platform.serving.metrics import ServingMetrics

logger = logging.getLogger(__name__)

_LONGEST_RETRY_S = 60
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class _End:
    usage: Usage


@dataclass(slots=True, eq=False, kw_only=True)
class _Job:
    """One generation, shared by the event loop (which reads events) and the worker thread (which posts them)."""

    messages: Sequence[Message]
    images: Mapping[str, Image]
    params: SamplingParams
    admitted_at: float
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Delta | _End | ApiError] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    generation: Generation | None = None

    def post(self, event: Delta | _End | ApiError) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop is closed: nobody is left to read.
            self.cancelled.set()


class EngineQueue:
    """Feeds an engine from many requests, in order of arrival.

    Args:
        capacity: Requests admitted at once, running ones included; the next gets 429.
        timeout_s: From admission to the last token.
        metrics: Where the queue reports.
        concurrency: Requests in the engine at once.
    """

    def __init__(self, *, capacity: int, timeout_s: float, metrics: ServingMetrics, concurrency: int = 1) -> None:
        self._concurrency = concurrency
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._engine: ChatEngine | None = None
        self._workers: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._pending: deque[_Job] = deque()
        self._closed = False
        # Only the event loop's thread touches this count.
        self._admitted = 0
        self._service_s = 1.0

    @property
    def healthy(self) -> bool:
        """Whether an engine is loaded and its workers are alive."""
        return self._engine is not None and all(worker.is_alive() for worker in self._workers)

    @property
    def engine(self) -> ChatEngine:
        """The loaded engine.

        Raises:
            ApiError: 503 while the model is still loading.
        """
        if self._engine is None or not self.healthy:
            raise ApiError(
                503, "model_not_ready", "the model is not loaded yet; try again shortly", retry_after_s=RETRY_AFTER_S
            )
        return self._engine

    def start(self, engine: ChatEngine) -> None:
        """Begin to serve with `engine`."""
        # The workers first: whoever sees the engine may submit.
        for number in range(self._concurrency):
            worker = threading.Thread(target=self._work, args=(engine,), name=f"engine-{number}", daemon=True)
            worker.start()
            self._workers.append(worker)
        self._engine = engine

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop what still waits, stop the workers after their current token and wait for them."""
        with self._wake:
            self._closed = True
            for job in self._pending:
                job.post(_stopping())
            self._pending.clear()
            self._wake.notify_all()
        until = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))

    def check_room(self) -> None:
        """Fail early, before a body is read, when `admit` would fail.

        Raises:
            ApiError: 503 while loading, 429 when the queue is full.
        """
        _ = self.engine
        if self._admitted >= self._capacity:
            wait_s = min(_LONGEST_RETRY_S, max(1, math.ceil(self._service_s * self._admitted / self._concurrency)))
            message = f"{self._admitted} requests are already queued; try again in about {wait_s} s"
            raise ApiError(429, "queue_full", message, retry_after_s=wait_s)

    def admit(self) -> Slot:
        """Take a place in the queue; leaving the slot's `with` block gives it back.

        Raises:
            ApiError: 503 while loading, 429 when the queue is full.
        """
        self.check_room()
        self._admitted += 1
        return Slot(self, self._timeout_s)

    def _release(self) -> None:
        self._admitted -= 1

    def _submit(self, job: _Job) -> None:
        with self._wake:
            self._pending.append(job)
            self._metrics.waiting.set(len(self._pending))
            self._wake.notify()

    def _cancel(self, job: _Job) -> None:
        job.cancelled.set()
        with self._wake:
            # Removed rather than skipped later: its images must not live on behind a long generation.
            if job in self._pending:
                self._pending.remove(job)
                self._metrics.waiting.set(len(self._pending))
        # Not left to the worker: it sleeps until there is a next piece, and holds the request's memory until then.
        if job.generation is not None:
            job.generation.close()

    def _work(self, engine: ChatEngine) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._pending)
                if self._closed:
                    return
                job = self._pending.popleft()
                self._metrics.waiting.set(len(self._pending))
            self._metrics.running.inc()
            began = time.monotonic()
            try:
                self._generate(engine, job)
            except Exception as e:
                # The process must survive any single request.
                job.post(as_api_error(e))
            finally:
                self._metrics.running.dec()
                # A rough figure; that two workers may overwrite each other's part of it does not matter.
                self._service_s += _SMOOTHING * (time.monotonic() - began - self._service_s)

    def _generate(self, engine: ChatEngine, job: _Job) -> None:
        if job.cancelled.is_set():
            return
        generation = job.generation = engine.stream(job.messages, job.images, job.params)
        reason = "stop"
        spoke = False
        try:
            for delta in generation:
                if self._closed:
                    raise _stopping()
                if job.cancelled.is_set():
                    break
                if delta.text and not spoke:
                    spoke = True
                    self._metrics.first_token(time.monotonic() - job.admitted_at)
                reason = delta.finish_reason or reason
                job.post(delta)
        finally:
            generation.close()
        if job.cancelled.is_set():
            reason = "abort"
        self._metrics.finished(reason, time.monotonic() - job.admitted_at, generation.usage)
        job.post(_End(generation.usage))


def _stopping() -> ApiError:
    return ApiError(503, "stopping", "the server is stopping; try again", retry_after_s=RETRY_AFTER_S)


class Slot:
    """A place in the queue, good for any number of generations one after another."""

    def __init__(self, queue: EngineQueue, timeout_s: float) -> None:
        self._queue = queue
        self._admitted_at = time.monotonic()
        self._deadline = self._admitted_at + timeout_s
        self._streams: list[Stream] = []

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.cancel()
        self._queue._release()

    def submit(self, messages: Sequence[Message], images: Mapping[str, Image], params: SamplingParams) -> Stream:
        """Queue one generation and return its events."""
        job = _Job(
            messages=messages,
            images=images,
            params=params,
            admitted_at=self._admitted_at,
            deadline=self._deadline,
            loop=asyncio.get_running_loop(),
        )
        stream = Stream(self._queue, job)
        self._streams.append(stream)
        self._queue._submit(job)
        return stream


class Stream:
    """The pieces of one answer, as an asynchronous iterator."""

    def __init__(self, queue: EngineQueue, job: _Job) -> None:
        self._queue = queue
        self._job = job
        self._first: Delta | _End | None = None
        self._done = False
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """Token counts; known once the iteration has ended."""
        assert self._usage is not None, "read before the answer was complete"
        return self._usage

    async def opened(self) -> None:
        """Wait until the engine has produced something, so that a refusal can still become an HTTP status.

        Raises:
            ApiError: The engine refused the request, or its time ran out.
        """
        if self._first is None:
            self._first = await self._next()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        await self.opened()
        event = self._first
        while event is not None and not isinstance(event, _End):
            yield event
            event = await self._next()
        if event is not None:
            self._usage = event.usage
        self._done = True

    def cancel(self) -> None:
        """Stop the generation; harmless when it has ended."""
        if not self._done:
            self._queue._cancel(self._job)

    async def _next(self) -> Delta | _End:
        try:
            async with asyncio.timeout(max(0.0, self._job.deadline - time.monotonic())):
                event = await self._job.events.get()
        except TimeoutError as e:
            self.cancel()
            raise ApiError(
                504, "timeout", "the answer took longer than this server allows; ask for fewer tokens"
            ) from e
        if isinstance(event, ApiError):
            self._done = True
            raise event
        return event
