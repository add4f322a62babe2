"""Floating-point operations of a training step, in closed form.

A product of (n, k) and (k, m) matrices takes 2nkm operations; everything else (norms, activations, softmax, rotary
embedding) is left out, as in the estimates that MFU is defined with (PaLM, arXiv 2204.02311, appendix B; Kaplan et al.,
arXiv 2001.08361, section 2.1). Attention is counted in full, without the half that a causal mask hides, as there.

These are operations that the model asks for: what gradient checkpointing computes a second time does not count.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nvila.errors import CapabilityError
from nvila.training.config import PartName


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a dense decoder with gated feed-forward layers, as Qwen2 and Llama have them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linear_per_token(self) -> int:
        """Operations of all matrices of the blocks for one token, forward; the head is not among them."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_per_token(self) -> int:
        """Operations of the output layer for one token, forward."""
        return 2 * self.hidden * self.vocabulary

    def attention_per_token(self, context: float) -> float:
        """Operations of scores and weighted values for one token that sees `context` tokens, forward."""
        return 4 * self.layers * self.heads * self.head_dim * context


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """Sizes of the blocks of a vision tower that run, for one tile."""

    blocks: int
    hidden: int
    intermediate: int
    tokens: int
    patch_values: int

    @property
    def embedding_per_tile(self) -> int:
        """Operations of the patch embedding, forward."""
        return 2 * self.tokens * self.patch_values * self.hidden

    @property
    def blocks_per_tile(self) -> int:
        """Operations of the blocks, attention included, forward."""
        linear = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        return self.blocks * self.tokens * (linear + 4 * self.hidden * self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """What training steps of one model cost.

    Args:
        decoder: The language model.
        tower: The vision tower.
        projector_per_tile: Forward operations of the projector for one tile.
    """

    decoder: DecoderShape
    tower: TowerShape
    projector_per_tile: int

    def step(
        self, parts: Collection[PartName], *, tokens: int, tiles: int, context: float, supervised: int = 0
    ) -> float:
        """Operations of one training step, forward and backward.

        The gradient of a matrix product takes one product for its input, when anything before it is trained, and one
        for its weights, when those are. Attention has no weights, so its backward pass takes two wherever a gradient
        passes.

        Args:
            parts: Parts that are trained.
            tokens: Positions of the decoder without padding.
            tiles: Tiles and frames through the tower.
            context: Tokens that a position attends to, without the causal half: the length of its sample.
            supervised: Positions that the output layer is computed for. Without it the head counts nothing and the
                result is a lower bound.
        """
        trained = {part: part in parts for part in ("vision", "projector", "language")}
        below = trained["vision"] or trained["projector"]
        flows = below or trained["language"]
        vision = 3 if trained["vision"] else 1
        # Nobody asks for the gradient of pixels.
        embedding = 2 if trained["vision"] else 1
        total = float(tiles) * (vision * self.tower.blocks_per_tile + embedding * self.tower.embedding_per_tile)
        total += tiles * _passes(below, trained["projector"]) * self.projector_per_tile
        matrices = _passes(flows, trained["language"])
        total += matrices * (tokens * self.decoder.linear_per_token + supervised * self.decoder.head_per_token)
        return total + (3 if flows else 1) * tokens * self.decoder.attention_per_token(context)


def model_flops(config: Any) -> ModelFlops:
    """Read the shapes of a model from its configuration.

    Args:
        config: An `NVILAConfig`.

    Raises:
        CapabilityError: The decoder is not of the dense, gated kind that the formula describes.
    """
    import torch
    from torch import nn

    from nvila.vision.projectors import projector_spec

    text, vision = config.text_config, config.vision_config
    with torch.device("meta"):
        projector = projector_spec(config.mm_projector_type).plan(config.mm_channels, text.hidden_size)
    weights = sum(layer.weight.numel() for layer in projector.modules() if isinstance(layer, nn.Linear))
    return ModelFlops(
        decoder=_decoder_shape(text),
        tower=TowerShape(
            blocks=config.num_vision_blocks,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            tokens=(vision.image_size // vision.patch_size) ** 2,
            patch_values=vision.num_channels * vision.patch_size**2,
        ),
        # Every linear layer of every variant comes behind the compression. How many tiles of Dynamic-S2 are left when
        # its scales have merged is not known here; leaving the projector out keeps the figure a lower bound.
        projector_per_tile=0 if config.uses_s2 else 2 * config.num_image_tokens * weights,
    )


_GATED = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"})


def _decoder_shape(text: Any) -> DecoderShape:
    if text.model_type not in _GATED:
        raise CapabilityError(
            f"there is no formula for the operations of a decoder of type '{text.model_type}'",
            f"known: {', '.join(sorted(_GATED))}",
        )
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
    )


def _passes(flows: bool, trained: bool) -> int:
    """Matrix products a layer takes: forward, for its input's gradient where one is wanted, for its own weights'."""
    return 3 if trained else 2 if flows else 1
