"""Memory of one GPU in every way of running a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvila.training.config import Offload, PartName, StageConfig, TrainConfig
from nvila.training.planning.activations import Block, buffer_bytes, loss_bytes, stack_bytes
from nvila.training.planning.devices import GIB
from nvila.training.planning.sizes import PartSizes
from nvila.training.planning.states import state_bytes

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

# Of the CUDA context, libraries, and memory that the allocator cannot use.
RESERVE = 3 * GIB
ZERO_STAGES = (0, 1, 2, 3)
# Offloading needs a ZeRO stage.
WAYS: tuple[tuple[int, Offload, bool], ...] = (
    *((zero, "none", checkpointing) for zero in ZERO_STAGES for checkpointing in (False, True)),
    *((zero, "optimizer", checkpointing) for zero in ZERO_STAGES[1:] for checkpointing in (False, True)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process has of a step.

    Args:
        rows: Rows.
        row: Positions of a row.
        tiles: Tiles and frames of all rows.
        projected: Tiles of all rows that the projector sees, after scales are merged.
        supervised: Learned positions of all rows.
    """

    rows: int
    row: int
    tiles: int
    projected: int
    supervised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU in one way of running a stage."""

    zero_stage: int
    offload: Offload
    checkpointing: bool
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether one GPU has so much."""
        return self.total <= self.available

    @property
    def total(self) -> int:
        """All of them, and a reserve."""
        return (
            self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers + RESERVE
        )


def memory_plans(
    config: TrainConfig,
    stage: StageConfig,
    model: NVILAConfig,
    sizes: Mapping[PartName, PartSizes],
    share: Share,
    *,
    gpus: int,
    memory: int,
) -> tuple[MemoryPlan, ...]:
    """Count the memory of every way of running a stage.

    Args:
        config: The run, as the stage sees it.
        stage: The stage.
        model: The model.
        sizes: Parameters of its parts.
        share: What one process has of a step.
        gpus: Number of processes.
        memory: Bytes of one GPU.
    """
    total = sum(part.total for part in sizes.values())
    trained = [size for part in sizes.values() for size in part.trained]
    text = model.text_config
    kept = {way: stage_activations(config, stage, model, share, checkpointing=way) for way in (False, True)}
    logits = loss_bytes(
        share.supervised,
        text.vocab_size,
        text.hidden_size,
        half=config.precision.name != "fp32",
        trained="language" in stage.lr,
    )
    plans = []
    for zero, offload, checkpointing in WAYS:
        state = state_bytes(total, trained, zero_stage=zero, world=gpus, optimizer=config.optimizer, offload=offload)
        plans.append(
            MemoryPlan(
                zero_stage=zero,
                offload=offload,
                checkpointing=checkpointing,
                parameters=state.parameters,
                gradients=state.gradients,
                optimizer=state.optimizer,
                activations=kept[checkpointing],
                logits=logits,
                buffers=buffer_bytes(total, sum(trained), zero_stage=zero, world=gpus),
                host=state.host,
                available=memory,
            )
        )
    return tuple(plans)


def fitting(plans: Sequence[MemoryPlan]) -> MemoryPlan | None:
    """Return the way of running a stage that fits and costs the least time, if there is one.

    Offloading is the slowest, then repeating the forward pass, then the exchange of a higher ZeRO stage.
    """
    fits = [plan for plan in plans if plan.fits]
    return min(fits, key=lambda plan: (plan.offload != "none", plan.checkpointing, plan.zero_stage), default=None)


def stage_activations(
    config: TrainConfig, stage: StageConfig, model: NVILAConfig, share: Share, *, checkpointing: bool
) -> int:
    """Count what tower, projector and decoder keep for the backward pass of one process.

    Args:
        config: Precision and attention, as the stage sees them.
        stage: Which parts learn.
        model: The model.
        share: What the process has of a step.
        checkpointing: Whether layers are computed again instead.
    """
    half = config.precision.name != "fp32"
    decoder, tower = decoder_block(model), tower_block(model)
    patches = (model.tile_size // model.vision_config.patch_size) ** 2
    language = "language" in stage.lr
    kept = stack_bytes(
        decoder,
        model.text_config.num_hidden_layers,
        share.rows * share.row,
        share.row,
        half=half,
        attention=config.attention,
        trained=language,
        checkpointing=checkpointing,
    )
    # The last norm, and the embedded text with visual tokens spliced in.
    kept += share.rows * share.row * decoder.width * 4 * (3 if language else 2)
    if "vision" in stage.lr:
        kept += stack_bytes(
            tower,
            model.num_vision_blocks,
            share.tiles * patches,
            patches,
            half=half,
            attention=config.attention,
            trained=True,
            checkpointing=checkpointing,
        )
        kept += share.tiles * 3 * model.tile_size**2 * (2 if half else 4)
    if "projector" in stage.lr or "vision" in stage.lr:
        kept += _projector_bytes(model, share.projected, half)
    return kept


def decoder_block(model: NVILAConfig) -> Block:
    """Return a layer of the decoder."""
    text = model.text_config
    queries = query_width(model)
    keys = queries // text.num_attention_heads * text.num_key_value_heads
    hidden, inner = text.hidden_size, text.intermediate_size
    return Block(
        width=hidden,
        inner=inner,
        heads=text.num_attention_heads,
        queries=queries,
        keys=keys,
        weights=hidden * (2 * queries + 2 * keys + 3 * inner),
        gated=True,
    )


def tower_block(model: NVILAConfig) -> Block:
    """Return a layer of the vision tower."""
    tower = model.vision_config
    hidden, inner = tower.hidden_size, tower.intermediate_size
    return Block(
        width=hidden,
        inner=inner,
        heads=tower.num_attention_heads,
        queries=hidden,
        keys=hidden,
        weights=hidden * (4 * hidden + 2 * inner),
        gated=False,
    )


def _projector_bytes(model: NVILAConfig, tiles: int, half: bool) -> int:
    """Count what the projector keeps: the inputs of its norms, products and activations."""
    import torch
    from torch import nn

    from nvila.vision.projectors import MultimodalProjector

    with torch.device("meta"):
        projector = MultimodalProjector(model.mm_projector_type, model.mm_channels, model.text_config.hidden_size)
    low, kept, weights, width = 2 if half else 4, 0, 0, 0
    for number, layer in enumerate(one for one in projector.modules() if not list(one.children())):
        if isinstance(layer, nn.LayerNorm):
            kept += int(layer.normalized_shape[0]) * (4 if number <= 1 else low) + 8
        elif isinstance(layer, nn.Linear):
            kept += layer.in_features * low
            weights += layer.weight.numel()
            width = layer.out_features
        elif isinstance(layer, nn.GELU):
            kept += width * low
    return tiles * model.num_image_tokens * kept + (2 * weights if half else 0)


def query_width(model: NVILAConfig) -> int:
    """Return the width of all query heads of a decoder's layer."""
    text = model.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head * text.num_attention_heads)
