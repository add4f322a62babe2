"""What keeps a streamed piece cheap: one wake-up for many, and text put into an event that was made before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.openai_router import _ChatEvents
from nvila_platform.serving.schema import parse_chat
from nvila_platform.serving.served import Served, Version
from nvila_platform.serving.stream import End, Mailbox


class Loop:
    """Notes how often it was woken."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


def test_events_that_come_together_wake_the_loop_once_and_keep_their_order() -> None:
    from nvila.inference.engine import Delta, Usage

    loop: Any = Loop()
    mailbox = Mailbox(loop)
    readers: list[asyncio.Queue[Any]] = [asyncio.Queue(), asyncio.Queue()]
    for number in range(3):
        for reader in readers:
            mailbox.post(reader, Delta(str(number)))
    assert len(loop.calls) == 1
    loop.calls.pop()()
    for reader in readers:
        assert [reader.get_nowait().text for _ in range(3)] == ["0", "1", "2"]
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
