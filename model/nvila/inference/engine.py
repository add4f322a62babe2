"""The inference engine: many conversations at once, each a stream of text.

`stream` prepares a request and lets it wait. Whoever waits for text drives: one caller runs a step of the model for
all requests, the others sleep until it has something for them. No thread of its own, so an engine that nobody reads
does nothing.

Shape suffixes: T tokens of a step, M visual tokens, H language width, R rows that want logits, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nvila.assembly import load_model
from nvila.data.records import Message, Part
from nvila.errors import DataError, DeadlineError, NvilaError, OverloadedError
from nvila.inference.answer_text import AnswerText
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.choosing import choose_all
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import build_decoder, cache_shape
from nvila.inference.grammar import GrammarFactory
from nvila.inference.media import MediaCache, MediaEncoder, split_media
from nvila.inference.request import Delta, FinishReason, Generation, Request, Usage
from nvila.inference.sampling import Sampler, SamplingParams, TokenLogprob, choose_token
from nvila.inference.scheduler import Scheduler, Work
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

if TYPE_CHECKING:
    from PIL import Image

    from nvila.configuration import NVILAConfig
    from nvila.data.video import Video

logger = logging.getLogger(__name__)
Media = Mapping[str, "Image.Image | Video"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine holds at a moment, and what it has done so far."""

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    media_bytes: int
    media_hits: int
    media_misses: int
    preemptions: int
    steps: int
    encode_s: float


class Engine:
    """A loaded model that answers conversations.

    The model belongs to the engine while answers run: its attention is replaced for the time of a step.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
        config: Memory and sizes.
    """

    def __init__(
        self, model: NVILAForConditionalGeneration, processor: NVILAProcessor, config: EngineConfig | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = config = config or EngineConfig()
        self.max_length = int(processor.tokenizer.model_max_length)
        self._placeholders = torch.tensor([model.config.image_token_id, model.config.video_token_id])
        self._stop_ids = {processor.tokenizer.eos_token_id, *_as_ids(model.generation_config.eos_token_id)} - {None}
        self._pool = BlockPool(cache_shape(model), config.kv_cache_bytes, config.block_size)
        self._scheduler = Scheduler(config, self._pool)
        self._media = MediaCache(config.media_cache_bytes)
        self._encoder = MediaEncoder(model.model, self._media, config.encode_tiles)
        self._decoder = build_decoder(model, config)
        self._grammars = GrammarFactory(processor.tokenizer, self._stop_ids)
        self._numbers = itertools.count()
        self._steps = 0
        self._encode_s = 0.0
        # Guards everything above and all requests; the model runs outside it, by one caller at a time.
        self._state = threading.Condition()
        self._stepping = False

    @classmethod
    def load(cls, path: Path, config: EngineConfig | None = None, **options: Any) -> Engine:
        """Load a model folder, wide or quantized.

        Args:
            path: The folder.
            config: Memory and sizes.
            **options: Arguments of `from_pretrained`, such as `dtype` and `device_map`.

        Raises:
            CheckpointError: The folder is not a complete model.
        """
        return cls(*load_model(path, **options), config)

    def stream(
        self, messages: Sequence[Message], images: Media, params: SamplingParams, *, timeout_s: float | None = None
    ) -> Generation:
        """Answer a conversation.

        The prompt is the one that the processor makes for `chat`: a single image is tiled as the model was trained.

        Args:
            messages: The conversation; image and video parts hold keys of `images`.
            images: Decoded images, and videos.
            params: How to choose tokens.
            timeout_s: Seconds from now until the answer must be complete.

        Returns:
            The running request; the model works while somebody iterates over any request of this engine.

        Raises:
            DataError: An image is missing, or the prompt leaves no room for an answer.
            ConfigError: The JSON schema cannot be followed.
            OverloadedError: Too many requests wait.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request = self._request(self._inputs(messages, images), params, deadline)
        with self._state:
            shed = self._scheduler.add(request)
            if shed is not None:
                self._fail(shed, OverloadedError("newer requests took the place of this one", "try again later"))
        return Generation(self, request)

    def generate(
        self, conversations: Sequence[tuple[Sequence[Message], Media]], params: SamplingParams
    ) -> list[Answer]:
        """Answer several conversations together.

        Args:
            conversations: Messages and media of each.
            params: How to choose tokens, of all.

        Returns:
            One answer for each, in order.

        Raises:
            NvilaError: As `stream` does, for the first conversation that cannot be answered; none goes on then.
        """
        running: list[Generation] = []
        try:
            running += [self.stream(messages, media, params) for messages, media in conversations]
            return [_collected(one) for one in running]
        finally:
            for one in running:
                one.close()

    def abort(self, generation: Generation) -> None:
        """Cancel a request and free its memory at once; harmless when it has ended or was cancelled before."""
        request = generation._request
        with self._state:
            if request.done:
                request.outbox.clear()
                return
            request.outbox.clear()
            self._end(request)
            self._state.notify_all()

    def stats(self) -> EngineStats:
        """Return what the engine holds now."""
        with self._state:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                blocks=self._pool.num_blocks,
                blocks_used=self._pool.num_used,
                media_bytes=self._media.size,
                media_hits=self._media.hits,
                media_misses=self._media.misses,
                preemptions=self._scheduler.num_preemptions,
                steps=self._steps,
                encode_s=self._encode_s,
            )

    # From messages to a request

    def _inputs(self, messages: Sequence[Message], media: Media) -> dict[str, Tensor]:
        """Return `input_ids` and the tensors of the media; one prompt needs no mask."""

        def content(part: Part) -> dict[str, object]:
            if part.type != "text" and part.value not in media:
                raise DataError(f"{part.type} '{part.value}' of the conversation was not given", "send every medium")
            return {"type": part.type, part.type: part.value if part.type == "text" else media[part.value]}

        conversation = [
            {"role": message.role, "content": [content(part) for part in message.content]} for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        inputs.pop("attention_mask")
        return dict(inputs)

    def _request(self, inputs: Mapping[str, Tensor], params: SamplingParams, deadline: float | None) -> Request:
        ids = inputs["input_ids"][0]
        visual = int(torch.isin(ids, self._placeholders).sum())
        limit = min(self._room(len(ids), visual), params.max_tokens)
        return Request(
            number=next(self._numbers),
            ids=ids.tolist(),
            media=split_media(inputs, cast("NVILAConfig", self.model.config), self.processor.media_tokens),
            params=params,
            limit=limit,
            text=AnswerText(self.processor.tokenizer, params.stop),
            sampler=Sampler(params, ids.tolist()),
            constraint=None if params.json_schema is None else self._grammars.json(params.json_schema),
            deadline=deadline,
            usage=Usage(prompt_tokens=len(ids), visual_tokens=visual),
        )

    def _room(self, length: int, visual: int) -> int:
        """Return how many tokens the answer to a prompt of this length may have.

        Raises:
            DataError: None at all.
        """
        capacity = self._pool.num_blocks * self.config.block_size
        room = min(self.max_length, capacity) - length
        if room < 1:
            most, what = (self.max_length, "model") if self.max_length <= capacity else (capacity, "KV cache")
            raise DataError(
                f"the prompt has {length} tokens; the {what} takes {most} with its answer",
                f"{visual} of them are visual: send fewer or smaller images" if visual else "shorten the text",
            )
        return room

    # Steps

    def _next(self, request: Request) -> Delta:
        """Return the next piece of a request, running steps for all of them as long as it takes."""
        while True:
            with self._state:
                while not request.outbox and not request.done and self._stepping:
                    self._state.wait()
                if request.outbox:
                    event = request.outbox.popleft()
                    if isinstance(event, Exception):
                        raise event
                    return event
                if request.done:
                    raise StopIteration
                self._stepping = True
            try:
                self._step()
            finally:
                with self._state:
                    self._stepping = False
                    self._state.notify_all()

    @torch.inference_mode()
    def _step(self) -> None:
        """Run the model once for all requests that have a part in the next step."""
        try:
            with self._state:
                self._expire()
                work = self._scheduler.plan()
                self._steps += 1
            work = self._with_media(work)
            outcomes = self._run(work)
        except Exception as e:
            # Not the fault of one request, or not known of which.
            with self._state:
                for request in list(self._scheduler.running):
                    self._fail(request, e, spoiled=True)
            return
        with self._state:
            for one, outcome in outcomes:
                if one.request.done:  # cancelled meanwhile
                    continue
                if isinstance(outcome, Exception):
                    self._fail(one.request, outcome, spoiled=True)
                    continue
                self._scheduler.computed(one)
            self._choose([(one.request, logits) for one, logits in outcomes if isinstance(logits, Tensor)])

    def _with_media(self, work: Sequence[Work]) -> list[Work]:
        """Get the visual tokens that this step needs and return the work of requests that have theirs."""
        needy = [one.request for one in work if one.request.needs_media()]
        if not needy:
            return list(work)
        began = time.monotonic()
        features = self._encoder.encode([medium for request in needy for medium in request.media])
        self._encode_s += time.monotonic() - began
        for request in needy:
            found = [features[medium.digest] for medium in request.media]
            failed = next((one for one in found if isinstance(one, Exception)), None)
            if failed is None:
                request.set_features([one for one in found if isinstance(one, Tensor)])
                continue
            with self._state:
                self._fail(request, failed)
        return [one for one in work if not one.request.done]

    def _run(self, work: Sequence[Work]) -> list[tuple[Work, Tensor | Exception]]:
        """Run the model; a request that it fails on gets its error, and the others their logits (V)."""
        if not work:
            return []
        try:
            logits = self._logits(work)
        except Exception as e:
            if len(work) == 1:
                return [(work[0], e)]
            # Keys and values are written again to the same places, so a second try changes nothing for the others.
            return [outcome for one in work for outcome in self._run([one])]
        return [(one, row if row.isfinite().all() else _not_finite()) for one, row in zip(work, logits, strict=True)]

    def _logits(self, work: Sequence[Work]) -> Tensor:
        """Return logits (R, V) in fp32 on the CPU, one row for the last new token of every request."""
        spans = [Span(one.request.blocks, one.request.computed, one.length) for one in work]
        rows = torch.tensor([span.length for span in spans]).cumsum(0) - 1
        batch = BlockBatch(self._pool, spans)
        device = batch.positions_T.device
        ids = [token for one, span in zip(work, spans, strict=True) for token in one.request.ids[span.start : span.end]]
        embeds_TH = self.model.get_input_embeddings()(torch.tensor(ids, device=device))
        at = 0
        for one, span in zip(work, spans, strict=True):
            request = one.request
            if request.places is not None and request.features is not None and span.start < request.usage.prompt_tokens:
                first, after = torch.searchsorted(request.places, torch.tensor([span.start, span.end])).tolist()
                places = (request.places[first:after] + (at - span.start)).to(device)
                embeds_TH.index_copy_(0, places, request.features[first:after].to(device, embeds_TH.dtype))
            at += span.length
        return self._decoder(embeds_TH, batch, rows.to(device)).float().cpu()

    def _choose(self, rows: Sequence[tuple[Request, Tensor]]) -> None:
        """Choose the next token of every request whose prompt is complete."""
        ready = [(request, logits) for request, logits in rows if not request.done and not request.pending]
        for request, outcome in choose_all(ready, self.processor.tokenizer, self._stop_ids):
            if isinstance(outcome, Exception):
                self._fail(request, outcome)
            else:
                self._take(request, outcome)

    def _take(self, request: Request, token: int) -> None:
        """Add a chosen token to a request's answer, and end it where it ends."""
        complete = request.constraint is not None and request.constraint.complete
        if token in self._stop_ids:
            self._post(request, request.text.rest(), "stop")
            return
        request.ids.append(token)
        request.usage.completion_tokens += 1
        piece = request.text.add(token)
        if request.text.stopped:
            self._post(request, piece, "stop")
        elif complete:
            self._post(request, piece + request.text.rest(), "stop")
        elif request.usage.completion_tokens >= request.limit:
            self._post(request, piece + request.text.rest(), "length")
        elif piece:
            self._post(request, piece, None)

    def _post(self, request: Request, text: str, reason: FinishReason | None) -> None:
        request.outbox.append(Delta(text, reason, tuple(request.logprobs)))
        request.logprobs.clear()
        if reason is not None:
            self._end(request)

    def _expire(self) -> None:
        now = time.monotonic()
        for request in (*self._scheduler.running, *self._scheduler.waiting):
            if request.deadline is not None and now >= request.deadline:
                self._fail(
                    request, DeadlineError("the answer took longer than the request allows", "ask for fewer tokens")
                )

    def _fail(self, request: Request, error: Exception, *, spoiled: bool = False) -> None:
        request.outbox.append(error)
        self._end(request, spoiled=spoiled)

    def _end(self, request: Request, *, spoiled: bool = False) -> None:
        request.done = True
        self._scheduler.remove(request, spoiled=spoiled)
        request.features = None


def _collected(generation: Generation) -> Answer:
    deltas = list(generation)
    reason = deltas[-1].finish_reason
    assert reason is not None, "an answer ended without a reason"
    return Answer(
        "".join(delta.text for delta in deltas),
        reason,
        generation.usage,
        tuple(one for delta in deltas for one in delta.logprobs),
    )


def _not_finite() -> NvilaError:
    return NvilaError("the model's prediction for this request is not finite", "check the weights and the input")


def _as_ids(eos: int | Sequence[int] | None) -> Sequence[int]:
    return () if eos is None else (eos,) if isinstance(eos, int) else eos


__all__ = [
    "Answer",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Generation",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
    "choose_token",
]
