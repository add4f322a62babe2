"""The model of an engine and its adapters: what runs for whom.

Variants share the base's weights, the blocks, the schedule and the cache of visual tokens. A step runs each of them
once, on the tokens of its own requests; a prompt's keys, values and visual tokens are known only to the variant that
made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from nvila.errors import CheckpointError
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import TransformersDecoder, build_decoder
from nvila.inference.encoding import MediaEncoder
from nvila.inference.prompt import PromptReader
from nvila.inference.runner import ModelRunner

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig
    from nvila.data.records import Message
    from nvila.inference.blocks import BlockPool
    from nvila.inference.engine import Engine, Media
    from nvila.inference.media import MediaCache
    from nvila.inference.request import Generation, Request
    from nvila.inference.results import EngineStats
    from nvila.inference.sampling import SamplingParams
    from nvila.inference.scheduler import Work
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

    Adapted = Mapping[str, tuple[NVILAForConditionalGeneration, NVILAProcessor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
    """One of the models that an engine answers with.

    Args:
        salt: Goes into the digests of its prompts, so that no other variant takes over what it computed.
        processor: Its processor.
        reader: Reads conversations.
        encoder: Runs its tower and projector.
        runner: Runs its language model.
    """

    salt: bytes
    processor: NVILAProcessor
    reader: PromptReader
    encoder: MediaEncoder
    runner: ModelRunner

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and answer together."""
        return int(self.processor.tokenizer.model_max_length)


class Variants:
    """The base and its adapters.

    Args:
        model: The base.
        processor: Its processor.
        adapted: Models over the same weights, with their processors, by name.
        config: Memory and sizes.
        pool: Blocks of all.
        media: Visual tokens of all.

    Raises:
        CheckpointError: An adapter has another tokenizer than the base.
    """

    def __init__(
        self,
        model: NVILAForConditionalGeneration,
        processor: NVILAProcessor,
        adapted: Adapted,
        config: EngineConfig,
        pool: BlockPool,
        media: MediaCache,
    ) -> None:
        def make(
            own: NVILAForConditionalGeneration, reads: NVILAProcessor, salt: bytes, runner: ModelRunner
        ) -> Variant:
            return Variant(
                salt=salt,
                processor=reads,
                reader=PromptReader(reads, cast("NVILAConfig", own.config), media, salt),
                encoder=MediaEncoder(own.model, media, config.encode_tiles),
                runner=runner,
            )

        self.base = make(model, processor, b"", ModelRunner(model, build_decoder(model, config, pool), pool))
        self.adapters: dict[str, Variant] = {}
        words = processor.tokenizer.get_vocab()
        for name, (own, reads) in adapted.items():
            if reads.tokenizer.get_vocab() != words:
                raise CheckpointError(f"the adapter '{name}' has another tokenizer than its base", "serve it alone")
            # Fused decoders know no adapters: they would answer as the base does.
            runner = ModelRunner(own, TransformersDecoder(own), pool)
            self.adapters[name] = make(own, reads, name.encode(), runner)

    def __iter__(self) -> Iterator[Variant]:
        yield self.base
        yield from self.adapters.values()

    @property
    def encoding(self) -> bool:
        """Whether a tower holds tiles of media that may have been given up since."""
        return any(variant.encoder.busy for variant in self)

    def run(self, work: Sequence[Work]) -> list[tuple[Work, Tensor | Exception]]:
        """Run a step's work, each variant on its own part; see `ModelRunner.run`."""
        outcomes: list[tuple[Work, Tensor | Exception]] = []
        for variant in self:
            outcomes += variant.runner.run([one for one in work if one.request.variant is variant])
        return outcomes

    def encode(self, needy: Sequence[Request]) -> Iterator[tuple[Request, dict[bytes, Tensor | Exception]]]:
        """Have each tower see some tiles; yield the requests, each with what is known of its media and others'."""
        for variant in self:
            mine = [request for request in needy if request.variant is variant]
            if mine or variant.encoder.busy:
                found = variant.encoder.advance([medium for request in mine for medium in request.media])
                yield from ((request, found) for request in mine)


class AdaptedEngine:
    """An engine that answers with one of its adapters; everything else is the engine's.

    Args:
        engine: The engine.
        variant: The adapter.
    """

    def __init__(self, engine: Engine, variant: Variant) -> None:
        self._engine = engine
        self._variant = variant

    @property
    def processor(self) -> NVILAProcessor:
        """The adapter's processor."""
        return self._variant.processor

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""
        return self._variant.max_length

    def stream(
        self, messages: Sequence[Message], images: Media, params: SamplingParams, *, timeout_s: float | None = None
    ) -> Generation:
        """Answer a conversation; see `Engine.stream`."""
        return self._engine.stream(messages, images, params, timeout_s=timeout_s, variant=self._variant)

    def stats(self) -> EngineStats:
        """Return what the whole engine holds now."""
        return self._engine.stats()


__all__ = ["AdaptedEngine", "Variant", "Variants"]
