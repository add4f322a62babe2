"""From a checked request to the engine and back: what all protocols share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nvila.data.records import Message, Part, Role
from nvila_platform.serving.content import ChatMessage, TextPart, media_sources
from nvila_platform.serving.cost import Cost, estimate
from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.engine_metrics import register_engines
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.media import MediaIntake
from nvila_platform.serving.queue import EngineQueue, Slot
from nvila_platform.serving.schema import ChatRequest
from nvila_platform.serving.served import answered_by
from nvila_platform.serving.stream import Completion, Stream, out_of_time
from nvila_platform.serving.tracing import TRACE

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from nvila_platform.serving.drift import TrafficWatch
    from nvila_platform.serving.fetching import MediaDoor
    from nvila_platform.serving.identity import ModelIdentity
    from nvila_platform.serving.limits import Limits
    from nvila_platform.serving.media import Medium
    from nvila_platform.serving.media_store import MediaStore
    from nvila_platform.serving.metrics import ServingMetrics
    from nvila_platform.serving.schema import GenerationRequest
    from nvila_platform.serving.served import Served, Target, Version
    from nvila_platform.serving.tracing import Tracing


class ChatService:
    """The served model behind every endpoint.

    Args:
        version: Which model it is, with its adapters.
        limits: What a request may cost.
        metrics: Where it reports.
        door: Fetches media from other hosts; None refuses them.
        store: Holds media that requests name; None refuses them.
        traffic: Watches requests for drift; None watches nothing.
        tracing: Makes the spans of requests; None makes none.
    """

    def __init__(
        self,
        version: Version,
        limits: Limits,
        metrics: ServingMetrics,
        *,
        door: MediaDoor | None = None,
        store: MediaStore | None = None,
        traffic: TrafficWatch | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.traffic = traffic
        self.tracing = tracing
        self.version = version
        self.limits = limits
        self.metrics = metrics
        self.decoder = DecoderPool(limits)
        self._intake = MediaIntake(limits, self.decoder, door=door, store=store)
        self.queue = EngineQueue(
            capacity=limits.max_requests,
            max_cost=limits.max_cost_tokens,
            timeout_s=limits.request_timeout_s,
            metrics=metrics,
            concurrency=limits.max_running,
        )

    @property
    def identity(self) -> ModelIdentity:
        """The model that new requests go to, adapters aside."""
        return self.version.identity

    def start(self, served: Served, registry: CollectorRegistry) -> None:
        """Begin to serve."""
        self.version = served.version
        self.queue.start(served)
        # Behind the start: whoever registers is read at once.
        register_engines(self.identity.name, lambda: self.queue.served.engine, served.engine, registry)

    def replace(self, served: Served, on_free: Callable[[], None] | None = None) -> None:
        """Answer new requests with another version; see `EngineQueue.replace`."""
        self.queue.replace(served, on_free)
        self.version = served.version
        self.metrics.serving(served.version.identity)

    def target(self, name: str) -> Target:
        """Return what answers under a name, and note it for the answer's headers.

        Raises:
            ApiError: 404 for a name that nothing answers under, 503 while the model is loading.
        """
        target = self.queue.served.target(name)
        answered_by(target.identity)
        return target

    def close(self) -> None:
        """End what still runs."""
        self.queue.close()
        self.decoder.close()
        if self.tracing is not None:
            self.tracing.close()

    def rejected(self, code: str) -> None:
        """Record that the request at hand is answered with an error."""
        self.metrics.rejected(code)
        trace = TRACE.get()
        if trace is not None:
            trace.failed(code)

    def cost(self, target: Target, request: GenerationRequest, conversations: Sequence[Sequence[ChatMessage]]) -> Cost:
        """Estimate what a request costs, before any of its media is read.

        Raises:
            ApiError: It asks for more than a request may.
        """
        longest, limits = target.engine.max_length, self.limits
        if request.token_limit is not None and request.token_limit > longest:
            message = f"{request.token_limit} tokens were asked for, this model's longest sequence has {longest}"
            raise ApiError(400, "max_tokens_too_large", message, param="max_tokens")
        answers = request.n * len(conversations)
        if answers > limits.max_choices:
            message = f"{answers} answers were asked for, one request gets at most {limits.max_choices}"
            raise ApiError(400, "too_many_choices", message, param="n")
        messages = [message for conversation in conversations for message in conversation]
        sources = media_sources(messages, target.rates.num_frames)
        self._intake.check(sources)
        texts = (part.text for message in messages for part in message.content if isinstance(part, TextPart))
        return estimate(target.rates, texts, sources, answers=answers, limit=request.token_limit)

    async def submit(self, slot: Slot, request: GenerationRequest, messages: Sequence[ChatMessage]) -> list[Stream]:
        """Load a conversation's media and queue all answers that are asked for.

        Raises:
            ApiError: A medium cannot be used, or loading them takes longer than the request has.
        """
        trace, began = TRACE.get(), time.monotonic()
        if trace is not None:
            operation = "chat" if isinstance(request, ChatRequest) else "text_completion"
            trace.asked(slot.target.identity, request, operation)
        num_frames = slot.target.rates.num_frames
        try:
            async with asyncio.timeout(slot.left_s):
                conversation, media = await read_conversation(messages, self._intake, num_frames, self.metrics)
        except TimeoutError as e:
            raise out_of_time() from e
        if trace is not None and media:
            trace.phase("media", began, time.monotonic(), media_count=len(media))
        streams = [slot.submit(conversation, media, request.sampling(choice)) for choice in range(request.n)]
        if self.traffic is not None:
            await self.traffic.see(conversation, media, streams)
        return streams

    async def answer(self, slot: Slot, request: GenerationRequest, messages: Sequence[ChatMessage]) -> list[Completion]:
        """Return all answers to one conversation, whole.

        Raises:
            ApiError: The request cannot be served.
        """
        streams = await self.submit(slot, request, messages)
        if len(streams) == 1:
            return [await streams[0].collected()]
        return await asyncio.gather(*(stream.collected() for stream in streams))


async def read_conversation(
    messages: Sequence[ChatMessage], intake: MediaIntake, num_frames: int, metrics: ServingMetrics | None = None
) -> tuple[list[Message], dict[str, Medium]]:
    """Turn a request's messages into the engine's; a medium sent twice is loaded once.

    Args:
        messages: The conversation.
        intake: Loads its media.
        num_frames: Frames of a video for which the request names no number.
        metrics: Told how long the media took.

    Raises:
        ApiError: A medium cannot be used.
    """
    sources = media_sources(messages, num_frames)
    media: dict[str, Medium] = {}
    keys: list[str] = []
    if sources:
        began = time.monotonic()
        loaded = await intake.load(sources)
        if metrics is not None:
            metrics.media(time.monotonic() - began, loaded.encoded_bytes)
        known: dict[int, str] = {}
        for medium in loaded.media:
            keys.append(known.setdefault(id(medium), f"medium-{len(known)}"))
            media[keys[-1]] = medium
    parts = iter(
        [
            Part(type="image" if source.kind == "image" else "video", value=key)
            for source, key in zip(sources, keys, strict=True)
        ]
    )
    return [
        Message(
            role=_role(sent.role),
            content=tuple(
                Part(type="text", value=part.text) if isinstance(part, TextPart) else next(parts)
                for part in sent.content
            ),
        )
        for sent in messages
    ], media


def _role(sent: str) -> Role:
    # "developer" is OpenAI's newer word for the same turn.
    return "user" if sent == "user" else "assistant" if sent == "assistant" else "system"
