"""The inputs of a part's first block on calibration samples: where quantizing block by block starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.calibrated import BlockInputs, Spill

Inputs = Mapping[str, Tensor]
"""Arguments of `NVILAForConditionalGeneration.forward` for one sample."""


class _Stop(Exception):  # noqa: N818  # no error: it ends a forward pass that has shown what was wanted
    pass


@torch.no_grad()
def vision_inputs(model: NVILAForConditionalGeneration, samples: Iterable[Inputs], scratch: Path) -> BlockInputs:
    """Embed the tiles and frames of samples, as the first block of the tower reads them.

    Args:
        model: The model.
        samples: Inputs of the samples.
        scratch: Folder for hidden states.
    """
    tower, spill = model.model.vision_tower, Spill(scratch)
    hidden = []
    for inputs in samples:
        for name in ("pixel_values", "pixel_values_videos"):
            if name in inputs and len(inputs[name]):
                hidden.append(spill.keep(tower.embeddings(inputs[name].to(tower.device, tower.dtype))))
    return BlockInputs(spill=spill, hidden=hidden, arguments=[{}] * len(hidden), positional=(None,))


@torch.no_grad()
def language_inputs(model: NVILAForConditionalGeneration, samples: Iterable[Inputs], scratch: Path) -> BlockInputs:
    """Run everything in front of the decoder's first block: text and, through the tower as it is now, media.

    Args:
        model: The model.
        samples: Inputs of the samples.
        scratch: Folder for hidden states.
    """
    spill = Spill(scratch)
    hidden: list[Tensor] = []
    arguments: list[Mapping[str, Any]] = []
    by_length: dict[int, Mapping[str, Any]] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.pop("hidden_states")
        hidden.append(spill.keep(states))
        # Rows without padding: rotary tables and masks depend on the length alone.
        arguments.append(by_length.setdefault(states.shape[1], {**kwargs, "past_key_values": None}))
        raise _Stop

    first = cast("nn.ModuleList", model.model.language_model.layers)[0]
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for inputs in samples:
            try:
                model.model(**inputs, use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return BlockInputs(spill=spill, hidden=hidden, arguments=arguments)
