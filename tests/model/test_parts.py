from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from nvila.configuration import NVILAConfig
from nvila.data.tokenizers import build_word_tokenizer
from nvila.errors import CapabilityError, ConfigError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.parts import byte_tokenizer
from nvila.processing import NVILAProcessor

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words that knows neither media nor padding."""
    full = build_word_tokenizer(["what is this"], model_max_length=64)
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "\n": 2, "what": 3, "is": 4, "this": 5}, "<unk>"))
    backend.pre_tokenizer = full.backend_tokenizer.pre_tokenizer
    assert isinstance(backend.pre_tokenizer, pre_tokenizers.PreTokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_of_the_old_rows(tied: bool) -> None:
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(LANGUAGE | {"tie_word_embeddings": tied})))
    rows, head = causal.get_input_embeddings().weight.detach()[:6].clone(), causal.lm_head.weight.detach()[:6].clone()
    tower = SiglipVisionModel._from_config(AutoConfig.for_model(**VISION))
    tokenizer = bare_tokenizer()
    model, processor = NVILAForConditionalGeneration.from_parts(
        vision=tower, language=causal, variant="basic", tokenizer=tokenizer
    )
    size = len(tokenizer)
    assert size == 6 + 5  # turns, media, padding
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (size, 16)
    for weight, old in ((model.get_input_embeddings().weight, rows), (model.lm_head.weight, head)):
        assert torch.equal(weight[:6], old)
        torch.testing.assert_close(weight[6:], old.mean(0).expand(size - 6, -1))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.model.vision_tower is tower
    assert not any("head" in name for name, _ in tower.named_parameters())
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert isinstance(processor, NVILAProcessor)


@pytest.mark.parametrize(
    ("variant", "aspect", "channels"),
    [("nvila", "dynamic_s2", 36), ("nvila-lite", "dynamic", 12), ("basic", "resize", 12)],
)
def test_assembled_model_answers_and_comes_back_from_disk(
    variant: str, aspect: str, channels: int, tmp_path: Path
) -> None:
    from PIL import Image

    model, processor = NVILAForConditionalGeneration.from_parts(
        vision=VISION, language=LANGUAGE, variant=variant, tokenizer=bare_tokenizer()
    )
    assert (model.config.image_aspect_ratio, model.config.mm_channels) == (aspect, channels)
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 20))}, "what is this"]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    system = processor.apply_chat_template(messages).startswith("<|im_start|>system\nYou are a helpful assistant<")
    assert system
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = NVILAForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    again = NVILAProcessor.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])


def test_video_variant_has_time_tokens() -> None:
    model, processor = NVILAForConditionalGeneration.from_parts(
        vision=VISION, language=LANGUAGE, variant="nvila-video", tokenizer=bare_tokenizer(), num_time_tokens=4
    )
    assert processor.tokenizer.convert_ids_to_tokens(model.config.time_token_ids) == ["<t0>", "<t1>", "<t2>", "<t3>"]
    assert processor.video_pool_sizes == [[8, 1, 1]]
    assert len(model.lm_head.weight) == len(processor.tokenizer)


def test_parts_are_read_from_folders(tmp_path: Path) -> None:
    whole = SiglipConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        vision_config={key: value for key, value in VISION.items() if key != "model_type"},
    )
    SiglipModel(whole).save_pretrained(tmp_path / "siglip")
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LANGUAGE))
    causal.save_pretrained(tmp_path / "llama")
    bare_tokenizer().save_pretrained(tmp_path / "llama")
    model, _ = NVILAForConditionalGeneration.from_parts(
        vision=tmp_path / "siglip", language=tmp_path / "llama", dtype=torch.bfloat16
    )
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layer = "layers.0.mlp.up_proj.weight"
    ours = model.model.language_model.state_dict()[layer]
    torch.testing.assert_close(ours, causal.model.state_dict()[layer].bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "nvila-light"}, ConfigError, "did you mean 'nvila-lite'"),
        ({"tokenizer": None}, ConfigError, "there is no tokenizer"),
        ({"vision": "missing"}, ConfigError, "missing is no folder"),
        ({"vision": LANGUAGE}, CapabilityError, "no SigLIP"),
        ({"language": LANGUAGE | {"model_type": "phi"}}, CapabilityError, "no plain linear"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"vision": VISION, "language": LANGUAGE, "variant": "basic", "tokenizer": bare_tokenizer(), **change}
    with pytest.raises(error, match=message):
        NVILAForConditionalGeneration.from_parts(**given)


def test_decoder_with_unknown_treatment_of_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(**(LANGUAGE | {"model_type": "cohere", "logit_scale": 0.5}))
    monkeypatch.setattr("nvila.language_head._FACTORS", ())
    with pytest.raises(CapabilityError, match="'cohere' treats its logits"):
        NVILAForConditionalGeneration.from_parts(vision=VISION, language=config, tokenizer=bare_tokenizer())


@pytest.mark.parametrize("preset", ["tiny-nvila", "nvila-8b"])
def test_byte_tokenizer_has_the_ids_of_the_preset(preset: str) -> None:
    config = NVILAConfig.from_preset(preset)
    tokenizer = byte_tokenizer(config)
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert tokenizer.convert_tokens_to_ids("<vila/video>") == config.video_token_id
    assert tokenizer("\n")["input_ids"] == [config.image_end_token_id]
    assert tokenizer.eos_token_id == config.text_config.eos_token_id
    text = "Grün 猫 <image>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
