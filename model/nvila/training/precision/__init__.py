"""Precision of the language model's matrix products: fp32, bf16, or fp8."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

import torch
from torch import nn

from nvila.errors import CapabilityError
from nvila.training.config import Fp8Config, PrecisionConfig
from nvila.training.precision import fp8_emulated, fp8_torchao, fp8_transformer_engine
from nvila.training.precision.saved_activations import save_in_fp8

ChosenBackend = Literal["emulated", "torchao", "transformer_engine"]
_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# FP8 units begin with compute capability 8.9.
_FIRST_WITH_FP8 = (8, 9)
_TORCHAO_MULTIPLE = 16
_EMULATED_ONLY = ("forward", "backward", "group_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPrecision:
    """What was done to a language model.

    Args:
        backend: Backend of the FP8 products; None without FP8.
        converted: Names of the linear layers that compute in FP8.
        saving: How many modules keep their activations in FP8.
    """

    backend: ChosenBackend | None = None
    converted: tuple[str, ...] = ()
    saving: int = 0


def apply_precision(language_model: nn.Module, config: PrecisionConfig) -> AppliedPrecision:
    """Prepare a language model for training in a precision, in place.

    Raises:
        CapabilityError: The machine or the backend cannot do what the configuration asks for.
    """
    if config.name != "fp8":
        return AppliedPrecision()
    fp8 = config.fp8
    backend = choose_backend(fp8)
    names = fp8_layers(language_model, fp8, multiple=_TORCHAO_MULTIPLE if backend == "torchao" else 1)
    if backend == "torchao":
        fp8_torchao.convert_linears(language_model, names)
    elif backend == "transformer_engine":
        fp8_transformer_engine.convert_linears(language_model, names)
    else:
        rounding = fp8_emulated.Fp8Rounding(_FORMATS[fp8.forward], _FORMATS[fp8.backward], fp8.group_size)
        fp8_emulated.convert_linears(language_model, names, rounding)
    saving = save_in_fp8(language_model, fp8.activation_group_size) if fp8.save_activations else 0
    return AppliedPrecision(backend=backend, converted=names, saving=saving)


def choose_backend(config: Fp8Config) -> ChosenBackend:
    """Return the backend that the configuration names, or the best one of this machine.

    Raises:
        CapabilityError: The backend cannot do what else is asked for, or is not on this machine.
    """
    defaults = Fp8Config()
    custom = [
        name for name in ("forward", "backward", "group_size") if getattr(config, name) != getattr(defaults, name)
    ]
    if config.backend == "auto":
        if custom:
            return "emulated"
        if fp8_transformer_engine.is_available():
            return "transformer_engine"
        return "torchao" if _has_fp8_units() else "emulated"
    if config.backend != "emulated" and custom:
        raise CapabilityError(
            f"train.fp8.{custom[0]} can be changed in the emulation only, train.fp8.backend is {config.backend}",
            "leave it out, or use train.fp8.backend=emulated",
        )
    if config.backend == "transformer_engine" and not fp8_transformer_engine.is_available():
        raise CapabilityError(
            "train.fp8.backend=transformer_engine needs that package and a GPU of compute capability 9.0",
            "use train.fp8.backend=auto, torchao or emulated",
        )
    return config.backend


def fp8_layers(language_model: nn.Module, config: Fp8Config, *, multiple: int = 1) -> tuple[str, ...]:
    """Return the names of the linear layers that compute in FP8, in order.

    Args:
        language_model: Usually the decoder; its language-model head is left out by not being below it.
        config: Smallest side, and patterns to skip.
        multiple: Of which both sides must be a multiple.
    """
    return tuple(
        name
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear
        and min(module.in_features, module.out_features) >= config.min_features
        and module.in_features % multiple == module.out_features % multiple == 0
        and not any(fnmatch(name, pattern) for pattern in config.skip)
    )


def autocast(config: PrecisionConfig, device_type: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    if config.name == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    if config.name == "fp8" and device_type == "cuda":
        # What is not in FP8 is in bf16 on a GPU; the emulation on CPU is studied beside fp32.
        stack = ExitStack()
        stack.enter_context(torch.autocast(device_type, dtype=torch.bfloat16))
        if choose_backend(config.fp8) == "transformer_engine":
            stack.enter_context(fp8_transformer_engine.autocast())
        return stack
    return nullcontext()


class InPrecision:
    """Runs a model's forward passes in a precision, until it is removed.

    It acts inside of the module, by hooks: DeepSpeed switches off on a GPU what is entered around its engine.
    """

    def __init__(self, model: nn.Module, config: PrecisionConfig) -> None:
        self._config = config
        self._entered: list[AbstractContextManager[object]] = []
        self._hooks = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, model: nn.Module, inputs: object) -> None:
        context = autocast(self._config, next(model.parameters()).device.type)
        context.__enter__()
        self._entered.append(context)

    def _leave(self, model: nn.Module, inputs: object, outputs: object) -> None:
        # A failed forward pass may not have come as far as entering.
        if self._entered:
            self._entered.pop().__exit__(None, None, None)


def _has_fp8_units() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FIRST_WITH_FP8


__all__ = ["AppliedPrecision", "InPrecision", "apply_precision", "autocast", "choose_backend", "fp8_layers"]
