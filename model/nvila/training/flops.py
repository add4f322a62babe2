"""Floating-point operations of a training step, in closed form.

A product of (m, k) and (k, n) matrices takes 2 m k n operations; everything else (norms, activations, softmax, rotary
embedding) is left out, as in the estimates that MFU is defined with (PaLM, arXiv 2204.02311, appendix B; Kaplan et al.,
arXiv 2001.08361, section 2.1). The forward pass of a linear layer with P weights takes 2 P for each position, and
attention over rows of n positions 4 n w for each position and layer of width w; the half that a causal mask hides is
counted too, as there. The backward pass takes as much again for the gradients of inputs, and as much again for those of
weights, where they are wanted.

The plan of a run (`nvila.training.planning`) and the meter of a running one count with the same formula.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nvila.errors import CapabilityError
from nvila.training.config import PartName


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWork:
    """The forward pass of one part over some positions.

    Args:
        weights: Weights of the linear layers that a position goes through.
        positions: Positions over which they run.
        attention: Sum over attention layers and rows of n * n * width; 0 without attention.
    """

    weights: int
    positions: float
    attention: float = 0.0

    @property
    def linear(self) -> float:
        """Operations of linear layers."""
        return 2 * self.weights * self.positions

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.linear + 4 * self.attention


def step_operations(
    work: dict[PartName, PartWork], head: PartWork, trained: Collection[PartName], *, checkpointing: bool = False
) -> float:
    """Count the operations of forward and backward pass.

    Args:
        work: Forward work of every part over a step.
        head: The language-model head, over the supervised positions.
        trained: Parts that learn; gradients flow back to the first of them.
        checkpointing: Whether decoder and tower run forward once more.
    """
    flows = {
        "vision": "vision" in trained,
        "projector": "vision" in trained or "projector" in trained,
        "language": True,
    }
    total = 0.0
    for part, one in work.items():
        total += one.forward
        # In the decoder gradients flow back to the projector, or to its own first layer.
        if flows[part]:
            total += one.linear + 8 * one.attention + (one.linear if part in trained else 0.0)
            total += one.forward if checkpointing and part != "projector" else 0.0
    return total + head.forward * (3 if "language" in trained else 2)


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
    def weights(self) -> int:
        """Weights of all matrices of the blocks; the head is not among them."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def work(self, tokens: int, context: float) -> PartWork:
        """Return the forward pass over `tokens` positions, each of which attends to `context` of them."""
        width = self.layers * self.heads * self.head_dim
        return PartWork(weights=self.weights, positions=tokens, attention=width * tokens * context)

    def head(self, positions: int) -> PartWork:
        """Return the forward pass of the output layer over some positions."""
        return PartWork(weights=self.hidden * self.vocabulary, positions=positions)


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

    def work(self, tiles: int) -> PartWork:
        """Return the forward pass of the blocks over some tiles."""
        return PartWork(
            weights=self.blocks * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate),
            positions=tiles * self.tokens,
            attention=self.blocks * tiles * self.tokens**2 * self.hidden,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """What training steps of one model cost.

    Args:
        decoder: The language model.
        tower: The vision tower.
        projector_weights: Weights of the linear layers of the projector.
        projected_per_tile: Positions of a tile that they run over; 0 leaves the projector out.
    """

    decoder: DecoderShape
    tower: TowerShape
    projector_weights: int
    projected_per_tile: int

    def step(
        self, parts: Collection[PartName], *, tokens: int, tiles: int, context: float, supervised: int = 0
    ) -> float:
        """Operations of one training step, forward and backward.

        These are what the model asks for: what gradient checkpointing computes a second time does not count.

        Args:
            parts: Parts that are trained.
            tokens: Positions of the decoder without padding.
            tiles: Tiles and frames through the tower.
            context: Tokens that a position attends to, without the causal half: the length of its sample.
            supervised: Positions that the output layer is computed for. Without it the head counts nothing and the
                result is a lower bound.
        """
        work: dict[PartName, PartWork] = {
            "vision": self.tower.work(tiles),
            "projector": PartWork(weights=self.projector_weights, positions=tiles * self.projected_per_tile),
            "language": self.decoder.work(tokens, context),
        }
        # Nobody asks for the gradient of pixels.
        embedding = tiles * (2 if "vision" in parts else 1) * self.tower.embedding_per_tile
        return step_operations(work, self.decoder.head(supervised), parts) + embedding


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
        projector_weights=weights,
        # Every linear layer of every variant comes behind the compression. How many tiles of Dynamic-S2 are left when
        # its scales have merged is not known here; leaving the projector out keeps the figure a lower bound.
        projected_per_tile=0 if config.uses_s2 else config.num_image_tokens,
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
