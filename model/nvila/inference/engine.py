"""The inference engine: many conversations at once, each a stream of text.

`stream` prepares a request and lets it wait. Whoever waits for text drives: one caller runs a step of the model for
all requests, the others sleep until it has something for them. No thread of its own, so an engine that nobody reads
does nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvila.assembly import load_model
from nvila.data.records import Message
from nvila.errors import ConfigError, DataError, OverloadedError, nearest
from nvila.inference.answer_text import AnswerText
from nvila.inference.blocks import BlockPool
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import cache_shape
from nvila.inference.delivery import Delivery, drop_frames
from nvila.inference.grammar import GrammarFactory
from nvila.inference.media import MediaCache
from nvila.inference.request import Delta, Generation, Request, Sink, Usage
from nvila.inference.results import Answer, EngineStats
from nvila.inference.sampling import Sampler, SamplingParams, TokenLogprob, choose_token
from nvila.inference.scheduler import Scheduler
from nvila.inference.variants import AdaptedEngine, Variant, Variants
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.video import Video
    from nvila.inference.variants import Adapted

Media = Mapping[str, "Image.Image | Video"]


class Engine:
    """A loaded model that answers conversations.

    The model belongs to the engine while answers run: its attention is replaced for the time of a step.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
        config: Memory and sizes.
        adapters: Models that share the weights of `model`, with their processors, by name
            (`nvila.tuning.adapters.load_beside`).
    """

    def __init__(
        self,
        model: NVILAForConditionalGeneration,
        processor: NVILAProcessor,
        config: EngineConfig | None = None,
        *,
        adapters: Adapted | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = config = config or EngineConfig()
        self.max_length = int(processor.tokenizer.model_max_length)
        self.stop_ids = frozenset(
            {processor.tokenizer.eos_token_id, *_as_ids(model.generation_config.eos_token_id)} - {None}
        )
        self._pool = BlockPool(cache_shape(model), config.kv_cache_bytes, config.block_size)
        self._scheduler = Scheduler(config, self._pool)
        self._media = MediaCache(config.media_cache_bytes)
        self._variants = Variants(model, processor, adapters or {}, config, self._pool, self._media)
        self._delivery = Delivery(self._scheduler, processor.tokenizer, self.stop_ids)
        self._grammars = GrammarFactory(processor.tokenizer, self.stop_ids)
        self._numbers = itertools.count()
        self._steps = 0
        self._encode_s = 0.0
        # Guards everything above and all requests; the model runs outside it, by one caller at a time.
        self._state = threading.RLock()
        self._stepping = False
        # Requests whose readers sleep until there is something for them, or nobody runs steps.
        self._asleep: dict[Request, None] = {}

    @classmethod
    def load(
        cls,
        path: Path,
        config: EngineConfig | None = None,
        *,
        adapters: Mapping[str, Path] | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model folder, wide or quantized.

        Args:
            path: The folder.
            config: Memory and sizes.
            adapters: Folders of adapters over it, by name; they share its weights and are not merged.
            **options: Arguments of `from_pretrained`, such as `dtype` and `device_map`.

        Raises:
            CheckpointError: The folder is not a complete model, or an adapter belongs to another one.
        """
        model, processor = load_model(path, **options)
        if not adapters:
            return cls(model, processor, config)
        from nvila.tuning.adapters import load_beside

        return cls(model, processor, config, adapters=load_beside(model, path, adapters))

    def adapter(self, name: str) -> AdaptedEngine:
        """Return this engine as it answers with one of its adapters.

        Raises:
            ConfigError: It has none of this name.
        """
        if name not in self._variants.adapters:
            raise ConfigError(f"there is no adapter '{name}'", nearest(name, self._variants.adapters))
        return AdaptedEngine(self, self._variants.adapters[name])

    def stream(
        self,
        messages: Sequence[Message],
        images: Media,
        params: SamplingParams,
        *,
        timeout_s: float | None = None,
        variant: Variant | None = None,
    ) -> Generation:
        """Answer a conversation.

        The prompt is the one that the processor makes for `chat`: a single image is tiled as the model was trained.

        Args:
            messages: The conversation; image and video parts hold keys of `images`.
            images: Decoded images, and videos.
            params: How to choose tokens.
            timeout_s: Seconds from now until the answer must be complete.
            variant: Whose answer it is; None for the model's own.

        Returns:
            The running request; the model works while somebody iterates over any request of this engine.

        Raises:
            DataError: An image is missing, or the prompt leaves no room for an answer.
            ConfigError: The JSON schema cannot be followed.
            OverloadedError: Too many requests wait.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request = self._request(messages, images, params, deadline, variant or self._variants.base)
        with self._state:
            shed = self._scheduler.add(request)
            if shed is not None:
                self._delivery.fail(
                    shed, OverloadedError("newer requests took the place of this one", "try again later")
                )
                self._wake()
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
            self._delivery.end(request)
            self._wake()

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

    def _request(
        self,
        messages: Sequence[Message],
        images: Media,
        params: SamplingParams,
        deadline: float | None,
        variant: Variant,
    ) -> Request:
        ids, media = variant.reader.read(messages, images)
        visual = variant.reader.count_visual(ids)
        return Request(
            number=next(self._numbers),
            variant=variant,
            ids=ids,
            media=media,
            params=params,
            limit=min(self._room(variant.max_length, len(ids), visual), params.max_tokens),
            wake=threading.Condition(self._state),
            text=AnswerText(self.processor.tokenizer, params.stop),
            sampler=Sampler(params, ids),
            constraint=None if params.json_schema is None else self._grammars.json(params.json_schema),
            deadline=deadline,
            usage=Usage(prompt_tokens=len(ids), visual_tokens=visual),
        )

    def _room(self, max_length: int, length: int, visual: int) -> int:
        """Return how many tokens the answer to a prompt of this length may have.

        Raises:
            DataError: None at all.
        """
        capacity = self._pool.num_blocks * self.config.block_size
        room = min(max_length, capacity) - length
        if room < 1:
            most, what = (max_length, "model") if max_length <= capacity else (capacity, "KV cache")
            raise DataError(
                f"the prompt has {length} tokens; the {what} takes {most} with its answer",
                f"{visual} of them are visual: send fewer or smaller images" if visual else "shorten the text",
            )
        return room

    # Steps

    def _deliver(self, request: Request, to: Sink) -> None:
        """Hand every piece of a request to `to` as steps make it, until its end."""
        with self._state:
            while request.outbox and isinstance(piece := request.outbox[0], Delta):
                request.outbox.popleft()
                to(piece)
            request.sink = to
        self._next(request)

    def _next(self, request: Request) -> Delta | None:
        """Return the next piece of a request, running steps for all of them as long as it takes; None at the end."""
        driving = False
        while True:
            with self._state:
                if driving:
                    self._wake()
                else:
                    self._sleep(request)
                if request.outbox or request.done:
                    self._leave(driving)
                    return request.take()
                self._stepping = driving = True
            try:
                self._step()
            except BaseException:
                with self._state:
                    self._wake()
                    self._leave(driving)
                raise

    def _sleep(self, request: Request) -> None:
        """Wait until there is something for a request's reader, or nobody runs steps."""
        while not request.outbox and not request.done and self._stepping:
            self._asleep[request] = None
            try:
                request.wake.wait()
            finally:
                self._asleep.pop(request, None)

    def _wake(self) -> None:
        """Wake the readers that there is something for; the others would only stand in the way of the next step."""
        for request in self._asleep:
            if request.outbox or request.done:
                request.wake.notify_all()

    def _leave(self, driving: bool) -> None:
        """Let another reader run the steps if nobody does: the caller has what it came for."""
        if driving:
            self._stepping = False
        if self._stepping:
            return
        heir = next((request for request in self._asleep if not request.outbox and not request.done), None)
        if heir is not None:
            heir.wake.notify_all()

    @torch.inference_mode()
    def _step(self) -> None:
        """Run the tower on some tiles, and the model for all requests that have a part in the next step."""
        try:
            with self._state:
                self._delivery.expire(time.monotonic())
                work = self._scheduler.plan()
                needy = [request for request in self._scheduler.running if request.needs_media()]
                self._steps += 1
            if needy or self._variants.encoding:
                self._encode(needy)
            outcomes = self._variants.run(work)
        except Exception as e:
            # Not the fault of one request, or not known of which.
            with self._state:
                for request in list(self._scheduler.running):
                    self._delivery.fail(request, e, spoiled=True)
            return
        with self._state:
            for one, outcome in outcomes:
                if one.request.done:  # cancelled meanwhile
                    drop_frames(outcome)
                    continue
                if isinstance(outcome, Exception):
                    self._delivery.fail(one.request, outcome, spoiled=True)
                    continue
                self._scheduler.computed(one)
            self._delivery.choose([(one.request, logits) for one, logits in outcomes if isinstance(logits, Tensor)])

    def _encode(self, needy: Sequence[Request]) -> None:
        """Have some tiles seen by the tower; requests whose media are complete take part in the next step."""
        began = time.monotonic()
        seen = list(self._variants.encode(needy))
        self._encode_s += time.monotonic() - began
        for request, found in seen:
            features = [found[medium.digest] for medium in request.media if medium.digest in found]
            failed = next((one for one in features if isinstance(one, Exception)), None)
            if failed is not None:
                with self._state:
                    if not request.done:
                        self._delivery.fail(request, failed)
            elif len(features) == len(request.media):
                request.set_features([one for one in features if isinstance(one, Tensor)])


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
