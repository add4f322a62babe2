"""Saved activations in FP8: forward untouched, gradients near, bytes counted."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from nvila.training.config import Fp8Config, PrecisionConfig
from nvila.training.precision import apply_precision
from nvila.training.precision.fp8_emulated import E4M3, round_to_fp8
from nvila.training.precision.saved_activations import PackedActivation, pack_groups, pack_tensor, save_in_fp8


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    config._attn_implementation = "sdpa"
    return cast("nn.Module", Qwen2Model(config)).train()


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward on fixed embeddings; returns the output and the gradients of all parameters and inputs."""
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y: Tensor = model(inputs_embeds=x).last_hidden_state
    # Not a square: the last norm makes that the same for every model.
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert x.grad is not None
    return y.detach(), {"input": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def kept_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps after a forward pass, every storage once, weights left out."""
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.detach()
        # Not itself: a graph that holds its own output is never freed.
        return x.detach()

    x = torch.randn(2, 24, 64, dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        y = model(inputs_embeds=x).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the walk touches deprecated attributes of torch
        packed = [o for o in gc.get_objects() if isinstance(o, PackedActivation)]
    assert y.requires_grad
    return sum(x.untyped_storage().nbytes() for x in seen.values()) + sum(one.num_bytes for one in packed)


def test_forward_is_untouched_and_gradients_are_near(decoder: nn.Module) -> None:
    saving = copy.deepcopy(decoder)
    names = [name for name, _ in saving.named_parameters()]
    # Two blocks: seven linear layers, two norms and an MLP each; and the norm behind them.
    assert save_in_fp8(saving) == 21
    assert save_in_fp8(saving) == 0
    assert [name for name, _ in saving.named_parameters()] == names
    (wide, gradients), (narrow, near) = run(copy.deepcopy(decoder)), run(saving)
    assert torch.equal(wide, narrow)
    assert near.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert not torch.equal(near[name], gradient) or "bias" in name, name
        similarity = torch.cosine_similarity(near[name].flatten(), gradient.flatten(), dim=0)
        assert float(similarity) > 0.99, name


def test_a_copy_trains_its_own_weights(decoder: nn.Module) -> None:
    first = copy.deepcopy(decoder)
    save_in_fp8(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    output, gradients = run(second)
    assert float(output.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in first.parameters())
    assert gradients["layers.0.mlp.gate_proj.weight"].any()


def test_evaluation_and_inference_keep_nothing(decoder: nn.Module) -> None:
    saving = copy.deepcopy(decoder)
    save_in_fp8(saving)
    x = torch.randn(1, 4, 64)
    with torch.no_grad():
        expected = decoder(inputs_embeds=x).last_hidden_state
        assert torch.equal(saving(inputs_embeds=x).last_hidden_state, expected)
    saving.eval()
    assert torch.equal(saving(inputs_embeds=x).last_hidden_state, expected)
    assert not [o for o in gc.get_referrers(PackedActivation) if isinstance(o, PackedActivation)]


def test_a_block_keeps_less_than_two_thirds_of_bf16(decoder: nn.Module) -> None:
    wide = copy.deepcopy(decoder).bfloat16()
    saving = copy.deepcopy(wide)
    save_in_fp8(saving)
    gc.collect()
    assert kept_bytes(wide, torch.bfloat16) > 1.5 * kept_bytes(saving, torch.bfloat16)


def test_several_layers_share_one_packed_input() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
    save_in_fp8(layers)
    x = torch.randn(4, 32, requires_grad=True)
    gc.collect()
    y = sum(layer(x) for layer in layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sum(isinstance(o, PackedActivation) for o in gc.get_objects()) == 1
    assert isinstance(y, Tensor)
    x.data.mul_(2)  # what was kept is a copy
    y.sum().backward()
    expected = pack_tensor(x.detach() / 2).unpack().sum(0).expand(32, 32)
    torch.testing.assert_close(next(layers[0].parameters()).grad, expected)


def test_an_input_changed_in_place_is_packed_anew() -> None:
    layer = nn.Linear(32, 32, bias=False)
    save_in_fp8(layer)
    x = torch.ones(2, 32)
    first = layer(x)
    x.mul_(3)
    second = layer(x)
    first.sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, torch.full((32, 32), 2.0))
    layer.weight.grad = None
    second.sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((32, 32), 6.0))


@pytest.mark.parametrize("width", [16, 33], ids=["whole groups", "a short last group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_bound_the_error_by_their_own_largest_value(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    x[0, 0] = 0
    packed = pack_groups(x)
    back = packed.unpack()
    assert back.shape == x.shape
    assert back.dtype == dtype
    assert not back[0, 0].any()
    for ours, theirs in zip(back.float().split(16, dim=-1), x.float().split(16, dim=-1), strict=True):
        largest = theirs.abs().amax(-1, keepdim=True)
        # Half a step of three mantissa bits at the top of the range, bf16 scale and type on top of it.
        assert bool(((ours - theirs).abs() <= largest * 2**-4 * 1.1).all())


def test_packing_a_rounded_tensor_is_exact() -> None:
    x = round_to_fp8(torch.randn(7, 40, generator=torch.Generator().manual_seed(0)), E4M3)
    torch.testing.assert_close(pack_tensor(x).unpack(), x, rtol=1e-6, atol=0)


def test_the_precision_setting_turns_it_on(decoder: nn.Module) -> None:
    options: dict[str, Any] = {"backend": "emulated", "min_features": 16}
    models = copy.deepcopy(decoder), copy.deepcopy(decoder)
    off = apply_precision(models[0], PrecisionConfig(name="fp8", fp8=Fp8Config(**options)))
    on = apply_precision(models[1], PrecisionConfig(name="fp8", fp8=Fp8Config(**options, save_activations=True)))
    assert (off.saving, on.saving) == (0, 21)
    (plain, wide), (saved, near) = run(models[0]), run(models[1])
    assert torch.equal(plain, saved)
    for name in ("layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"):
        assert float(torch.cosine_similarity(near[name].flatten(), wide[name].flatten(), dim=0)) > 0.99
