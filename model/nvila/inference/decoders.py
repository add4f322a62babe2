"""What runs the language model on the tokens of a step.

Shape suffixes: T tokens of the step, H language width, R rows that want logits, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nvila.errors import CapabilityError
from nvila.inference.attention import BlockBatch, StepBatch, attending_blocks
from nvila.inference.blocks import BlockPool, CacheShape
from nvila.inference.config import EngineConfig
from nvila.inference.fused import FusedDecoder
from nvila.inference.graphs import GraphedDecoder
from nvila.modeling import NVILAForConditionalGeneration


class Decoder(Protocol):
    """A way to run the language model."""

    def __call__(self, embeds_TH: Tensor, batch: BlockBatch, rows_R: Tensor) -> Tensor:
        """Run tokens of several requests and return logits (R, V) of some of them.

        Args:
            embeds_TH: Embeddings of all new tokens.
            batch: What belongs to whom.
            rows_R: Tokens whose logits are wanted.
        """


class StepDecoder(Protocol):
    """A decoder that asks nothing of the batch but to attend, so that its steps can be recorded."""

    def __call__(self, embeds_TH: Tensor, batch: StepBatch, rows_R: Tensor) -> Tensor:
        """See `Decoder`."""


class TransformersDecoder:
    """The model's own forward, for every decoder that lets its attention be replaced; quantized ones included.

    Args:
        model: The model.
    """

    def __init__(self, model: NVILAForConditionalGeneration) -> None:
        self._model = model

    def __call__(self, embeds_TH: Tensor, batch: StepBatch, rows_R: Tensor) -> Tensor:
        """See `Decoder`."""
        with attending_blocks(self._model.model.language_model.config):
            out = self._model(
                inputs_embeds=embeds_TH[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                logits_to_keep=rows_R,
                block_batch=batch,
            )
        return cast("Tensor", out.logits)[0]


def cache_shape(model: NVILAForConditionalGeneration) -> CacheShape:
    """Read the sizes of keys and values from a model."""
    config: Any = model.config.text_config
    heads = config.num_attention_heads
    return CacheShape(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=cast("torch.dtype", model.get_input_embeddings().weight.dtype),
        device=model.device,
    )


def build_decoder(model: NVILAForConditionalGeneration, config: EngineConfig, pool: BlockPool) -> Decoder:
    """Return the decoder that the configuration asks for, compiled or recorded if it says so.

    Args:
        model: The model.
        config: Which decoder, and whether it is compiled.
        pool: Keys and values of all requests; recorded steps read them where they lie.

    Raises:
        CapabilityError: The decoder does not know the model, or cannot be compiled on its device.
    """
    decoder: TransformersDecoder | FusedDecoder = TransformersDecoder(model)
    if config.decoder in ("fused", "fused-int8"):
        decoder = FusedDecoder(model, int8=config.decoder == "fused-int8")
    if config.compile == "off":
        return decoder
    if model.device.type == "cuda":
        return GraphedDecoder.build(
            decoder,
            pool,
            hidden=model.config.text_config.hidden_size,
            rows=config.max_running,
            unless_slower=config.compile == "auto",
        )
    if config.compile == "on":
        if not isinstance(decoder, FusedDecoder):
            raise CapabilityError(
                f"decoder '{config.decoder}' is not compiled on {model.device.type}",
                "choose decoder fused or fused-int8, or compile auto",
            )
        decoder.compile(config.max_running)
    return decoder
