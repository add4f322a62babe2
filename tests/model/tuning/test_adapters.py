"""Adapters: saved, loaded, merged, over a base in 4 bits, and refused over another base."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from nvila.assembly import load_model, save_model
from nvila.errors import CheckpointError
from nvila.tuning.adapters import AdapterRecord, base_digest, load_adapter, merge, prepare, save_adapter
from nvila.tuning.four_bit import FourBitLinear, kind_in, widen_model
from nvila.tuning.methods import parse_method

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

METHODS = ["ln+lora", "lora+dora", "ln+qlora", "lora+frozen+frozen", "frozen+full+frozen"]


def logits(model: NVILAForConditionalGeneration) -> torch.Tensor:
    ids = torch.tensor([[10, *[model.config.image_token_id] * model.config.num_image_tokens, 11, 12, 13]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids, pixel_values=pixels).logits
    return out


def make(saved_model: Path, processor: NVILAProcessor, folder: Path, method: str) -> NVILAForConditionalGeneration:
    """Save an adapter with random content, and return the model that it belongs to."""
    model, _ = load_model(saved_model)
    chosen = parse_method(method, rank=4)
    prepare(model, chosen, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    record = AdapterRecord(method=chosen, base=str(saved_model), base_digest=base_digest(saved_model))
    save_adapter(model, processor, folder, record)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_says_the_same(
    saved_model: Path, processor: NVILAProcessor, tmp_path: Path, method: str
) -> None:
    model = make(saved_model, processor, tmp_path / "adapter", method)
    loaded, _ = load_model(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    base, _ = load_model(saved_model)
    assert not torch.allclose(logits(loaded), logits(base), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_nothing_and_leaves_a_plain_model(
    saved_model: Path, processor: NVILAProcessor, tmp_path: Path, method: str
) -> None:
    model = make(saved_model, processor, tmp_path / "adapter", method)
    expected = logits(model)
    merged = merge(model)
    assert torch.allclose(logits(merged), expected, atol=2e-4)
    base, _ = load_model(saved_model)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    save_model(merged, processor, tmp_path / "merged")
    again, _ = load_model(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_peft_reads_the_folder(saved_model: Path, processor: NVILAProcessor, tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel

    model = make(saved_model, processor, tmp_path / "adapter", "frozen+frozen+lora")
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).r == 4
    base, _ = load_model(saved_model)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(logits(cast("NVILAForConditionalGeneration", theirs.base_model.model)), logits(model))


def test_an_adapter_stands_over_a_base_in_four_bits(
    saved_model: Path, processor: NVILAProcessor, tmp_path: Path
) -> None:
    wide = make(saved_model, processor, tmp_path / "adapter", "ln+lora")
    stacked, _ = load_adapter(tmp_path / "adapter", four_bit=True)
    assert any(isinstance(module, FourBitLinear) for module in stacked.modules())
    near, far = logits(stacked), logits(load_model(saved_model)[0])
    wanted = logits(wide)
    # Nearer to the adapted model than the base is: the adapter speaks through the rounded weights.
    assert float((near - wanted).norm()) < float((far - wanted).norm())


def test_over_other_four_bit_values_than_at_training_the_base_stays_wide(
    saved_model: Path, processor: NVILAProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(saved_model, processor, tmp_path / "adapter", "ln+qlora")
    record = json.loads((tmp_path / "adapter" / "nvila_adapter.json").read_text())
    assert record["base"]["four_bit"] == "int4"
    assert kind_in(load_adapter(tmp_path / "adapter")[0]) == "int4"
    assert not caplog.records

    record["base"]["four_bit"] = "nf4"
    (tmp_path / "adapter" / "nvila_adapter.json").write_text(json.dumps(record))
    assert kind_in(load_adapter(tmp_path / "adapter")[0]) is None
    assert "trained over nf4, this device has int4" in caplog.text
    assert kind_in(load_adapter(tmp_path / "adapter", four_bit=True)[0]) == "int4"


def test_unknown_four_bit_values_are_named(saved_model: Path, processor: NVILAProcessor, tmp_path: Path) -> None:
    make(saved_model, processor, tmp_path / "adapter", "ln+qlora")
    record = json.loads((tmp_path / "adapter" / "nvila_adapter.json").read_text())
    del record["base"]["four_bit"]
    (tmp_path / "adapter" / "nvila_adapter.json").write_text(json.dumps(record))
    assert AdapterRecord.read(tmp_path / "adapter").four_bit == "int4"  # of before it was noted
    record["base"]["four_bit"] = "fp4"
    (tmp_path / "adapter" / "nvila_adapter.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"four_bit is 'fp4', not one of nf4, int4"):
        load_model(tmp_path / "adapter")


def test_layers_of_bitsandbytes_are_widened(saved_model: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra tune-gpu")
    wide, _ = load_model(saved_model)
    model, _ = load_model(saved_model)
    layer = cast("Any", model.model.language_model).layers[0].mlp.up_proj
    held = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    held.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=held)
    cast("Any", model.model.language_model).layers[0].mlp.up_proj = held.to("cpu")
    rounded = logits(copy.deepcopy(model))  # a forward pass on a CPU packs the layer for itself
    assert kind_in(model) == "nf4"
    assert widen_model(model) == 1
    assert kind_in(model) is None
    # On a CPU bitsandbytes multiplies in bf16; what rounding to 4 bits does is many times as much.
    assert float((logits(model) - rounded).norm()) < 0.2 * float((logits(wide) - rounded).norm())


def test_another_base_is_refused_before_it_is_loaded(
    saved_model: Path, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    make(saved_model, processor, tmp_path / "adapter", "ln+lora")
    with torch.no_grad():
        fresh_model.lm_head.weight[0, 0] += 1
    save_model(fresh_model, processor, tmp_path / "other")
    with pytest.raises(CheckpointError, match="belongs to a base with digest") as error:
        load_model(tmp_path / "adapter", base=tmp_path / "other")
    assert base_digest(tmp_path / "other")[:12] in error.value.message


def test_a_base_that_is_gone_is_named(saved_model: Path, processor: NVILAProcessor, tmp_path: Path) -> None:
    make(saved_model, processor, tmp_path / "adapter", "ln+lora")
    record = json.loads((tmp_path / "adapter" / "nvila_adapter.json").read_text())
    record["base"]["path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "nvila_adapter.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="gone") as error:
        load_model(tmp_path / "adapter")
    assert "--base" in error.value.hint
    load_model(tmp_path / "adapter", base=saved_model)


@pytest.mark.parametrize("file", ["trained.safetensors", "adapter_model.safetensors", "nvila_adapter.json"])
def test_damage_is_named(saved_model: Path, processor: NVILAProcessor, tmp_path: Path, file: str) -> None:
    make(saved_model, processor, tmp_path / "adapter", "ln+lora")
    (tmp_path / "adapter" / file).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=file):
        load_model(tmp_path / "adapter")


def test_a_tensor_too_few_is_named(saved_model: Path, processor: NVILAProcessor, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(saved_model, processor, tmp_path / "adapter", "ln+lora")
    path = tmp_path / "adapter" / "trained.safetensors"
    stored = load_file(path)
    gone = sorted(stored)[0]
    save_file({name: value for name, value in stored.items() if name != gone}, path)
    with pytest.raises(CheckpointError, match=f"{gone} is missing"):
        load_model(tmp_path / "adapter")


def test_the_digest_follows_weights_and_not_the_tokenizer(saved_model: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_model, tmp_path / "copy")
    assert base_digest(tmp_path / "copy") == base_digest(saved_model)
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    assert base_digest(tmp_path / "copy") == base_digest(saved_model)
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert base_digest(tmp_path / "copy") != base_digest(saved_model)
