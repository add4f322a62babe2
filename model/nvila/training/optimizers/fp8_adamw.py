"""AdamW whose moments are kept in FP8: 2.19 bytes a parameter instead of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nvila.errors import ConfigError
from nvila.training.optimizers.fp8_moments import GROUP_SIZE, Fp8Moment, quantize_moment

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FIELDS = ("codes", "scale", "power", "centre")


class Fp8AdamW(torch.optim.Optimizer):
    """AdamW with FP8 moments and dynamic range expansion (COAT, arXiv 2410.19313, section 4 and algorithm 1).

    The update is that of `torch.optim.AdamW`. Moments are dequantized, updated in fp32 and rounded again in every step;
    a step uses them before they are rounded.

    Args:
        params: Parameters or groups; fp32 master weights.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        group_size: Elements that share scale, power and centre.
        expand: Expand the range of every group.
        dtype: FP8 format of both moments.

    Raises:
        ConfigError: A parameter is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        group_size: int = GROUP_SIZE,
        expand: bool = True,
        dtype: torch.dtype = torch.float8_e4m3fn,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._rounding: dict[str, Any] = {"group_size": group_size, "expand": expand, "dtype": dtype}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.float32:
                    raise ConfigError(
                        f"fp8 AdamW needs fp32 master weights, got {parameter.dtype}",
                        "train with precision fp32, or bf16 under ZeRO 1 and higher, which keeps fp32 masters",
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Raises:
            ConfigError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise ConfigError("fp8 AdamW takes no sparse gradients", "use an embedding with sparse=False")
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        g = grad.float().flatten()
        if state:
            first = _moment(state, "exp_avg").dequantize(len(g)).lerp_(g, 1 - beta1)
            second = _moment(state, "exp_avg_sq").dequantize(len(g)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        else:
            state["step"] = torch.tensor(0.0)
            first, second = g * (1 - beta1), g * g * (1 - beta2)
        state["step"] += 1
        for name, values in zip(_MOMENTS, (first, second), strict=True):
            self._keep(state, name, values)
        t = float(state["step"])
        denominator = second.sqrt_().div_((1 - beta2**t) ** 0.5).add_(group["eps"])
        direction = first.div_(denominator).div_(1 - beta1**t).view_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _keep(self, state: dict[str, Any], name: str, values: Tensor) -> None:
        moment = quantize_moment(values, **self._rounding)
        state.update({f"{name}_{field}": getattr(moment, field) for field in _FIELDS})

    def moment(self, parameter: Tensor, name: str) -> Fp8Moment:
        """Return a moment of a parameter that has been updated."""
        return _moment(self.state[parameter], name)

    def set_moments(self, parameter: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Set the state of a parameter.

        Args:
            parameter: The parameter.
            moments: `exp_avg` and `exp_avg_sq` of its shape; they are rounded.
            steps: How often it has been updated.
        """
        state: dict[str, Any] = {"step": torch.tensor(float(steps))}
        for name in _MOMENTS:
            self._keep(state, name, moments[name])
        self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        The base class casts state to the type of the parameters; every FP8 code is an fp32 number, so the way back
        is exact.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in _MOMENTS:
                state[f"{name}_codes"] = state[f"{name}_codes"].to(self._rounding["dtype"])

    @property
    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(
            _moment(state, name).num_bytes for state in self.state.values() if len(state) > 1 for name in _MOMENTS
        )


def _moment(state: dict[str, Any], name: str) -> Fp8Moment:
    return Fp8Moment(**{field: state[f"{name}_{field}"] for field in _FIELDS})
