"""The DeepSpeed backend.

Checkpoints are ours, not DeepSpeed's: those are pickled and bound to the number of processes and the ZeRO stage. What
is read of DeepSpeed's optimizers for that stands in this module alone.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from nvila.errors import CapabilityError
from nvila.training.config import TrainConfig
from nvila.training.engine import StepOutcome, on_device, scale_rates
from nvila.training.partitions import Partitions, Piece, whole_parameters
from nvila.training.precision import InPrecision


class DeepSpeedEngine:
    """Trains through `deepspeed.initialize`, in one process or several.

    Args:
        model: The model; ZeRO 3 takes it apart.
        optimizer: Over its trained parameters.
        config: ZeRO stage, offload and clipping.

    Raises:
        CapabilityError: DeepSpeed is not installed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self._deepspeed = _import_deepspeed()
        if not torch.distributed.is_initialized():
            backend = "gloo" if not torch.cuda.is_available() else "nccl"
            self._deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self._zero = config.zero_stage
        self.layout = ("deepspeed", config.zero_stage)
        zero: dict[str, Any] = {"stage": config.zero_stage}
        if config.offload == "optimizer":
            zero["offload_optimizer"] = {"device": "cpu"}
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                # Steps have any number of micro-batches: `backward` tells the last one.
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                # With offload DeepSpeed insists on its own CPU Adam, which is compiled at first use; torch's fused
                # AdamW does the same on the CPU, and moments in FP8 are ours.
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 10**9,
                **({"managed_gradient_accumulation": False} if config.zero_stage else {}),
            },
        )
        self.module = self._engine.module
        self._precision = InPrecision(self.module, config.precision)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        return self._engine(**on_device(inputs, self._engine.device))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients; without ZeRO the last call also averages them over the processes."""
        if not self._zero:
            self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr_scale: float) -> StepOutcome:
        """Update, unless the global norm of the gradient, the same on every process, is not finite."""
        scale_rates(self._engine.optimizer.param_groups, lr_scale)
        if self._zero:
            # Its optimizers look at the norm themselves and leave the weights alone when it is none.
            self._engine.step()
            return StepOutcome(
                grad_norm=float(self._engine.get_global_grad_norm()), applied=not self._engine.optimizer.overflow
            )
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads))
        applied = math.isfinite(norm)
        if applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepOutcome(grad_norm=norm, applied=applied)

    def partitions(self) -> Partitions:
        """Return access to weights and optimizer state."""
        if self._zero == 0:
            return whole_parameters(self.module, self._engine.optimizer)
        zero = self._engine.optimizer
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        if self._zero == 3:
            pieces = [_piece_of_zero_3(zero, name, parameter) for name, parameter in trained]
            masters = list(zero.fp32_partitioned_groups_flat)
        else:
            pieces = [_piece_of_zero_1_2(zero, name, parameter) for name, parameter in trained]
            masters = list(zero.single_partition_of_fp32_groups)
        return Partitions(
            pieces,
            masters,
            zero.optimizer,
            shared=torch.distributed.get_world_size() > 1,
            device=trained[0][1].device,
            sync=self._sync,
        )

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Put the weights together, one parameter at a time; only ZeRO 3 takes them apart."""
        if self._zero != 3:
            return None
        first = torch.distributed.get_rank() == 0
        weights = {}
        for name, parameter in self.module.named_parameters():
            with self._deepspeed.zero.GatheredParameters([parameter]):
                if first:
                    weights[name] = parameter.detach().cpu().clone()
        return weights

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers."""
        self._precision.remove()
        self._engine.destroy()

    def _sync(self) -> None:
        """Bring the masters to the module, as the end of a step does."""
        zero = self._engine.optimizer
        if self._zero < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _piece_of_zero_1_2(zero: Any, name: str, parameter: Any) -> Piece:
    held = parameter._hp_mapping
    if held is None:
        return Piece(name=name, numel=parameter.numel(), master=None, offset=0, start=0, length=0)
    return Piece(
        name=name,
        numel=parameter.numel(),
        master=zero.single_partition_of_fp32_groups[held.param_group_index],
        offset=held.hp_fragment_address.start,
        start=held.lp_fragment_address.start,
        length=held.lp_fragment_address.numel,
    )


def _piece_of_zero_3(zero: Any, name: str, parameter: Any) -> Piece:
    """Every parameter is dealt to all processes in equal parts, the last of which may reach behind its end."""
    group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
    start = min(part * torch.distributed.get_rank(), parameter.ds_numel)
    return Piece(
        name=name,
        numel=parameter.ds_numel,
        master=zero.fp32_partitioned_groups_flat[group],
        offset=offset,
        start=start,
        length=min(part, parameter.ds_numel - start),
    )


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
