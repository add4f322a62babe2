"""One training step on tensors without data: its peak memory, before any weights are read.

The model is built on the meta device, prepared as for the real run, and taken through forward pass, backward pass and
update while live tensors are counted, as `nvila.tuning.measuring` counts them in the real run. So whatever autograd
keeps for a method is counted because it is kept, not because a formula knows it. Two things depend on values and are
made of shapes here: splicing in visual tokens, and picking the learned positions.

Shape suffixes: B rows, L positions of a row, T tiles, M learned positions, H width of the decoder.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as _torch_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nvila.losses import WHOLE_LOGITS, head_cross_entropy, token_nll
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Attention, PrecisionConfig
from nvila.training.run import recompute_activations
from nvila.tuning.applying import apply_method
from nvila.tuning.measuring import LiveTensors
from nvila.tuning.methods import TuneMethod

_TRACED_ATTENTION = "nvila_traced_sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The largest forward pass of a run.

    Args:
        rows: Rows.
        row: Positions of a row.
        tiles: Tiles and frames through the tower.
        supervised: Learned positions of all rows.
        micro_batches: Forward passes of a step; gradients of earlier ones live during the last.
        span: Of a row of joined samples, positions of a sample; None where a mask tells samples apart.
    """

    rows: int
    row: int
    tiles: int
    supervised: int
    micro_batches: int = 1
    span: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """Bytes of a step.

    Args:
        peak: Most at one time.
        weights: Weights and other lasting tensors.
        gradients: Gradients of what learns.
        moments: State of AdamW.
    """

    peak: int
    weights: int
    gradients: int
    moments: int

    @property
    def activations(self) -> int:
        """What lives at the peak besides weights and moments."""
        return self.peak - self.weights - self.moments


def trace_step(
    model: NVILAForConditionalGeneration,
    shape: BatchShape,
    *,
    precision: PrecisionConfig,
    attention: Attention = "sdpa",
    checkpointing: bool = False,
    device: str = "cpu",
) -> TracedStep:
    """Count the peak of one step of a prepared model on the meta device.

    Args:
        model: From `traced_model`; afterwards it has gradients and is of no further use.
        shape: The batch.
        precision: Of the run.
        attention: Attention implementation of the run.
        checkpointing: Whether layers are computed again in the backward pass.
        device: Where the run is to be; autocast treats norms differently there.
    """
    half = precision.name == "bf16"
    weights = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [torch.empty_like(p, dtype=torch.float32) for p in trained for _ in range(2)]
    # Under bf16 what learns is in fp32, and the tensors here are the casts that products take.
    wide = [torch.empty_like(p, dtype=torch.float32) for p in trained if p.dtype != torch.float32]
    held = [*weights.values(), *moments, *wide]
    _use_attention(model, attention)
    if checkpointing:
        recompute_activations(model)
        model.enable_input_require_grads()
    model.train()
    gc.collect()
    live = LiveTensors(held)
    lasting = live.current
    gradients: dict[int, Tensor] = {}

    def widen(parameter: Tensor) -> None:
        if id(parameter) not in gradients:
            gradients[id(parameter)] = torch.empty_like(parameter, dtype=torch.float32)
        parameter.grad = None

    hooks: list[Any] = [parameter.register_post_accumulate_grad_hook(widen) for parameter in trained]
    hooks += _cast_like_autocast(model, device) if half else []
    with live:
        # What earlier micro-batches have left.
        if shape.micro_batches > 1:
            for parameter in trained:
                widen(parameter)
        _step(model, shape)
        for parameter in trained:
            widen(parameter)
    for hook in hooks:
        hook.remove()
    moment_bytes = sum(one.numel() * one.element_size() for one in moments)
    return TracedStep(
        peak=live.peak,
        weights=lasting - moment_bytes,
        gradients=sum(one.numel() * one.element_size() for one in gradients.values()),
        moments=moment_bytes,
    )


def traced_model(config: Any, method: TuneMethod, precision: PrecisionConfig) -> NVILAForConditionalGeneration:
    """Build a model on the meta device and prepare it as a run does.

    Args:
        config: The model's configuration.
        method: What learns.
        precision: Under bf16 what does not learn is kept in it.
    """
    from nvila.training.planning.sizes import meta_model

    model = meta_model(config)
    if precision.name == "bf16":
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers types `to` as a function
    apply_method(model, method)
    for parameter in model.parameters():
        if parameter.requires_grad and precision.name == "bf16" and parameter.dim() > 1:
            # Autocast does not reach the meta device; these stand for its casts, `trace_step` adds the fp32 ones.
            parameter.data = parameter.data.to(torch.bfloat16)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _cast_like_autocast(model: nn.Module, device: str) -> list[Any]:
    """Let products take bf16, and on a GPU norms fp32."""

    def cast_to(dtype: torch.dtype) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

        return hook

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for bias in (module.bias,):
                if isinstance(bias, nn.Parameter):
                    bias.data = bias.data.to(torch.bfloat16)
            handles.append(module.register_forward_pre_hook(cast_to(torch.bfloat16)))
        elif isinstance(module, nn.LayerNorm):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
            handles.append(module.register_forward_pre_hook(cast_to(torch.float32)))
            if not device.startswith("cuda"):
                handles.append(module.register_forward_hook(lambda module, inputs, out: out.to(torch.bfloat16)))
    return handles


def _step(model: NVILAForConditionalGeneration, shape: BatchShape) -> None:
    """Forward and backward pass, part by part."""
    config = model.config
    backbone = model.model
    ids_BL = torch.zeros(shape.rows, shape.row, dtype=torch.long, device="meta")
    embeds_BLH = cast("Tensor", backbone.get_input_embeddings()(ids_BL))
    if shape.tiles:
        side = config.tile_size
        pixels = torch.empty(shape.tiles, 3, side, side, device="meta")
        features_TPC = backbone.tower_features(pixels)
        if config.uses_s2:
            # Scales merge into the tiles of the last one, side by side in the channels.
            factor = config.mm_channels // features_TPC.shape[-1]
            tiles = max(1, shape.tiles // factor)
            features_TPC = features_TPC[:tiles].repeat(1, 1, factor)
        tokens = backbone.mm_projector(features_TPC)
        tokens_MH = tokens.flatten(0, 1).to(embeds_BLH.dtype)
        count = min(len(tokens_MH), shape.rows * shape.row)
        places = torch.zeros(count, dtype=torch.long, device="meta")
        embeds_BLH = embeds_BLH.flatten(0, 1).index_copy(0, places, tokens_MH[:count]).view_as(embeds_BLH)
    positions = torch.zeros(shape.rows, shape.row, dtype=torch.long, device="meta")
    hidden_BLH = _decode(backbone.language_model, embeds_BLH, positions, masked=shape.span is None)
    supervised = max(1, min(shape.supervised, shape.rows * (shape.row - 1)))
    chosen = torch.zeros(supervised, dtype=torch.long, device="meta")
    hidden_MH = hidden_BLH[:, :-1].reshape(-1, hidden_BLH.shape[-1]).index_select(0, chosen)
    targets_M = torch.zeros(supervised, dtype=torch.long, device="meta")
    if supervised * model.lm_head.out_features <= WHOLE_LOGITS:
        loss = token_nll(model.lm_head(hidden_MH), targets_M, None).sum()
    else:
        # All positions are learned ones; the meta device cannot see that.
        with _torch_config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]  # added at import
            loss = head_cross_entropy(model.lm_head, hidden_MH, targets_M, reduction="sum")
    (loss / supervised).backward()


def _decode(decoder: nn.Module, embeds_BLH: Tensor, positions: Tensor, *, masked: bool) -> Tensor:
    """Run the decoder under a mask that is given, since making one looks at values; joined samples need none."""
    rows, row = positions.shape
    mask = torch.ones(rows, 1, row, row, dtype=torch.bool, device="meta") if masked else None
    out = decoder(inputs_embeds=embeds_BLH, attention_mask=mask, position_ids=positions, use_cache=False)
    return cast("Tensor", out.last_hidden_state)


def _use_attention(model: NVILAForConditionalGeneration, attention: Attention) -> None:
    if attention == "eager":
        model.set_attn_implementation("eager")
        return
    model.set_attn_implementation("sdpa")
    # The meta device has no fused kernel, and would keep all probabilities in its place.
    ALL_ATTENTION_FUNCTIONS.register(_TRACED_ATTENTION, _traced_attention)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation_internal = _TRACED_ATTENTION


def _traced_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    """Keep what a fused kernel keeps: its inputs, its output and one number for each query."""
    groups = query.shape[1] // key.shape[1]
    # Without a mask kernels take fewer heads of keys as they are.
    if groups > 1 and attention_mask is not None:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = cast("Tensor", _FusedAttention.apply(query, key, value))
    return out.transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        statistics = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
