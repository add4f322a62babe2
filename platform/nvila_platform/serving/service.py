"""From a checked request to the engine and back: what all protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvila.data.records import Message, Part, Role
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.media import load_image
from nvila_platform.serving.queue import EngineQueue, Slot, Stream
from nvila_platform.serving.schema import ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.inference.engine import TokenLogprob, Usage
    from nvila_platform.serving.identity import ModelIdentity
    from nvila_platform.serving.limits import Limits
    from nvila_platform.serving.metrics import ServingMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: str
    usage: Usage
    logprobs: Sequence[TokenLogprob] = ()


class ChatService:
    """The served model behind every endpoint.

    Args:
        identity: Which model it is.
        limits: What a request may cost.
        metrics: Where it reports.
    """

    def __init__(self, identity: ModelIdentity, limits: Limits, metrics: ServingMetrics) -> None:
        self.identity = identity
        self.limits = limits
        self.metrics = metrics
        self.queue = EngineQueue(
            capacity=limits.max_requests,
            timeout_s=limits.request_timeout_s,
            metrics=metrics,
            concurrency=limits.max_running,
        )

    async def open(self, slot: Slot, request: ChatRequest) -> Stream:
        """Decode the request's images and return its answer's stream once the engine has begun.

        Raises:
            ApiError: The request cannot be served.
        """
        longest = self.queue.engine.max_length
        if request.token_limit is not None and request.token_limit > longest:
            message = f"{request.token_limit} tokens were asked for, this model's longest sequence has {longest}"
            raise ApiError(400, "max_tokens_too_large", message, param="max_tokens")
        # Decoding a large image takes long enough to hold up every other request's tokens.
        messages, images = await asyncio.to_thread(read_conversation, request, self.limits)
        stream = slot.submit(messages, images, request.sampling())
        await stream.opened()
        return stream

    async def answer(self, slot: Slot, request: ChatRequest) -> Completion:
        """Return the whole answer.

        Raises:
            ApiError: The request cannot be served.
        """
        stream = await self.open(slot, request)
        texts, reason = [], "stop"
        logprobs: list[TokenLogprob] = []
        async for delta in stream:
            texts.append(delta.text)
            logprobs += delta.logprobs
            reason = delta.finish_reason or reason
        return Completion(text="".join(texts), finish_reason=reason, usage=stream.usage, logprobs=logprobs)


def read_conversation(request: ChatRequest, limits: Limits) -> tuple[list[Message], dict[str, Image]]:
    """Turn a request into the engine's messages and images; an image sent twice is decoded once.

    Raises:
        ApiError: There are too many images, or one cannot be used.
    """
    total = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
    if total > limits.max_images:
        message = f"the request holds {total} images, at most {limits.max_images} are allowed"
        raise ApiError(400, "too_many_images", message, param="messages")
    keys: dict[str, str] = {}
    images: dict[str, Image] = {}
    messages = []
    for turn, sent in enumerate(request.messages):
        parts = []
        for position, part in enumerate(sent.content):
            if isinstance(part, TextPart):
                parts.append(Part(type="text", value=part.text))
                continue
            url = part.image_url.url
            if url not in keys:
                key = f"image-{len(keys)}"
                images[key] = load_image(url, limits, param=f"messages[{turn}].content[{position}].image_url.url")
                keys[url] = key
            parts.append(Part(type="image", value=keys[url]))
        messages.append(Message(role=_role(sent.role), content=tuple(parts)))
    return messages, images


def _role(sent: str) -> Role:
    # "developer" is OpenAI's newer word for the same turn.
    return "user" if sent == "user" else "assistant" if sent == "assistant" else "system"
