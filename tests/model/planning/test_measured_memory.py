"""The planner against what tiny models really hold: states to the byte, activations within a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Attention, ModelConfig, OptimizerName, PartName, StageConfig, TrainConfig
from nvila.training.optimizers import build_optimizer
from nvila.training.planning.devices import GPUS
from nvila.training.planning.memory import Share, stage_activations
from nvila.training.planning.plan import AssumedSample, Hardware, plan_training
from nvila.training.planning.sizes import meta_model, nvila_config, part_sizes
from nvila.training.planning.states import state_bytes
from nvila.training.run import trained_parts

ALL: dict[PartName, float] = {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}
ROWS, TEXT = 4, 40


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vision": {
            "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "vision_use_head": False,
        },
        "language": {
            "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 256,
            "pad_token_id": 0, "max_position_embeddings": 512,
        },
        "projector": "mlp_downsample", "select_layer": -2, "max_length": 512,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def stage(lr: dict[PartName, float], **changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "one", "data": "captions", "steps": 4, "lr": lr, "images_per_step": ROWS, "samples_per_image": 1,
        "schedule": "cosine",
    }  # fmt: skip
    return StageConfig(**(values | changes))


def built(model: ModelConfig, lr: dict[PartName, float]) -> tuple[NVILAForConditionalGeneration, Any]:
    torch.manual_seed(0)
    config = nvila_config(model)
    config.image_token_id, config.image_end_token_id = 250, 249
    made = NVILAForConditionalGeneration(config).train()
    return made, trained_parts(made, stage(lr))


def inputs(model: NVILAForConditionalGeneration, rows: int = ROWS) -> dict[str, Tensor]:
    visual = model.config.num_image_tokens
    ids = torch.randint(1, 200, (rows, visual + TEXT))
    ids[:, :visual] = 250
    labels = ids.clone()
    labels[:, : visual + TEXT // 2] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(rows, 3, 32, 32)}


@pytest.mark.parametrize("optimizer", ["adamw", "fp8_adamw"])
@pytest.mark.parametrize("lr", [ALL, {"projector": 1e-3}], ids=["all", "projector"])
def test_states_are_exact(optimizer: OptimizerName, lr: dict[PartName, float]) -> None:
    config = model_config()
    model, groups = built(config, lr)
    chosen = build_optimizer(
        optimizer, [{"params": one.parameters, "lr": one.lr} for one in groups], betas=(0.9, 0.99), weight_decay=0.0
    )
    model(**inputs(model)).loss.backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    chosen.step()
    held = sum(
        value.numel() * value.element_size()
        for state in chosen.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    sizes = part_sizes(meta_model(nvila_config(config)), stage(lr))
    planned = state_bytes(
        sum(part.total for part in sizes.values()),
        [size for part in sizes.values() for size in part.trained],
        zero_stage=0,
        world=1,
        optimizer=optimizer,
    )
    assert planned.parameters == sum(p.numel() * p.element_size() for p in model.parameters())
    assert planned.gradients == gradients
    assert planned.optimizer == held


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "lr", [ALL, {"projector": 1e-3}, {"projector": 1e-3, "language": 1e-3}], ids=["all", "p", "pl"]
)
def test_activations_are_within_five_percent(attention: Attention, precision: Any, lr: dict[PartName, float]) -> None:
    config = model_config()
    model, _ = built(config, lr)
    model.set_attn_implementation(attention)
    batch = inputs(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        # The decoder alone: the loss has a formula of its own.
        model.model(**{name: value for name, value in batch.items() if name != "labels"})
    measured = sum(size for size, _ in seen.values())
    run = TrainConfig(model=config, stages=(stage(lr),), attention=attention)
    run = _with_precision(run, precision)
    visual = model.config.num_image_tokens
    share = Share(rows=ROWS, row=visual + TEXT, tiles=ROWS, projected=ROWS, supervised=ROWS * TEXT // 2)
    planned = stage_activations(run, stage(lr), nvila_config(config), share, checkpointing=False)
    assert planned == pytest.approx(measured, rel=0.05)


def _with_precision(run: TrainConfig, name: Any) -> TrainConfig:
    from dataclasses import replace

    from nvila.training.config import PrecisionConfig

    return replace(run, precision=PrecisionConfig(name=name))


@pytest.mark.parametrize("lr", [ALL, {"projector": 1e-3}, {"language": 1e-3}], ids=["all", "projector", "language"])
def test_operations_are_those_that_torch_counts(lr: dict[PartName, float]) -> None:
    config = model_config()
    model, _ = built(config, lr)
    model.set_attn_implementation("eager")
    batch = inputs(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    visual = model.config.num_image_tokens
    assumed = AssumedSample(images=((32, 32),), text_tokens=TEXT - 1, answer_tokens=TEXT // 2)
    run = TrainConfig(model=config, stages=(stage(lr),))
    (planned,) = plan_training(run, {"one": assumed}, Hardware(gpu=GPUS["h100"], gpus=1))
    assert planned.positions_per_step == ROWS * (visual + TEXT)
    assert planned.operations_per_step == pytest.approx(counter.get_total_flops(), rel=0.03)
