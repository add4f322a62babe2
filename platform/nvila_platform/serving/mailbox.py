"""From worker threads into the event loop: one wake-up for all that comes together, one timer for a whole answer.

An answer has an event for every token, so that whatever an event costs here is paid by everybody who waits for the
interpreter: the model's thread wants it back after each operation.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Events for one reader, in the event loop's thread; what `asyncio.Queue` and `asyncio.timeout` do, for less.

    The timer is not moved with every wait: when it goes off early, it is set again for the moment that counts then.

    Args:
        loop: Where the reader is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0

    def put(self, event: T) -> None:
        """Add an event."""
        self._events.append(event)
        self._wake()

    def take(self) -> T | None:
        """Return the oldest event; None when there is none."""
        return self._events.popleft() if self._events else None

    async def next(self, within_s: float) -> T | None:
        """Return the oldest event, or None when none comes in time."""
        if not self._events and within_s > 0:
            await self._wait(self._loop.time() + within_s)
        return self.take()

    def close(self) -> None:
        """Stop the timer; nobody reads any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, until: float) -> None:
        self._until = until
        if self._timer is None or self._timer.when() > until:
            self.close()
            self._timer = self._loop.call_at(until, self._ring)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._ring)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Mailbox(Generic[T]):
    """Carries events from worker threads into an event loop, and wakes it once for all that come together.

    Waking it is a system call, after which two threads want the interpreter; a step of the model has an event for every
    request in it.

    Args:
        loop: Where the readers are.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._events: list[tuple[Inbox[T], T]] = []

    def post(self, reader: Inbox[T], event: T) -> None:
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
            reader.put(event)
