"""One bounded queue and a few worker threads between the asynchronous server and the blocking engine.

It is bounded twice: by the number of requests, and by the tokens that they will cost, so that ten questions about an
hour of video do not count like ten greetings.

A worker sleeps until its answer has ended. The pieces of an engine that batches come from common steps, and are handed
on by whoever runs them; which requests share a step, and in what memory, is the engine's business.

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
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from nvila_platform.serving.cost import Cost
from nvila_platform.serving.errors import INTERNAL, REQUEST_ID, RETRY_AFTER_S, ApiError, as_api_error
from nvila_platform.serving.mailbox import Inbox, Mailbox
from nvila_platform.serving.phases import PhaseClock
from nvila_platform.serving.stream import End, Event, Job, Stream
from nvila_platform.serving.tracing import TRACE

if TYPE_CHECKING:
    from nvila.data.records import Message
    from nvila.inference.engine import Delta, SamplingParams
    from nvila_platform.serving.media import Medium
    from nvila_platform.serving.metrics import ServingMetrics
    from nvila_platform.serving.served import Served, Target

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "broken"]

_LONGEST_RETRY_S = 60
_SMOOTHING = 0.2
# So many failures of the engine in a row, with no answer between, are not the requests' fault.
_BROKEN_AFTER = 16
# A request that is still in the engine so long after its deadline, although it was closed, will never come back.
_HUNG_S = 60.0
_FREE = Cost()


class EngineQueue:
    """Feeds an engine from many requests, in order of arrival.

    Args:
        capacity: Requests admitted at once, running ones included; the next gets 429.
        max_cost: Tokens that all requests admitted at once may cost; one that costs more is admitted alone.
        timeout_s: From admission to the last token.
        metrics: Where the queue reports.
        concurrency: Requests in the engine at once.
    """

    def __init__(
        self,
        *,
        capacity: int,
        timeout_s: float,
        metrics: ServingMetrics,
        concurrency: int = 1,
        max_cost: float = math.inf,
    ) -> None:
        self._concurrency = concurrency
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._max_cost = max_cost
        self._metrics = metrics
        self.draining = False
        self._served: Served | None = None
        self._workers: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._pending: deque[Job] = deque()
        self._running: set[Job] = set()
        self._closed = False
        # Only the event loop's thread touches these.
        self._mailbox: Mailbox[Event] | None = None
        self._admitted = 0
        self._cost = 0
        self._service_s = 1.0
        # Written by workers; that one may overwrite another's count only makes it a little smaller.
        self._failures = 0

    @property
    def healthy(self) -> bool:
        """Whether an engine is loaded and its workers are alive."""
        return self._served is not None and not self.broken

    @property
    def broken(self) -> bool:
        """Whether only a new process helps: a worker has ended, the engine fails on everything, or it hangs."""
        if any(not worker.is_alive() for worker in self._workers) or self._failures >= _BROKEN_AFTER:
            return True
        with self._wake:
            late = time.monotonic() - _HUNG_S
            return any(job.deadline < late for job in self._running)

    @property
    def state(self) -> State:
        """What to tell whoever decides about this process."""
        if self.broken:
            return "broken"
        if self._served is None:
            return "loading"
        return "draining" if self.draining else "ready"

    @property
    def served(self) -> Served:
        """What new requests are answered with.

        Raises:
            ApiError: 503 while the model is still loading.
        """
        if self._served is None or not self.healthy:
            raise ApiError(
                503, "model_not_ready", "the model is not loaded yet; try again shortly", retry_after_s=RETRY_AFTER_S
            )
        return self._served

    def start(self, served: Served) -> None:
        """Begin to serve."""
        # The workers first: whoever sees the engine may submit.
        for number in range(self._concurrency):
            worker = threading.Thread(target=self._work, name=f"engine-{number}", daemon=True)
            worker.start()
            self._workers.append(worker)
        self._served = served

    def replace(self, served: Served, on_free: Callable[[], None] | None = None) -> None:
        """Answer new requests with another version; those that were admitted before stay with theirs.

        Args:
            served: The version, loaded and warm.
            on_free: Called when no request needs the old one any more, in the event loop's thread.
        """
        old, self._served = self._served, served
        if old is not None and on_free is not None:
            old.on_free = on_free
            if not old.users:
                on_free()

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop what still waits, end what runs, and wait for the workers."""
        with self._wake:
            self._closed = True
            for job in self._pending:
                job.post(_stopping())
            self._pending.clear()
            running = list(self._running)
            self._wake.notify_all()
        for job in running:
            if job.generation is not None:
                job.generation.close()
        until = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))

    def check_room(self) -> None:
        """Fail early, before a body is read, when `admit` would fail.

        Raises:
            ApiError: 503 while loading, 429 when the queue is full.
        """
        _ = self.served
        if self._admitted >= self._capacity:
            raise self._full(f"{self._admitted} requests are already queued")

    def admit(self, cost: Cost = _FREE, target: Target | None = None) -> Slot:
        """Take a place in the queue; leaving the slot's `with` block gives it back.

        Args:
            cost: What the request will cost.
            target: What it is for; None takes the model that is served now.

        Raises:
            ApiError: 503 while loading, 429 when the queue is full.
        """
        self.check_room()
        if self._admitted and self._cost + cost.total > self._max_cost:
            raise self._full(f"requests of {self._cost} tokens are already queued, this one has about {cost.total}")
        target = target or self.served.target()
        self._admitted += 1
        self._cost += cost.total
        target.served.users += 1
        self._metrics.visual_load.inc(cost.visual)
        return Slot(self, self._timeout_s, cost, target)

    def _release(self, cost: Cost, target: Target) -> None:
        self._admitted -= 1
        self._cost -= cost.total
        self._metrics.visual_load.dec(cost.visual)
        served = target.served
        served.users -= 1
        if not served.users and served.on_free is not None:
            served.on_free()

    def _full(self, why: str) -> ApiError:
        wait_s = min(_LONGEST_RETRY_S, max(1, math.ceil(self._service_s * self._admitted / self._concurrency)))
        return ApiError(429, "queue_full", f"{why}; try again in about {wait_s} s", retry_after_s=wait_s)

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> Mailbox[Event]:
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    def _submit(self, job: Job) -> None:
        with self._wake:
            self._pending.append(job)
            self._metrics.waiting.set(len(self._pending))
            self._wake.notify()

    def _cancel(self, job: Job) -> None:
        job.cancelled.set()
        with self._wake:
            # Removed rather than skipped later: its images must not live on behind a long generation.
            if job in self._pending:
                self._pending.remove(job)
                self._metrics.waiting.set(len(self._pending))
        # Not left to the worker: it sleeps until the answer's end, and holds the request's memory until then.
        if job.generation is not None:
            job.generation.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._pending)
                if self._closed:
                    return
                job = self._pending.popleft()
                self._running.add(job)
                self._metrics.waiting.set(len(self._pending))
            self._metrics.running.inc()
            began = time.monotonic()
            try:
                self._generate(job)
            except Exception as e:
                # The process must survive any single request.
                error = as_api_error(e, job.request_id)
                self._failures += error.code == INTERNAL
                job.post(error)
            finally:
                with self._wake:
                    self._running.discard(job)
                self._metrics.running.dec()
                # A rough figure; that two workers may overwrite each other's part of it does not matter.
                self._service_s += _SMOOTHING * (time.monotonic() - began - self._service_s)
                # While this thread waits for the next one, it must not keep a replaced engine alive.
                del job

    def _generate(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        clock = PhaseClock(self._metrics, job.admitted_at, job.submitted_at, job.trace)
        reason: str | None = None

        def take(delta: Delta) -> None:
            nonlocal reason
            clock.piece(bool(delta.text))
            reason = delta.finish_reason or reason
            job.post(delta)

        generation = job.generation = job.target.engine.stream(job.messages, job.media, job.params)
        # The engine has made tensors of them; the pixels need not live as long as the answer.
        job.media = {}
        try:
            # Whoever gave up before the line above has closed nothing, and is seen here; later ones close it.
            if not self._closed and not job.cancelled.is_set():
                generation.deliver(take)
        finally:
            generation.close()
        if not job.cancelled.is_set():
            # Neither who gave up nor a mistake of a client's says that the engine works.
            self._failures = 0
        if reason is None and not job.cancelled.is_set():
            if self._closed:
                raise _stopping()
            # Clients wait for a reason.
            job.post(_ended())
        clock.finished("abort" if job.cancelled.is_set() else reason or "stop", generation.usage)
        job.post(End(generation.usage))


def _ended() -> Delta:
    from nvila.inference.engine import Delta

    return Delta("", "stop")


def _stopping() -> ApiError:
    return ApiError(503, "stopping", "the server is stopping; try again", retry_after_s=RETRY_AFTER_S)


class Slot:
    """A place in the queue, good for any number of generations one after another."""

    def __init__(self, queue: EngineQueue, timeout_s: float, cost: Cost, target: Target) -> None:
        self.target = target
        self._queue = queue
        self._cost = cost
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
        self._queue._release(self._cost, self.target)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline of all its generations."""
        return max(0.0, self._deadline - time.monotonic())

    def submit(self, messages: Sequence[Message], media: Mapping[str, Medium], params: SamplingParams) -> Stream:
        """Queue one generation and return its events."""
        loop = asyncio.get_running_loop()
        job = Job(
            target=self.target,
            messages=messages,
            media=media,
            params=params,
            admitted_at=self._admitted_at,
            deadline=self._deadline,
            submitted_at=time.monotonic(),
            mailbox=self._queue._mailbox_of(loop),
            inbox=Inbox(loop),
            request_id=REQUEST_ID.get(),
            trace=TRACE.get(),
        )
        stream = Stream(job, self._queue._cancel)
        self._streams.append(stream)
        self._queue._submit(job)
        return stream
