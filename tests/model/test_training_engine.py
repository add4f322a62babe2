from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from nvila.data.collation import Batch, collate
from nvila.data.conversation import ConversationEncoder
from nvila.data.easy_vqa import text_only
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import ModelConfig, PartName, PrecisionConfig, StageConfig, TrainConfig
from nvila.training.engine import build_engine
from nvila.training.loop import model_inputs
from nvila.training.run import recompute_activations, trained_parts

RATES: dict[PartName, float] = {"vision": 3e-3, "projector": 1e-2, "language": 5e-3}
SCALES = (0.5, 1.0, 0.7, 0.1)
Run = Callable[..., tuple[list[float], dict[str, Tensor]]]


def stage_config(lr: dict[PartName, float]) -> StageConfig:
    return StageConfig(
        name="s", data="d", steps=4, lr=lr, images_per_step=2, samples_per_image=2, warmup_steps=0, schedule="linear"
    )


@pytest.fixture(scope="module")
def batch(encoder: ConversationEncoder) -> Batch:
    rows = [[("a", "what color?", "red"), ("a", "what shape?", "the circle")], [("b", "is there a circle?", "yes")]]
    groups = [
        [encoder(vqa_sample(id="x", source="s", image=i, question=q, answer=a)) for i, q, a in row] for row in rows
    ]
    return collate(groups, pad_token_id=0)


@pytest.fixture
def run(model: NVILAForConditionalGeneration, model_config: ModelConfig, batch: Batch, tiles: PixelCache) -> Run:
    """Train a copy of the model for a few steps on one batch, or one each; returns the losses and the weights."""

    def train(
        *, lr: dict[PartName, float] = RATES, batches: Sequence[Batch] = (batch,) * len(SCALES), **changes: Any
    ) -> tuple[list[float], dict[str, Tensor]]:
        stage = stage_config(lr)
        values: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 0.5} | changes
        config = TrainConfig(model=model_config, stages=(stage,), **values)
        trained = copy.deepcopy(model).train()
        engine = build_engine(trained, trained_parts(trained, stage), config)
        assert engine.module is trained
        losses = []
        for scale, one in zip(SCALES, batches, strict=False):
            loss = engine(**model_inputs(one, tiles.tensors(one.images, ()) if one.images else {})).loss
            losses.append(float(loss.detach()))
            engine.backward(loss)
            engine.step(scale)
        engine.close()
        return losses, {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}

    return train


def by_hand(model: NVILAForConditionalGeneration, batch: Batch, tiles: PixelCache) -> dict[str, Tensor]:
    """AdamW with clipping, written out from its definition."""
    trained = copy.deepcopy(model).train()
    groups = {cast("PartName", group.name): group.parameters for group in trained_parts(trained, stage_config(RATES))}
    moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
    for step, scale in enumerate(SCALES, start=1):
        trained.zero_grad()
        trained(**model_inputs(batch, tiles.tensors(batch.images, ()))).loss.backward()
        used = [p for parameters in groups.values() for p in parameters if p.grad is not None]
        norm = torch.stack([p.grad.square().sum() for p in used if p.grad is not None]).sum().sqrt()
        shrink = min(1.0, 0.5 / (norm.item() + 1e-6))
        with torch.no_grad():
            for part, parameters in groups.items():
                rate = RATES[part] * scale
                for p in parameters:
                    if p.grad is None:
                        continue
                    gradient = p.grad * shrink
                    first, second = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                    first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient.square()
                    moments[p] = first, second
                    p.mul_(1 - rate * 0.1)
                    p.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8))
    return dict(trained.state_dict())


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The bias of a key moves all scores of a query alike, so without rotation its gradient is rounding noise,
        # which Adam blows up to full steps.
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=name)


def test_torch_steps_are_adamw_with_clipping_and_a_rate_for_each_part(
    run: Run, model: NVILAForConditionalGeneration, batch: Batch, tiles: PixelCache
) -> None:
    losses, weights = run(backend="torch")
    assert losses[-1] < losses[0]
    assert_same_weights(weights, by_hand(model, batch, tiles), atol=5e-5)


@pytest.mark.parametrize("zero_stage", [None, 0, 1])
@pytest.mark.usefixtures("one_process")
def test_a_step_of_text_alone_moves_the_tower_by_its_moments(
    run: Run, batch: Batch, encoder: ConversationEncoder, zero_stage: int | None
) -> None:
    """As it would with another process that has images: how samples are dealt decides nothing."""
    if zero_stage is not None:
        pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    (text,) = text_only([vqa_sample(id="t", source="s", image="a", question="what color?", answer="red")])
    words = collate([[encoder(text)]], pad_token_id=0)
    changes: dict[str, Any] = {"backend": "torch"} if zero_stage is None else {"zero_stage": zero_stage}
    _, start = run(batches=[], **changes)
    _, before = run(batches=[batch], **changes)
    _, after = run(batches=[batch, words], **changes)
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    # First moment 0.9 * 0.1 g, second 0.95 * 0.05 g^2, both corrected for two steps, at the rate of the second one.
    step = (0.9 * 0.1 / (1 - 0.9**2)) / (0.95 * 0.05 / (1 - 0.95**2)) ** 0.5
    moved = (after[name] - before[name] * (1 - RATES["vision"] * SCALES[1] * 0.1)).abs()
    assert float(moved.median()) == pytest.approx(RATES["vision"] * SCALES[1] * step, rel=0.02)
    _, first = run(batches=[words], **changes)
    assert_same_weights({name: first[name]}, {name: start[name] * (1 - RATES["vision"] * SCALES[0] * 0.1)}, atol=1e-7)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.usefixtures("one_process")
def test_deepspeed_gives_the_losses_and_weights_of_torch(run: Run, zero_stage: int) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    expected_losses, expected = run(backend="torch")
    losses, weights = run(backend="deepspeed", zero_stage=zero_stage)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same_weights(weights, expected, atol=5e-5)


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
@pytest.mark.usefixtures("one_process")
def test_engine_computes_in_the_precision_of_its_configuration(
    backend: str, model: NVILAForConditionalGeneration, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within what DeepSpeed does on a GPU: it switches autocast off around the module."""
    if backend == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    kept: list[torch.dtype] = []
    forward = type(model).forward

    def noted(self: nn.Module, **inputs: Any) -> Any:
        kept.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return forward(cast("Any", self), **inputs)

    monkeypatch.setattr(type(model), "forward", noted)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kept.clear()
        with torch.autocast("cpu", enabled=False):
            run(backend=backend, precision=PrecisionConfig(name=name))  # type: ignore[arg-type]  # one of the three
        assert set(kept) == {dtype}


@pytest.mark.usefixtures("one_process")
def test_deepspeed_leaves_frozen_parts_alone(run: Run, model: NVILAForConditionalGeneration) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    _, weights = run(lr={"projector": 1e-2}, backend="deepspeed", zero_stage=1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name in weights if "mm_projector" in name}


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
@pytest.mark.usefixtures("one_process")
def test_fp8_moments_train_like_wide_ones(run: Run, backend: str) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    losses, _ = run(backend=backend, optimizer="fp8_adamw")
    wide, _ = run(backend=backend)
    assert losses != wide
    assert losses == pytest.approx(wide, rel=0.02)


@pytest.mark.usefixtures("one_process")
def test_offloaded_optimizer_gives_the_weights_of_torch(run: Run) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    expected_losses, expected = run(backend="torch")
    losses, weights = run(backend="deepspeed", zero_stage=2, offload="optimizer")
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same_weights(weights, expected, atol=5e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_gives_the_same_gradients_with_fewer_activations(
    attention: str, model: NVILAForConditionalGeneration, batch: Batch, tiles: PixelCache
) -> None:
    def gradients(checkpointed: bool) -> tuple[dict[str, Tensor], int]:
        trained = copy.deepcopy(model).train()
        trained.set_attn_implementation(attention)
        if checkpointed:
            recompute_activations(trained)
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained(**model_inputs(batch, tiles.tensors(batch.images, ()))).loss
        loss.backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}, kept

    plain, kept = gradients(False)
    found, kept_less = gradients(True)
    assert kept_less < 0.6 * kept
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name


def test_blank_tile_gives_every_parameter_a_gradient_and_changes_nothing(
    model: NVILAForConditionalGeneration, encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    text = vqa_sample(id="t", source="s", image=None, question="what color?", answer="red")
    batch = collate([[encoder(text)]], pad_token_id=0)
    found = {}
    for blank in (False, True):
        trained = copy.deepcopy(model).train()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda blank=blank: blank)
        loss = trained(**model_inputs(batch, {})).loss
        loss.backward()
        found[blank] = float(loss.detach()), {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    assert found[True][0] == found[False][0]
    added = {name: grad for name, grad in found[True][1].items() if name not in found[False][1]}
    assert {name.split(".")[1] for name in added} == {"vision_tower", "mm_projector"}
    assert not any(grad.any() for grad in added.values())
    assert all(torch.equal(found[True][1][name], grad) for name, grad in found[False][1].items())


def test_torch_backend_refuses_several_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CapabilityError, match=r"backend=torch runs one process.*backend=deepspeed"):
        run(backend="torch")


def test_missing_deepspeed_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CapabilityError, match=r"deepspeed is not installed.*nvila\[train\]"):
        run(backend="deepspeed")
