from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Fp8Config, PrecisionConfig
from nvila.training.precision import InPrecision, apply_precision, autocast, fp8_transformer_engine
from nvila.training.precision.fp8_emulated import E4M3, E5M2, Fp8Linear, Fp8Rounding, round_to_fp8

Array = npt.NDArray[np.float64]
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def grid(dtype: torch.dtype) -> Array:
    """All finite non-negative numbers of a format, in order, from the definition of its bits."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == E4M3 else (5, 2, 15)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            top = exponent == 2**exponent_bits - 1
            # E4M3 gives up only its last code for NaN, E5M2 its whole last exponent for infinity and NaN.
            if top and (dtype == E5M2 or mantissa == 2**mantissa_bits - 1):
                continue
            fraction = mantissa / 2**mantissa_bits
            values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return np.array(values)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of the format, ties to the even mantissa, after scaling by the largest value."""
    values, x = grid(dtype), x.detach()
    scale = (float(x.abs().max()) + 1e-10) / LARGEST[dtype]
    scaled = np.abs(x.double().numpy()) / scale
    above = np.clip(np.searchsorted(values, scaled), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    take_high = (high - scaled < scaled - low) | ((high - scaled == scaled - low) & (above % 2 == 0))
    return torch.from_numpy(np.where(take_high, high, low) * np.sign(x.double().numpy()) * scale)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_grid_of_this_test_is_that_of_the_format(dtype: torch.dtype) -> None:
    assert grid(dtype).max() == LARGEST[dtype] == torch.finfo(dtype).max
    assert torch.equal(torch.from_numpy(grid(dtype)).to(dtype).double(), torch.from_numpy(grid(dtype)))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_values_land_on_the_nearest_number_of_the_format(dtype: torch.dtype, size: float) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * size
    torch.testing.assert_close(round_to_fp8(x, dtype).double(), rounded(x, dtype), rtol=1e-5, atol=0)


@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
@settings(max_examples=80, deadline=None)
def test_relative_error_of_normal_values_is_bounded(values: list[float]) -> None:
    x = torch.tensor(values)
    for dtype, bound, smallest_normal in ((E4M3, 2.0**-4, 2.0**-6), (E5M2, 2.0**-3, 2.0**-14)):
        y = round_to_fp8(x, dtype)
        assert bool(y.isfinite().all())
        scale = (x.abs().max() + 1e-10) / LARGEST[dtype]
        normal = x.abs() / scale >= smallest_normal
        assert bool(((y - x).abs()[normal] <= (bound + 1e-5) * x.abs()[normal]).all())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_value_becomes_the_largest_number(dtype: torch.dtype, sign: int) -> None:
    x = torch.tensor([0.1, -0.2, sign * 7.0])
    scale = (7.0 + 1e-10) / LARGEST[dtype]
    assert float(round_to_fp8(x, dtype)[2] / scale) == pytest.approx(sign * LARGEST[dtype])


def test_zeros_stay_zero_and_types_stay() -> None:
    for wide in (torch.float32, torch.bfloat16):
        zeros = round_to_fp8(torch.zeros(3, dtype=wide), E4M3)
        assert zeros.tolist() == [0, 0, 0]
        assert zeros.dtype == wide
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert bool(round_to_fp8(x, E4M3).isfinite().all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_layer_and_gradients_are_products_of_rounded_operands(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, bias=bias)
    layer = Fp8Linear.from_linear(linear)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 6)
    y = layer(x)
    y.backward(grad)
    x8, w8, g8 = rounded(x, E4M3), rounded(layer.weight, E4M3), rounded(grad, E5M2)
    expected = x8 @ w8.t() + (linear.bias.detach().double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), g8 @ w8, rtol=1e-5, atol=1e-5)
    weight_grad = g8.reshape(-1, 6).t() @ x8.reshape(-1, 8)
    torch.testing.assert_close(layer.weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.reshape(-1, 6).sum(0))


def test_evaluation_is_wide_and_training_is_not() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    layer, x = Fp8Linear.from_linear(linear), torch.randn(3, 8)
    assert layer.weight is linear.weight
    assert not torch.equal(layer(x), linear(x))
    assert torch.equal(layer.eval()(x), linear(x))


def test_frozen_weight_gets_no_gradient() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(4, 4))
    layer.requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_an_input_or_weight_changed_in_place_is_rounded_anew() -> None:
    torch.manual_seed(0)
    layer, x = Fp8Linear.from_linear(nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        before = layer(x)
        x.mul_(-1)
        assert torch.equal(layer(x), -before)
        with torch.no_grad():
            layer.weight.mul_(-1)
        assert torch.equal(layer(x), before)
        x.mul_(-1)


def test_a_trained_weight_written_behind_autograds_back_is_rounded_anew() -> None:
    layer, x = Fp8Linear.from_linear(nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    before = layer(x)
    layer.weight.data.mul_(-1)
    assert torch.equal(layer(x), -before)


def test_layers_with_one_input_round_it_once_and_agree_with_layers_alone() -> None:
    torch.manual_seed(0)
    first, second = (Fp8Linear.from_linear(nn.Linear(8, 6)) for _ in range(2))
    x = torch.randn(5, 8, requires_grad=True)
    (first(x).sum() + second(x).square().sum()).backward()
    together, x.grad = x.grad, None
    first(x.clone()).sum().backward()
    second(x.clone()).square().sum().backward()
    torch.testing.assert_close(together, x.grad)


def fp8(**changes: Any) -> PrecisionConfig:
    values: dict[str, Any] = {"backend": "emulated", "min_features": 32} | changes
    return PrecisionConfig(name="fp8", fp8=Fp8Config(**values))


@pytest.mark.parametrize(
    ("changes", "converted"),
    [
        ({}, 14),
        ({"min_features": 33}, 10),
        ({"min_features": 65}, 0),
        ({"skip": ("*.down_proj",)}, 12),
        ({"skip": ("layers.0.*", "*.q_proj")}, 6),
    ],
    ids=["all", "small sides", "nothing", "one kind", "two patterns"],
)
def test_layers_that_are_small_or_skipped_are_left_alone(
    changes: dict[str, Any], converted: int, fresh_model: NVILAForConditionalGeneration
) -> None:
    """Two blocks of seven layers; the key and value projections of this model are 32 wide."""
    before = fresh_model.state_dict()
    decoder = cast("nn.Module", fresh_model.model.language_model)
    applied = apply_precision(decoder, fp8(**changes))
    assert len(applied.converted) == converted
    assert [name for name, module in decoder.named_modules() if isinstance(module, Fp8Linear)] == list(
        applied.converted
    )
    after = fresh_model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert type(fresh_model.lm_head) is nn.Linear
    assert apply_precision(decoder, fp8(**changes)).converted == ()


@pytest.mark.parametrize(("name", "backend"), [("fp32", None), ("bf16", None), ("fp8", "emulated")])
def test_precision_converts_only_for_fp8(
    name: str, backend: str | None, fresh_model: NVILAForConditionalGeneration
) -> None:
    config = PrecisionConfig(name=name, fp8=Fp8Config(min_features=32))  # type: ignore[arg-type]  # a parameter
    applied = apply_precision(fresh_model.model.language_model, config)
    # This machine has no FP8 units, so `auto` emulates.
    assert applied.backend == backend
    assert bool(applied.converted) == (backend is not None)


@pytest.mark.parametrize("group_size", [4, 5, 100], ids=["divides", "does not divide", "longer than a row"])
def test_groups_have_scales_of_their_own(group_size: int) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)
    found = round_to_fp8(x, E4M3, group_size)
    expected = [
        torch.stack([rounded(group, E4M3) for group in row.split(group_size)])
        if 16 % group_size == 0
        else torch.cat([rounded(group, E4M3) for group in row.split(group_size)])
        for row in x
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected).view(6, 16), rtol=1e-5, atol=0)
    assert (found - x).abs().sum() < (round_to_fp8(x, E4M3) - x).abs().sum()


def test_formats_are_those_of_the_configuration() -> None:
    torch.manual_seed(0)
    rounding = Fp8Rounding(forward=E5M2, backward=E4M3, group_size=4)
    layer, x = Fp8Linear.from_linear(nn.Linear(8, 8, bias=False), rounding), torch.randn(3, 8, requires_grad=True)
    grad = torch.randn(3, 8)
    y = layer(x)
    y.backward(grad)
    w8 = round_to_fp8(layer.weight.detach(), E5M2, 4)
    torch.testing.assert_close(y, round_to_fp8(x.detach(), E5M2, 4) @ w8.t())
    torch.testing.assert_close(x.grad, round_to_fp8(grad, E4M3, 4) @ w8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "torchao", "group_size": 16}, r"train\.fp8\.group_size.*emulation only.*backend=emulated"),
        ({"backend": "transformer_engine", "forward": "e5m2"}, r"train\.fp8\.forward.*emulation only"),
        ({"backend": "transformer_engine"}, r"transformer_engine needs that package and a GPU"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(
    changes: dict[str, Any], message: str, fresh_model: NVILAForConditionalGeneration
) -> None:
    with pytest.raises(CapabilityError, match=message):
        apply_precision(fresh_model.model.language_model, fp8(**changes))


def test_torchao_trains_as_the_emulation_does(fresh_model: NVILAForConditionalGeneration) -> None:
    pytest.importorskip("torchao", reason="torchao is part of the model extra")
    # A number of positions that is no multiple of 16, which torchao's kernels on a GPU do not take without padding.
    ids = torch.arange(6, 16).unsqueeze(0)
    losses, gradients = [], []
    for backend in ("emulated", "torchao"):
        model = copy.deepcopy(fresh_model).train()
        applied = apply_precision(model.model.language_model, fp8(backend=backend))
        assert applied.backend == backend
        assert len(applied.converted) == 14
        if backend == "torchao":
            layer = cast("Any", model.model.language_model.get_submodule(applied.converted[0]))
            assert layer.config.pad_inner_dim
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.language_model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.999


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float32)])
def test_products_are_computed_in_the_precision_named(name: str, dtype: torch.dtype) -> None:
    with autocast(PrecisionConfig(name=name), "cpu"):  # type: ignore[arg-type]  # a parameter of the test
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype == dtype


def test_a_model_computes_in_its_precision_until_that_is_removed() -> None:
    linear = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    inside = InPrecision(linear, PrecisionConfig(name="bf16"))
    # As DeepSpeed does around a module on a GPU.
    with torch.autocast("cpu", enabled=False):
        assert linear(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shape"):
        linear(torch.randn(2, 5))
    assert not torch.is_autocast_enabled("cpu")
    inside.remove()
    assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (16, 8), (4, 4, 8)], ids=str)
def test_positions_are_filled_up_to_whole_blocks_and_cut_again(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, seen = nn.Linear(8, 6), []
    x = torch.randn(shape, requires_grad=True)

    def product(rows: Tensor) -> Tensor:
        seen.append(rows.flatten(0, -2).shape[0])
        return cast("Tensor", linear(rows))

    y = fp8_transformer_engine.in_whole_blocks(product, x)
    assert seen[0] % 16 == 0
    torch.testing.assert_close(y, linear(x))
    padded = torch.autograd.grad(y.square().sum(), [x, linear.weight])
    plain = torch.autograd.grad(linear(x).square().sum(), [x, linear.weight])
    torch.testing.assert_close(padded, plain)


def test_error_of_a_product_is_what_the_formats_predict() -> None:
    """Rounding errors are independent: that of a product is the root of the sum of their squares.

    A mantissa of m bits, evenly spread over an octave, errs by a third of half its last digit's square: relative to the
    root mean square of normal values, 2^-m / sqrt(12) / 1.5 on average over the octave's sizes, within some percent.
    """
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(256, 512), torch.randn(128, 512), torch.randn(256, 128))
    e = {}
    for name, tensor, dtype in (("x", x, E4M3), ("w", weight, E4M3), ("g", grad, E5M2)):
        e[name] = float((rounded(tensor, dtype) - tensor).norm() / tensor.norm())
    assert e["x"] == pytest.approx(2.0**-3 / math.sqrt(12) / 1.5, rel=0.15)
    assert e["g"] == pytest.approx(2.0**-2 / math.sqrt(12) / 1.5, rel=0.15)
    layer = Fp8Linear.from_linear(nn.Linear(512, 128, bias=False))
    layer.weight.data.copy_(weight)
    given = x.clone().requires_grad_()
    y = layer(given)
    y.backward(grad)
    assert given.grad is not None
    assert layer.weight.grad is not None
    for found, exact, first, second in (
        (y, x.double() @ weight.double().t(), "x", "w"),
        (given.grad, grad.double() @ weight.double(), "g", "w"),
        (layer.weight.grad, grad.double().t() @ x.double(), "g", "x"),
    ):
        error = float((found.detach().double() - exact).norm() / exact.norm())
        assert error == pytest.approx(math.hypot(e[first], e[second]), rel=0.05)


def test_model_in_fp8_answers_as_before_and_trains_near_fp32(fresh_model: NVILAForConditionalGeneration) -> None:
    ids = torch.arange(6, 16).unsqueeze(0)  # words, no media
    wide = copy.deepcopy(fresh_model).train()(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        before = fresh_model(input_ids=ids).logits
    apply_precision(fresh_model.model.language_model, fp8(min_features=1))
    with torch.no_grad():
        assert torch.equal(fresh_model(input_ids=ids).logits, before)
    narrow = fresh_model.train()(input_ids=ids, labels=ids).loss
    assert narrow.item() != wide.item()
    assert narrow.item() == pytest.approx(wide.item(), rel=0.1)
