"""What a method makes learn, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from nvila.errors import CapabilityError, ConfigError
from nvila.training.config import PARTS
from nvila.tuning.applying import apply_method, count_parts, parameter_groups
from nvila.tuning.four_bit import FourBitLinear
from nvila.tuning.methods import LANGUAGE, PROJECTOR, VISION, TuneMethod, learning_rates, parse_method

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration

MATRIX = [
    TuneMethod(vision=vision, projector=projector, language=language, rank=4, dropout=0.0)
    for vision in VISION
    for projector in PROJECTOR
    for language in LANGUAGE
    if (vision, projector, language) != ("frozen", "frozen", "frozen")
]


def _loss(model: NVILAForConditionalGeneration) -> torch.Tensor:
    image = model.config.image_token_id
    ids = torch.tensor([[10, *[image] * model.config.num_image_tokens, 11, 12, 13, 14]])
    generator = torch.Generator().manual_seed(3)
    out = model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32, generator=generator), labels=ids)
    loss: torch.Tensor = out.loss
    return loss


@pytest.mark.parametrize("method", MATRIX, ids=lambda method: method.name)
def test_every_cell_of_the_matrix_learns_exactly_its_parts(
    fresh_model: NVILAForConditionalGeneration, method: TuneMethod
) -> None:
    apply_method(fresh_model, method)
    parts = count_parts(fresh_model)
    assert {part for part in PARTS if parts[part].num_trained} == set(method.parts)
    before = {name: p.detach().clone() for name, p in fresh_model.named_parameters()}
    groups = parameter_groups(fresh_model, learning_rates(method, 1e-2))
    optimizer = torch.optim.AdamW([{"params": group.parameters, "lr": group.lr} for group in groups], weight_decay=0.0)
    first = float(_loss(fresh_model.train()).detach())
    for _ in range(3):
        optimizer.zero_grad()
        _loss(fresh_model).backward()
        optimizer.step()
    assert float(_loss(fresh_model).detach()) < first
    trained = {name for part in parts.values() for name in part.trained}
    changed = {name for name, p in fresh_model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_ln_trains_the_norms_of_the_blocks_that_run(fresh_model: NVILAForConditionalGeneration) -> None:
    apply_method(fresh_model, parse_method("ln+frozen+lora", rank=2))
    names = count_parts(fresh_model)["vision"].trained
    tower = "model.vision_tower.encoder.layers"
    assert set(names) == {
        f"{tower}.{block}.layer_norm{norm}.{what}" for block in (0, 1) for norm in (1, 2) for what in ("weight", "bias")
    }


def test_lora_adapts_every_linear_layer_but_the_head(fresh_model: NVILAForConditionalGeneration) -> None:
    apply_method(fresh_model, parse_method("frozen+frozen+lora", rank=2))
    trained = count_parts(fresh_model)["language"].trained
    assert len(trained) == 2 * 2 * 7  # layers, matrices, and q, k, v, o, gate, up, down
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_patterns_choose_layers(fresh_model: NVILAForConditionalGeneration) -> None:
    apply_method(fresh_model, parse_method("ln+frozen+lora", rank=2, only=("*.layers.0.*proj", "*layer_norm1*")))
    parts = count_parts(fresh_model)
    assert all(".layers.0." in name for name in parts["language"].trained)
    assert parts["language"].trained
    assert all("layer_norm1" in name for name in parts["vision"].trained)
    assert parts["vision"].trained


def test_patterns_that_match_nothing_are_refused(fresh_model: NVILAForConditionalGeneration) -> None:
    with pytest.raises(ConfigError, match=r"only=\*nothing\* matches no layer"):
        apply_method(fresh_model, parse_method("ln+lora", only=("*nothing*",)))


def test_qlora_packs_the_language_model_and_counts_what_it_stands_for(
    model: NVILAForConditionalGeneration, fresh_model: NVILAForConditionalGeneration
) -> None:
    apply_method(fresh_model, parse_method("frozen+frozen+qlora", rank=2))
    plain = sum(p.numel() for p in model.model.language_model.parameters())
    assert count_parts(fresh_model)["language"].total == plain
    layers = [m for m in fresh_model.model.language_model.modules() if isinstance(m, FourBitLinear)]
    assert len(layers) == 14
    assert all(layer.codes.numel() * 2 == layer.in_features * layer.out_features for layer in layers)


def test_layers_without_a_four_bit_kernel_are_refused(fresh_model: NVILAForConditionalGeneration) -> None:
    decoder = fresh_model.model.language_model
    decoder.layers[0].mlp.up_proj = torch.nn.Linear(24, 128)
    with pytest.raises(CapabilityError, match="24 inputs has no 4-bit kernel"):
        apply_method(fresh_model, parse_method("frozen+qlora"))


def test_bf16_bases_learn_in_fp32(fresh_model: NVILAForConditionalGeneration) -> None:
    apply_method(fresh_model.to(torch.bfloat16), parse_method("frozen+frozen+lora", rank=2))  # type: ignore[arg-type]
    assert {p.dtype for p in fresh_model.parameters() if p.requires_grad} == {torch.float32}
