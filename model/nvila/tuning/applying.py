"""Preparing a model for a method: what is frozen, adapted or kept in 4 bits, and the parameter groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from nvila.errors import CapabilityError, ConfigError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import PARTS, PartName
from nvila.training.engine import ParameterGroup
from nvila.tuning.four_bit import to_four_bit, without_values
from nvila.tuning.methods import ADAPTED, TuneMethod

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
_LORA = ("lora_A", "lora_B", "lora_magnitude_vector")
_PREFIXES: Mapping[PartName, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.mm_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """Parameters of one part.

    Args:
        total: All of them, as they were before adapters came.
        trained: Names of the tensors that learn, with their sizes.
    """

    total: int
    trained: Mapping[str, int]

    @property
    def num_trained(self) -> int:
        """How many numbers learn."""
        return sum(self.trained.values())


def apply_method(model: NVILAForConditionalGeneration, method: TuneMethod) -> None:
    """Freeze, adapt and quantize a model in place; afterwards exactly what learns requires a gradient.

    Args:
        model: The base, on any device, the meta device included.
        method: What to do.

    Raises:
        ConfigError: No parameter matches `method.only`.
        CapabilityError: PEFT is missing, or a layer cannot be kept in 4 bits.
    """
    if method.language == "qlora":
        to_four_bit(model)
    targets = adapted_layers(model, method)
    if targets:
        inject(model, lora_config(method, targets))
    chosen = set(trained_names(model, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def adapted_layers(model: NVILAForConditionalGeneration, method: TuneMethod) -> list[str]:
    """Return the names of the linear layers that get LoRA matrices: all of the part but the head.

    Raises:
        ConfigError: `method.only` leaves nothing to adapt or to train.
    """
    wanted = [
        *(_linear_names(model, _tower_roots(model)) if method.vision == "lora" else ()),
        *(_linear_names(model, ["model.language_model"]) if method.language in ADAPTED else ()),
    ]
    found = [name for name in wanted if _chosen(name, method)]
    if wanted and not found and not list(trained_names(model, method)):
        raise ConfigError(f"only={','.join(method.only)} matches no layer", _pattern_hint(wanted))
    return found


def trained_names(model: NVILAForConditionalGeneration, method: TuneMethod) -> Iterable[str]:
    """Yield the names of the parameters that learn under a method; those of LoRA only after they are there."""
    towers = tuple(f"{root}." for root in _tower_roots(model))
    for name, _ in model.named_parameters():
        part = part_of(name)
        if part is None or not (_is_lora(name) or _chosen(name, method)):
            continue
        how = getattr(method, part)
        if _is_lora(name):
            yield name
        elif part == "vision" and how in ("ln", "full"):
            # Blocks behind the selected layer never receive a gradient.
            if name.startswith(towers) and (how == "full" or ".layer_norm" in name):
                yield name
        elif part != "vision" and how == "full":
            yield name


def part_of(name: str) -> PartName | None:
    """Return the part that a parameter of the model belongs to."""
    return next((part for part in PARTS if name.startswith(_PREFIXES[part])), None)


def parameter_groups(model: nn.Module, rates: Mapping[PartName, float]) -> list[ParameterGroup]:
    """Return what learns by part, with its rate; parts of which nothing learns are left out."""
    groups: dict[PartName, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if parameter.requires_grad and part is not None:
            groups[part].append(parameter)
    return [ParameterGroup(name=part, parameters=found, lr=rates[part]) for part, found in groups.items() if found]


def count_parts(model: nn.Module) -> dict[PartName, PartCount]:
    """Count what every part of a prepared model holds and learns; packed 4-bit values count as what they stand for."""
    totals = dict.fromkeys(PARTS, 0)
    trained: dict[PartName, dict[str, int]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None:
            continue
        if parameter.requires_grad:
            trained[part][name] = parameter.numel()
        totals[part] += 0 if _is_lora(name) else parameter.numel()
    for name, buffer in model.named_buffers():
        part = part_of(name)
        if part is not None and name.endswith(".codes"):
            totals[part] += 2 * buffer.numel()
    return {part: PartCount(total=totals[part], trained=trained[part]) for part in PARTS}


def lora_config(method: TuneMethod, targets: list[str]) -> LoraConfig:
    """Return PEFT's configuration of a method.

    Raises:
        CapabilityError: PEFT is not installed.
    """
    peft = import_peft()
    return cast(
        "LoraConfig",
        peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=targets,
            use_dora=method.language == "dora",
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Add LoRA matrices to the layers that a configuration names, in place and frozen until somebody says so."""
    peft = import_peft()
    # fp32 whatever the base: the small updates of small rates vanish in bf16.
    with without_values():
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if _is_lora(name) and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def import_peft() -> Any:
    """Return the module `peft`.

    Raises:
        CapabilityError: It is not installed.
    """
    try:
        import peft
    except ImportError as e:
        raise CapabilityError(
            "tuning with adapters needs peft, which is not installed", "pip install 'nvila[tune]'"
        ) from e
    return peft


def _linear_names(model: nn.Module, roots: Iterable[str]) -> list[str]:
    return [
        f"{root}.{name}"
        for root in roots
        for name, child in model.get_submodule(root).named_modules()
        if _is_linear(child)
    ]


def _is_linear(module: nn.Module) -> bool:
    # Of bitsandbytes, too: its layers are subclasses.
    return isinstance(module, nn.Linear)


def _tower_roots(model: NVILAForConditionalGeneration) -> list[str]:
    blocks = int(model.config.num_vision_blocks)
    tower = "model.vision_tower"
    return [f"{tower}.embeddings", *(f"{tower}.encoder.layers.{number}" for number in range(blocks))]


def _chosen(name: str, method: TuneMethod) -> bool:
    return not method.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in method.only)


def _is_lora(name: str) -> bool:
    return any(f".{word}." in name for word in _LORA)


def _pattern_hint(names: list[str]) -> str:
    return f"patterns are those of a shell, such as '*.layers.0.*'; a name that is tuned: {names[0]}"
