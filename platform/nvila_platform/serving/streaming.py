"""Server-sent events: the pieces of one or several answers, with comments that keep idle proxies from hanging up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from nvila_platform.serving.errors import as_api_error
from nvila_platform.serving.stream import End, Stream

if TYPE_CHECKING:
    from nvila.inference.engine import Delta

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


async def pieces(streams: Sequence[Stream], keep_alive_s: float) -> AsyncIterator[tuple[int, Delta] | None]:
    """Yield the pieces of all answers as they come, each with the number of its answer; None when it has been quiet.

    Raises:
        ApiError: One of them failed; the others are given up with the request.
    """
    if len(streams) == 1:
        while not isinstance(piece := await streams[0].step(keep_alive_s), End):
            yield None if piece is None else (0, piece)
        return
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(number, stream, arrived)) for number, stream in enumerate(streams)]
    left = len(pumps)
    try:
        while left:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await arrived.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        for pump in pumps:
            pump.cancel()


async def events(
    streams: Sequence[Stream],
    keep_alive_s: float,
    event: Callable[[int, Delta], str],
    last: Callable[[], str],
    on_error: Callable[[str], None],
) -> AsyncIterator[str]:
    """Yield the text of an event stream.

    Args:
        streams: The answers.
        keep_alive_s: Quiet time after which a comment is sent.
        event: Makes the event of a piece; empty for none.
        last: Makes what comes before the end.
        on_error: Called with the code of an error in mid-stream.
    """
    try:
        async for piece in pieces(streams, keep_alive_s):
            text = KEEP_ALIVE if piece is None else event(*piece)
            if text:
                yield text
    except Exception as e:
        # The status line has left, so the error travels as an event; without [DONE] nobody takes the text as complete.
        error = as_api_error(e)
        on_error(error.code)
        yield f"data: {json.dumps(error.openai_body())}\n\n"
        return
    yield last() + DONE


async def _pump(number: int, stream: Stream, arrived: asyncio.Queue[tuple[int, Delta] | Exception | None]) -> None:
    try:
        async for delta in stream:
            arrived.put_nowait((number, delta))
        arrived.put_nowait(None)
    except Exception as e:
        arrived.put_nowait(e)
