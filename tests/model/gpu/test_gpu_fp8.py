"""FP8 on a GPU: products against a wide oracle, a training step of the model, and the optimizer against the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from nvila.data.collation import Batch
from nvila.data.tensors import PixelCache
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Fp8Config, ModelConfig, PartName, PrecisionConfig, StageConfig, TrainConfig
from nvila.training.engine import build_engine
from nvila.training.loop import model_inputs
from nvila.training.optimizers import Fp8AdamW
from nvila.training.precision import InPrecision, apply_precision, fp8_transformer_engine
from nvila.training.run import trained_parts

pytestmark = pytest.mark.gpu
Move = Callable[[Any], Any]
BACKENDS = ["emulated", "torchao", "transformer_engine"]
ALL: dict[PartName, float] = {"vision": 1e-4, "projector": 1e-4, "language": 1e-4}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name != "emulated" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    if name == "torchao":
        pytest.importorskip("torchao", reason="torchao is part of the model extra")
    if name == "transformer_engine" and not fp8_transformer_engine.is_available():
        pytest.skip("Transformer Engine is not installed, or this GPU is older than compute capability 9.0")
    return name


def fp8(backend: str, **changes: Any) -> PrecisionConfig:
    values: dict[str, Any] = {"backend": backend, "min_features": 32} | changes
    return PrecisionConfig(name="fp8", fp8=Fp8Config(**values))


@pytest.mark.parametrize("positions", [64, 37], ids=["whole blocks", "needs padding"])
def test_products_are_as_near_as_the_formats_allow(backend: str, positions: int, device: str, moved: Move) -> None:
    """Two operands with errors of 2.7% (E4M3) or 4.8% (E5M2) in the mean; bf16 around them adds less than 1%."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(256, 128, bias=True))
    x, grad = torch.randn(2, positions, 256), torch.randn(2, positions, 128)
    wide = copy.deepcopy(holder).double()
    x64 = x.double().requires_grad_()
    y64 = wide(x64)
    y64.backward(grad.double())
    holder = moved(holder.train())
    assert apply_precision(holder, fp8(backend)).backend == backend
    InPrecision(holder, fp8(backend))
    x8 = x.to(device).requires_grad_()
    y = holder(x8)
    y.backward(grad.to(device, y.dtype))
    found = [(y, y64, 0.05), (x8.grad, x64.grad, 0.07), (holder[0].weight.grad, wide[0].weight.grad, 0.07)]
    for value, exact, bound in found:
        assert value is not None
        assert exact is not None
        oracle = exact.detach()
        error = float((value.detach().cpu().double() - oracle).norm() / oracle.norm())
        assert 0.01 < error < bound


def test_model_trains_as_in_bf16(
    backend: str,
    model: NVILAForConditionalGeneration,
    model_config: ModelConfig,
    batch: Batch,
    tiles: PixelCache,
    moved: Move,
) -> None:
    inputs = model_inputs(batch, tiles.tensors(batch.images, ()))
    losses: dict[str, list[float]] = {}
    for precision in (PrecisionConfig(name="bf16"), fp8(backend)):
        trained = moved(copy.deepcopy(model).train())
        stage = StageConfig(name="s", data="d", steps=9, lr=ALL, images_per_step=2, schedule="linear")
        config = TrainConfig(model=model_config, stages=(stage,), backend="torch", precision=precision)
        groups = trained_parts(trained, stage)
        assert bool(apply_precision(trained.model.language_model, precision).converted) == (precision.name == "fp8")
        engine = build_engine(trained, groups, config)
        found = losses[precision.name] = []
        for _ in range(5):
            loss = engine(**inputs).loss
            found.append(float(loss.detach()))
            engine.backward(loss)
            assert engine.step(1.0).applied
        engine.close()
    assert losses["fp8"][-1] < losses["fp8"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.05)


def test_saved_activations_take_less_memory(device: str, moved: Move, model: NVILAForConditionalGeneration) -> None:
    def held(save: bool) -> int:
        decoder = moved(copy.deepcopy(cast("nn.Module", model.model.language_model)).train())
        precision = fp8("emulated", save_activations=save)
        apply_precision(decoder, precision)
        x = torch.randn(4, 200, decoder.config.hidden_size, device=device, requires_grad=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
        return int(torch.cuda.memory_allocated() - before - y.numel() * y.element_size())

    assert held(True) < held(False)


@pytest.mark.parametrize("size", [(64, 128), (5, 7)], ids=["whole groups", "a tail"])
def test_optimizer_is_that_of_the_cpu(size: tuple[int, int], device: str) -> None:
    """Codes are rounded alike; powers and roots may differ in their last digit."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    gradients = [torch.randn(size, generator=generator) for _ in range(6)]

    def trained(place: str) -> Tensor:
        parameter = nn.Parameter(start.clone().to(place))
        optimizer = Fp8AdamW([{"params": [parameter], "lr": 1e-2}], betas=(0.9, 0.95), weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.to(place)
            optimizer.step()
        return parameter.detach().cpu()

    moved = trained("cpu") - start
    assert float((trained(device) - start - moved).norm() / moved.norm()) < 1e-2
