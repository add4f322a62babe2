"""The 4-bit layer: its values, its gradient, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from nvila.errors import CapabilityError
from nvila.tuning import four_bit
from nvila.tuning.four_bit import FourBitLinear, WideBuffer, check_four_bit, four_bit_layer, group_size


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 48)


def test_values_are_those_of_the_quantized_format(layer: nn.Linear) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    from nvila.quantization.quantize import INT4

    other = nn.Sequential(copy.deepcopy(layer))
    scheme = IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(128), mapping_type=MappingType.ASYMMETRIC)
    quantize_(other, scheme, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    expected = other[0].weight.dequantize()  # type: ignore[operator]  # torchao's tensor
    wide = layer.weight.detach().clone()
    made = four_bit_layer(layer)
    assert torch.equal(made.weight, expected)
    step = (wide.amax(1) - wide.amin(1)).max() / 15
    assert float((made.weight - wide).abs().max()) <= float(step)


def test_product_and_gradient_are_those_of_the_widened_layer(layer: nn.Linear) -> None:
    made = four_bit_layer(layer)
    x = torch.randn(5, 256, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = made(x), made.widened()(y)
    assert torch.allclose(out, expected, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=1e-5)


def test_only_packed_weights_are_kept_for_the_backward_pass(layer: nn.Linear) -> None:
    made = four_bit_layer(layer)
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        made(torch.randn(5, 256, requires_grad=True))
    assert sum(x.numel() * x.element_size() for x in kept) < layer.in_features * layer.out_features


def test_layers_of_several_sizes_and_types_share_a_buffer_without_mixing_values() -> None:
    torch.manual_seed(1)
    # More numbers than are widened at a time, then a smaller one, and a product in bf16 in between.
    buffer = WideBuffer()
    layers = [four_bit_layer(nn.Linear(width, out), buffer) for width, out in ((4096, 300), (256, 48))]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for layer in layers:
            x = torch.randn(3, layer.in_features).to(dtype).requires_grad_()
            expected = nn.functional.linear(x, layer.weight.to(dtype)) + layer.bias.to(dtype)
            assert torch.equal(layer(x), expected)
    used = [buffer.of(layer.codes, torch.float32) for layer in layers]
    assert used[0].data_ptr() == used[1].data_ptr()


def test_answering_keeps_no_buffer_and_training_goes_on_after_it(layer: nn.Linear) -> None:
    made, x = four_bit_layer(layer), torch.randn(2, 256)
    with torch.inference_mode():
        said = made(x)
    with torch.no_grad():
        made(x.clone().requires_grad_())
    assert made.buffer._kept is None
    y = x.clone().requires_grad_()
    learned = made(y)
    assert torch.equal(learned, said)
    learned.sum().backward()
    assert y.grad is not None
    assert made.buffer._kept is not None


def test_adapters_are_added_without_widening_a_layer(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    from nvila.tuning.applying import inject

    model = nn.Sequential(four_bit_layer(layer))
    monkeypatch.setattr(four_bit, "_widen", lambda *_: pytest.fail("a layer was widened"))
    inject(model, LoraConfig(r=4, target_modules=["0"]))
    assert model[0].lora_A["default"].weight.shape == (4, 256)  # type: ignore[index, union-attr]  # PEFT's dict
    monkeypatch.undo()
    assert float(model[0].base_layer.weight.detach().abs().max()) > 0  # type: ignore[union-attr, operator]  # PEFT's


def test_it_takes_an_eighth_of_fp32(layer: nn.Linear) -> None:
    made = four_bit_layer(layer)
    held = sum(x.numel() * x.element_size() for name, x in made.named_buffers())
    assert held == 48 * 256 // 2 + 2 * 4 * 48 * 2
    assert [name for name, _ in made.named_parameters()] == ["bias"]


def test_the_meta_device_knows_its_shape() -> None:
    made = four_bit_layer(nn.Linear(256, 48, device="meta"))
    assert isinstance(made, FourBitLinear)
    assert made.codes.shape == (48, 128)
    assert made(torch.empty(2, 256, device="meta")).shape == (2, 48)


def test_widths_without_a_group_are_found_from_the_configuration() -> None:
    class Text:
        hidden_size, intermediate_size = 64, 100

    assert group_size(100) is None
    with pytest.raises(CapabilityError, match="intermediate_size 100"):
        check_four_bit(Text())
