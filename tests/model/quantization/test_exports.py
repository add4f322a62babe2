"""The language part in forms of other engines, read by the readers of those forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerFast

from nvila.configuration import NVILAConfig
from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.compressed_export import export_compressed
from nvila.quantization.config import QuantizationConfig, Scheme
from nvila.quantization.gguf_export import _splitting, export_gguf
from nvila.quantization.language_part import LinearWeight, weights_of
from nvila.quantization.quantize import quantize_model

SCHEMES: tuple[Scheme, ...] = ("w4a16", "int8", "w8a8", "fp8", "none")
IDS = torch.arange(20, 32).view(1, -1)


def quantized(model: NVILAForConditionalGeneration, scheme: Scheme) -> NVILAForConditionalGeneration:
    quantize_model(model, QuantizationConfig(vision="none", language=scheme, group_size=32))
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def value(reader: Any, name: str) -> Any:
    """Return a field of a GGUF file."""
    return reader.get_field(name).contents()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_what_vllm_does(
    scheme: Scheme, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    model = quantized(fresh_model, scheme)
    size = export_compressed(model, processor.tokenizer, tmp_path)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    # transformers 5.23 expects packed zero points in an unpacked shape, unless it widens the weights while loading.
    options: dict[str, Any] = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)} if scheme == "w4a16" else {}
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    with torch.inference_mode():
        error = distance(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    # Activations of w8a8 are rounded by both, at the ends of their range not in the same way.
    assert error < (0.04 if scheme == "w8a8" else 1e-5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer("what color is the shape?") == processor.tokenizer("what color is the shape?")


def test_the_packages_own_decompressor_gives_our_values(
    fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = quantized(fresh_model, "w4a16")
    export_compressed(model, processor.tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    stored = load_file(tmp_path / "model.safetensors")
    layers = [weight for _, weight in weights_of(model) if isinstance(weight, LinearWeight)]
    assert len(layers) == 14
    for layer in layers:
        base = f"model.{layer.name}."
        parts = {name.removeprefix(base): value for name, value in stored.items() if name.startswith(base)}
        parts.pop("bias", None)
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        expected = model.model.language_model.get_submodule(layer.name).weight.dequantize()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ggufs_reader_gives_our_values(
    scheme: Scheme, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    import gguf

    model = quantized(fresh_model, scheme)
    path = tmp_path / "language.gguf"
    assert export_gguf(model, processor.tokenizer, path) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    decoder = model.model.language_model
    assert len(tensors) == len(list(decoder.named_parameters()))
    for theirs, ours in (("blk.1.ffn_down", "layers.1.mlp.down_proj"), ("blk.0.attn_q", "layers.0.self_attn.q_proj")):
        tensor = tensors[f"{theirs}.weight"]
        weight = decoder.get_submodule(ours).weight.detach()
        expected = weight.dequantize() if hasattr(weight, "dequantize") else weight
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        kind = {"w4a16": "Q4_1", "int8": "Q8_0", "w8a8": "Q8_0"}.get(scheme, "F16")
        assert tensor.tensor_type.name == kind
        # Scales have half precision there: eleven bits.
        torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    assert value(reader, "general.architecture") == "qwen2"
    assert value(reader, "qwen2.attention.head_count_kv") == 2
    assert value(reader, "tokenizer.ggml.model") == "none"


@pytest.mark.parametrize("scheme", ["w4a16", "int8"])
def test_llama_cpp_agrees(
    scheme: Scheme, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it takes minutes to build")
    model = quantized(fresh_model, scheme)
    path = tmp_path / "language.gguf"
    export_gguf(model, processor.tokenizer, path)
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    try:
        llama.eval(IDS[0].tolist())
        found = torch.tensor(llama.scores[: IDS.shape[1]])
    finally:
        llama.close()
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits[0]
    # It rounds activations to eight bits for these products.
    assert distance(found, expected) < 0.05
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.8


def test_rows_of_llama_are_reordered(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Rotary pairs stand beside each other in files of that family: a decoder of it must come out the same."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it takes minutes to build")
    torch.manual_seed(5)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_use_head": False}
    language = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    language |= {"initializer_range": 0.2, "max_position_embeddings": 128}
    model = NVILAForConditionalGeneration(
        NVILAConfig(vision_config=vision, text_config=language, image_token_id=1, video_token_id=2)
    ).eval()
    quantized(model, "int8")
    path = tmp_path / "language.gguf"
    export_gguf(model, tokenizer, path)
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    try:
        llama.eval(IDS[0].tolist())
        found = torch.tensor(llama.scores[: IDS.shape[1]])
    finally:
        llama.close()
    with torch.inference_mode():
        assert distance(found, model(input_ids=IDS).logits[0]) < 0.05


def test_what_gguf_cannot_hold_is_refused(
    fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    quantize_model(fresh_model, QuantizationConfig(vision="none", language="w4a16", group_size=16))
    with pytest.raises(CapabilityError, match="groups of 16 do not fill GGUF's blocks of 32"):
        export_gguf(fresh_model, processor.tokenizer, tmp_path / "a.gguf")
    fresh_model.config.text_config.model_type = "gemma9"
    try:
        with pytest.raises(CapabilityError, match="family 'gemma9' cannot be written as GGUF"):
            export_gguf(fresh_model, processor.tokenizer, tmp_path / "a.gguf")
    finally:
        fresh_model.config.text_config.model_type = "qwen2"


@pytest.mark.parametrize(
    ("pre_tokenizer", "family", "name"),
    [
        ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}, "qwen2", "qwen2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}, "llama", None),
        (
            {"pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
            "llama",
            "smollm",
        ),
        ({"type": "ByteLevel"}, "llama", "gpt-2"),
        ({}, "qwen2", None),
    ],
)
def test_ways_of_splitting_text(pre_tokenizer: dict[str, Any], family: str, name: str | None) -> None:
    assert _splitting(pre_tokenizer, family) == name


def test_a_byte_level_tokenizer_goes_into_the_file(fresh_model: NVILAForConditionalGeneration, tmp_path: Path) -> None:
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    size = fresh_model.config.text_config.vocab_size
    trainer = trainers.BpeTrainer(vocab_size=size - 4, special_tokens=["<end>"], show_progress=False)
    raw.train_from_iterator(["what color is the shape? a red circle, the red shape"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    export_gguf(fresh_model, tokenizer, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == size
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    types = value(reader, "tokenizer.ggml.token_type")
    assert (types[0], types[1], types[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    merges = value(reader, "tokenizer.ggml.merges")
    assert merges
    assert all(merge.count(" ") == 1 for merge in merges)
