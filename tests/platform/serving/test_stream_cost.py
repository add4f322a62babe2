"""What keeps a streamed piece cheap: one wake-up for many, and text put into an event that was made before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.mailbox import Inbox, Mailbox
from nvila_platform.serving.openai_router import _ChatEvents
from nvila_platform.serving.schema import parse_chat
from nvila_platform.serving.served import Served, Version
from nvila_platform.serving.stream import End


class Loop:
    """Notes how often it was woken."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


def test_events_that_come_together_wake_the_loop_once_and_keep_their_order() -> None:
    from nvila.inference.engine import Delta, Usage

    loop: Any = Loop()
    mailbox: Mailbox[Any] = Mailbox(loop)
    readers: list[Inbox[Any]] = [Inbox(loop), Inbox(loop)]
    for number in range(3):
        for reader in readers:
            mailbox.post(reader, Delta(str(number)))
    assert len(loop.calls) == 1
    missing = Delta("nothing came")
    loop.calls.pop()()
    for reader in readers:
        assert [(reader.take() or missing).text for _ in range(3)] == ["0", "1", "2"]
    mailbox.post(readers[0], End(Usage()))
    assert len(loop.calls) == 1, "it is woken again for what comes later"


@pytest.mark.parametrize(
    "text", [" plain", '"quoted"', "back\\slash", "line\nend\t\x00", "äöü 漢字 🙂", '"content":""', "</script>"]
)
def test_a_piece_is_the_event_that_the_models_would_make(words: ModuleType, text: str) -> None:
    from nvila.inference.engine import Delta

    target = Served(Version(identity=ModelIdentity(name="words")), words.WordsEngine()).target()
    asked = parse_chat({"model": "words", "messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": True})
    made = _ChatEvents(target, asked, [])
    for number in (1, 0, 1):
        piece = made.piece(number, Delta(text))
        whole = made.piece(number, Delta(text, "stop"))
        assert piece.endswith("\n\n")
        assert "\n" not in piece.removesuffix("\n\n")
        first = whole.split("\n\n")[0]
        assert json.loads(piece.removeprefix("data: ")) == json.loads(first.removeprefix("data: "))
        choice = json.loads(piece.removeprefix("data: "))["choices"][0]
        assert (choice["index"], choice["delta"]) == (number, {"content": text})


def test_an_inbox_waits_until_the_moment_that_counts_with_one_timer() -> None:
    async def scenario() -> tuple[list[Any], int]:
        loop = asyncio.get_running_loop()
        timers = 0
        inbox: Inbox[str] = Inbox(loop)
        ring = inbox._ring

        def counted() -> None:
            nonlocal timers
            timers += 1
            ring()

        inbox._ring = counted  # type: ignore[method-assign]
        got: list[Any] = []
        for number in range(4):
            loop.call_later(0.02, inbox.put, f"event {number}")
            # The first timer goes off while a later wait goes on, and must not end that.
            got.append(await inbox.next(0.05 if number == 0 else 5.0))
        got.append(await inbox.next(0.02))
        inbox.put("late")
        got += [await inbox.next(0.0), await inbox.next(0.0)]
        inbox.close()
        return got, timers

    got, timers = asyncio.run(scenario())
    assert got == ["event 0", "event 1", "event 2", "event 3", None, "late", None]
    assert timers <= 2


def test_what_is_ready_together_is_one_write(words: ModuleType) -> None:
    from nvila.inference.engine import Delta, Usage
    from nvila_platform.serving.stream import Stream
    from nvila_platform.serving.streaming import events

    class Job:
        deadline = time.monotonic() + 60.0

        def __init__(self) -> None:
            self.inbox: Inbox[Any] = Inbox(asyncio.get_running_loop())

    async def scenario(last: Any) -> list[str]:
        job: Any = Job()
        for event in (Delta("a"), Delta("b"), last):
            job.inbox.put(event)
        stream = Stream(job, lambda _job: None)
        written = events([stream], 5.0, "open ", lambda _, delta: delta.text, lambda: "last ", errors.append)
        return [text async for text in written]

    errors: list[str] = []
    assert asyncio.run(scenario(End(Usage()))) == ["open ", "ab", "last data: [DONE]\n\n"]
    assert errors == []
    first, second, failure = asyncio.run(scenario(ApiError(500, "internal_error", "no")))
    assert (first, second, errors) == ("open ", "ab", ["internal_error"])
    assert '"internal_error"' in failure
    assert "DONE" not in failure


def test_a_quiet_stream_is_kept_alive_with_comments_until_there_is_text() -> None:
    from nvila.inference.engine import Delta, Usage
    from nvila_platform.serving.stream import Stream
    from nvila_platform.serving.streaming import KEEP_ALIVE, events

    class Job:
        deadline = time.monotonic() + 60.0

        def __init__(self) -> None:
            self.inbox: Inbox[Any] = Inbox(asyncio.get_running_loop())

    async def scenario(number: int) -> list[str]:
        jobs: list[Any] = [Job() for _ in range(number)]
        streams = [Stream(job, lambda _job: None) for job in jobs]
        written: list[str] = []
        quiet = 0
        async for text in events(
            streams, 0.02, "", lambda at, delta: f"{at}:{delta.text}", lambda: "last ", lambda _: None
        ):
            written.append(text)
            quiet += text == KEEP_ALIVE
            if quiet == 2:
                quiet += 1
                for job in jobs:
                    job.inbox.put(Delta("a", "stop"))
                    job.inbox.put(End(Usage()))
        return written

    # A line that begins with a colon is nothing to a reader of events.
    assert KEEP_ALIVE.startswith(":")
    assert asyncio.run(scenario(1)) == [KEEP_ALIVE, KEEP_ALIVE, "0:a", "last data: [DONE]\n\n"]
    one, two, *rest = asyncio.run(scenario(2))
    assert one == two == KEEP_ALIVE
    assert sorted(rest[:-1]) == ["0:a", "1:a"]
    assert rest[-1] == "last data: [DONE]\n\n"
