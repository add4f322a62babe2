"""Server-sent events: the pieces of one or several answers, with comments that keep idle proxies from hanging up.

What is ready together leaves together: a reader that falls behind costs one write for all that it missed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from starlette.responses import Response

from nvila_platform.serving.errors import ApiError, as_api_error
from nvila_platform.serving.limits import Receive, Scope, Send
from nvila_platform.serving.stream import End, Stream

if TYPE_CHECKING:
    from nvila.inference.engine import Delta

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


class EventStream(Response):
    """A response that is written as its text comes.

    Starlette's own watches for the client's leaving with a group of tasks; here the guard around everything does.

    Args:
        texts: The text.
    """

    media_type = "text/event-stream"

    def __init__(self, texts: AsyncIterator[str]) -> None:
        # X-Accel-Buffering keeps proxies from collecting the stream into one piece.
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for text in self._texts:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def pieces(streams: Sequence[Stream], keep_alive_s: float) -> AsyncIterator[list[tuple[int, Delta]]]:
    """Yield the pieces of all answers as they come, each with the number of its answer; none when it has been quiet.

    Raises:
        ApiError: One of them failed; the others are given up with the request.
    """
    if len(streams) > 1:
        async for piece in _of_several(streams, keep_alive_s):
            yield [] if piece is None else [piece]
        return
    ended = False
    while not ended:
        found: list[tuple[int, Delta]] = []
        try:
            piece_or_end = await streams[0].step(keep_alive_s)
            while piece_or_end is not None and not isinstance(piece_or_end, End):
                found.append((0, piece_or_end))
                piece_or_end = streams[0].ready()
            ended = piece_or_end is not None
        except ApiError:
            # What came before it is the client's.
            if found:
                yield found
            raise
        if found or not ended:
            yield found


async def _of_several(streams: Sequence[Stream], keep_alive_s: float) -> AsyncIterator[tuple[int, Delta] | None]:
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
    opening: str,
    event: Callable[[int, Delta], str],
    last: Callable[[], str],
    on_error: Callable[[str], None],
) -> AsyncIterator[str]:
    """Yield the text of an event stream.

    Args:
        streams: The answers.
        keep_alive_s: Quiet time after which a comment is sent.
        opening: Comes before all others.
        event: Makes the event of a piece; empty for none.
        last: Makes what comes before the end.
        on_error: Called with the code of an error in mid-stream.
    """
    if opening:
        yield opening
    try:
        async for found in pieces(streams, keep_alive_s):
            text = "".join(event(*piece) for piece in found) if found else KEEP_ALIVE
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
