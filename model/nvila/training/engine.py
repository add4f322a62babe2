"""Two backends of one training step: DeepSpeed, and plain torch for a single process.

Both take the same AdamW over the same parameter groups; in fp32 they give the same losses.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nvila.errors import CapabilityError
from nvila.training.config import TrainConfig
from nvila.training.optimizers import build_optimizer

logger = logging.getLogger(__name__)


class TrainEngine(Protocol):
    """Runs forward, backward and the optimizer on a model."""

    module: nn.Module

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""

    def step(self, lr_scale: float) -> None:
        """Clip, update with every group's peak rate times `lr_scale`, and clear the gradients."""

    def close(self) -> None:
        """Free what the backend holds; the model stays usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters of one part of the model and their peak learning rate."""

    name: str
    parameters: list[nn.Parameter]
    lr: float


def build_engine(model: nn.Module, groups: list[ParameterGroup], config: TrainConfig) -> TrainEngine:
    """Build the backend that the configuration names."""
    optimizer = build_optimizer(
        config.optimizer,
        [{"params": group.parameters, "lr": group.lr, "peak_lr": group.lr} for group in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if config.backend == "torch":
        return _TorchEngine(model, optimizer, config.max_grad_norm)
    return _DeepSpeedEngine(model, optimizer, config)


def _scale_rates(groups: list[dict[str, Any]], lr_scale: float) -> None:
    for group in groups:
        group["lr"] = group["peak_lr"] * lr_scale


class _TorchEngine:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CapabilityError("train.backend=torch runs one process only", "use train.backend=deepspeed")
        self.module = model
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr_scale: float) -> None:
        nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        _scale_rates(self._optimizer.param_groups, lr_scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


class _DeepSpeedEngine:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        deepspeed = _import_deepspeed()
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo" if not torch.cuda.is_available() else "nccl", verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.module = self._engine.module

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr_scale: float) -> None:
        _scale_rates(self._engine.optimizer.param_groups, lr_scale)
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly and without its just-in-time compiled operators."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as e:
        raise CapabilityError("deepspeed is not installed", "pip install 'nvila[train]'") from e
    if not torch.cuda.is_available():
        # On CPU DeepSpeed would compile a shared-memory all-reduce at first use: a minute, a C++ compiler and ninja.
        # Gloo does the same job, so the list of operators that fit this machine is emptied before it is asked.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed
