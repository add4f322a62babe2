"""What the server needs from an engine, so that anything of this shape can be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nvila.data.records import Message
    from nvila.inference.engine import Delta, SamplingParams, Usage
    from nvila_platform.serving.media import Medium


class Generation(Protocol):
    """One running answer. Closing it stops the work."""

    @property
    def usage(self) -> Usage:
        """Token counts so far."""

    def deliver(self, to: Callable[[Delta], None]) -> None:
        """Hand every piece to `to`, in whatever thread it is made; return at the end, or when it was closed."""

    def close(self) -> None:
        """Stop generating and free what the request held; any thread may call it, also twice."""


class ChatEngine(Protocol):
    """Answers conversations; `stream` is called, and its results are waited for, by several threads at once."""

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""

    def stream(self, messages: Sequence[Message], images: Mapping[str, Medium], params: SamplingParams) -> Generation:
        """Start answering `messages`; image and video parts hold keys of `images`."""
