"""The OpenAI-compatible endpoints: chat and text completions, and the model list.

The KServe SDK's own OpenAI module needs vLLM installed and flattens messages to text, which loses their images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from nvila_platform.serving.answers import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatUsage,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    ChunkDelta,
    ModelCard,
    ModelList,
    TextChoice,
    TextCompletion,
    TextLogprobs,
)
from nvila_platform.serving.description import body_of
from nvila_platform.serving.errors import REQUEST_ID, ApiError
from nvila_platform.serving.express import Endpoint
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.json_body import decode_json
from nvila_platform.serving.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion
from nvila_platform.serving.served import Target, Version, answered_by
from nvila_platform.serving.service import ChatService
from nvila_platform.serving.stream import Completion, Stream
from nvila_platform.serving.streaming import EventStream, events

if TYPE_CHECKING:
    from nvila.inference.engine import Delta, Usage

PREFIX = "/openai/v1"
_EMPTY = '"content":""'


def build_endpoints(service: ChatService) -> dict[str, Endpoint]:
    """Return what answers questions to one service, by path."""

    async def chat(request: Request, held: ExitStack) -> Response:
        service.queue.check_room()
        asked = parse_chat(await read_json(request))
        target = service.target(asked.model)
        slot = held.enter_context(service.queue.admit(service.cost(target, asked, [asked.messages]), target))
        if not asked.stream:
            return JSONResponse(_chat_body(target, asked, await service.answer(slot, asked, asked.messages)))
        streams = await service.submit(slot, asked, asked.messages)
        return await _stream(service, streams, _ChatEvents(target, asked, [streams]))

    async def completions(request: Request, held: ExitStack) -> Response:
        service.queue.check_room()
        asked = parse_completion(await read_json(request))
        target = service.target(asked.model)
        chats = asked.chats()
        slot = held.enter_context(service.queue.admit(service.cost(target, asked, chats), target))
        prompts = [await service.submit(slot, asked, messages) for messages in chats]
        streams = [stream for answers in prompts for stream in answers]
        if asked.stream:
            return await _stream(service, streams, _TextEvents(target, asked, prompts))
        return JSONResponse(await _text_body(target, asked, prompts))

    return {f"{PREFIX}/chat/completions": chat, f"{PREFIX}/completions": completions}


def build_router(service: ChatService) -> APIRouter:
    """Return the routes under `/openai/v1` for one service; those that `Express` answers are described only."""
    router = APIRouter(tags=["OpenAI"])
    bodies: dict[str, type[BaseModel]] = {"chat/completions": ChatRequest, "completions": CompletionRequest}

    async def described() -> Response:
        raise AssertionError("Express answers this before the framework sees it")

    async def models() -> Response:
        cards = [_card(service.version, one) for one in service.version]
        return JSONResponse(ModelList(data=cards).model_dump())

    async def model(model: str) -> Response:
        identity = service.version.find(model)
        answered_by(identity)
        return JSONResponse(_card(service.version, identity).model_dump())

    for path, body in bodies.items():
        router.add_api_route(
            f"{PREFIX}/{path}",
            described,
            name=path.replace("/", "_"),
            methods=["POST"],
            response_model=None,
            openapi_extra=body_of(body),
        )
    router.add_api_route(f"{PREFIX}/models", models, methods=["GET"], response_model=None)
    router.add_api_route(f"{PREFIX}/models/{{model}}", model, methods=["GET"], response_model=None)
    return router


async def read_json(request: Request) -> Any:
    """Read and decode a JSON body.

    Raises:
        ApiError: The body is of another type or is not JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages out: a browser sends JSON to another origin only after asking, and we never agree.
        raise ApiError(415, "unsupported_media_type", "send the body as content-type: application/json")
    return decode_json(await request.body())


class _Events:
    """Makes the events of one streamed request.

    Args:
        target: The model that answers.
        request: What was asked.
        prompts: The answers to every prompt.
    """

    def __init__(
        self, target: Target, request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[Stream]]
    ) -> None:
        self.envelope = _envelope(target, "chatcmpl" if isinstance(request, ChatRequest) else "cmpl")
        self._request = request
        self._prompts = prompts
        self._frames: dict[int, tuple[str, str]] = {}

    def opening(self) -> str:
        """Return what is sent before any piece."""
        return ""

    def piece(self, number: int, delta: Delta) -> str:
        """Return the events of a piece."""
        raise NotImplementedError

    def usage(self) -> ChatUsage | None:
        """Return the counts of all answers, if the client wants them."""
        if not self._request.include_usage:
            return None
        return ChatUsage.over([[stream.usage for stream in answers] for answers in self._prompts])

    def last(self) -> str:
        """Return what comes before the end."""
        raise NotImplementedError


class _ChatEvents(_Events):
    def opening(self) -> str:
        deltas = enumerate([ChunkDelta(role="assistant", content="")] * self._request.n)
        return "".join(self._event(ChunkChoice(index=number, delta=delta)) for number, delta in deltas)

    def piece(self, number: int, delta: Delta) -> str:
        if delta.text and not (delta.finish_reason or self._request.logprobs):
            # Nearly every piece; models of pydantic for each take several times as long.
            before, after = self._frame(number)
            return f"{before}{json.dumps(delta.text, ensure_ascii=False)}{after}"
        text = ""
        if delta.text or delta.logprobs:
            reported = ChoiceLogprobs.of(delta.logprobs) if self._request.logprobs else None
            text += self._event(ChunkChoice(index=number, delta=ChunkDelta(content=delta.text), logprobs=reported))
        if delta.finish_reason:
            text += self._event(ChunkChoice(index=number, delta=ChunkDelta(), finish_reason=delta.finish_reason))
        return text

    def last(self) -> str:
        usage = self.usage()
        return "" if usage is None else _event(ChatChunk(**self.envelope, choices=[], usage=usage))

    def _frame(self, number: int) -> tuple[str, str]:
        """Return what stands around the text of a piece."""
        if number not in self._frames:
            before, key, after = self._event(ChunkChoice(index=number, delta=ChunkDelta(content=""))).partition(_EMPTY)
            self._frames[number] = before + key.removesuffix('""'), after
        return self._frames[number]

    def _event(self, choice: ChunkChoice) -> str:
        return _event(ChatChunk(**self.envelope, choices=[choice]))


class _TextEvents(_Events):
    def piece(self, number: int, delta: Delta) -> str:
        if not (delta.text or delta.finish_reason):
            return ""
        reported = None if self._request.logprobs is None else TextLogprobs.of(delta.logprobs)
        choice = TextChoice(index=number, text=delta.text, logprobs=reported, finish_reason=delta.finish_reason)
        return _event(TextCompletion(**self.envelope, choices=[choice]))

    def last(self) -> str:
        usage = self.usage()
        return "" if usage is None else _event(TextCompletion(**self.envelope, choices=[], usage=usage))


async def _stream(service: ChatService, streams: Sequence[Stream], made: _Events) -> Response:
    keep_alive_s = service.limits.keep_alive_s
    # A refusal by the engine still becomes a status; after this long a stream that says it lives is worth more.
    await streams[0].opened(keep_alive_s)

    return EventStream(events(streams, keep_alive_s, made.opening(), made.piece, made.last, service.rejected))


def _chat_body(target: Target, request: ChatRequest, answers: Sequence[Completion]) -> dict[str, Any]:
    choices = [
        Choice(
            index=number,
            message=AnswerMessage(content=done.text),
            finish_reason=done.finish_reason,
            logprobs=ChoiceLogprobs.of(done.logprobs) if request.logprobs else None,
        )
        for number, done in enumerate(answers)
    ]
    usage = ChatUsage.over([[done.usage for done in answers]])
    return ChatCompletion(**_envelope(target, "chatcmpl"), choices=choices, usage=usage).model_dump()


async def _text_body(target: Target, request: CompletionRequest, prompts: Sequence[Sequence[Stream]]) -> dict[str, Any]:
    choices: list[TextChoice] = []
    usages: list[list[Usage]] = []
    for streams in prompts:
        answers = [await stream.collected() for stream in streams]
        usages.append([done.usage for done in answers])
        for done in answers:
            reported = None if request.logprobs is None else TextLogprobs.of(done.logprobs)
            choices.append(
                TextChoice(index=len(choices), text=done.text, logprobs=reported, finish_reason=done.finish_reason)
            )
    usage = ChatUsage.over(usages)
    return TextCompletion(**_envelope(target, "cmpl"), choices=choices, usage=usage).model_dump()


def _event(chunk: ChatChunk | TextCompletion) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"


def _envelope(target: Target, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{REQUEST_ID.get() or uuid4().hex}",
        "created": int(time.time()),
        "model": target.identity.name,
        "system_fingerprint": target.identity.fingerprint,
    }


def _card(version: Version, identity: ModelIdentity) -> ModelCard:
    return ModelCard(
        id=identity.name,
        created=identity.created,
        version=identity.version,
        digest=identity.digest,
        root=version.identity.name,
        parent=None if identity is version.identity else version.identity.name,
    )
