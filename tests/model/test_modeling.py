from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from nvila.data.conversation import ConversationEncoder
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.errors import DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

PROMPT = "<|im_start|>user\n<image>what color is the shape?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def inputs(processor: NVILAProcessor, pictures: dict[str, Image.Image]) -> dict[str, Tensor]:
    return dict(processor(pictures["a"], PROMPT))


def test_features_are_the_selected_hidden_state_through_the_projector(
    model: NVILAForConditionalGeneration, tiles: PixelCache
) -> None:
    pixels = tiles(("a", "b"))
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        expected = model.model.mm_projector(tower.hidden_states[model.config.mm_vision_select_layer])
        features = model.get_image_features(pixels)
        seen = model.model.tower_features(pixels)
    assert features.shape == (2, 4, 64)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(seen, tower.hidden_states[model.config.mm_vision_select_layer])


def test_logits_are_those_of_the_decoder_on_hand_spliced_embeddings(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    ids = inputs["input_ids"]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])[0]
        rows, number = [], 0
        for token in ids[0].tolist():
            if token == model.config.image_token_id:
                rows.append(features[number])
                number += 1
            else:
                rows.append(model.get_input_embeddings().weight[token])  # type: ignore[index]  # an Embedding
        embeds = torch.stack(rows).unsqueeze(0)
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
        torch.testing.assert_close(model(**inputs).logits, expected)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
        torch.testing.assert_close(model(input_ids=ids, image_features=features.unsqueeze(0)).logits, expected)


def test_loss_is_the_mean_over_supervised_tokens(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    ids = inputs["input_ids"]
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[:, 0] = ids[:, 0]  # nothing predicts the first token, so its label must not count
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        before = labels.clone()
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    assert torch.equal(labels, before)


def test_loss_needs_no_logits_of_unsupervised_positions(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape))
    try:
        with torch.no_grad():
            assert model(**inputs, labels=labels).logits is None
    finally:
        hook.remove()
    assert rows == [(2, 64)]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_last_logits_are_made_on_request(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor], keep: int
) -> None:
    with torch.no_grad():
        full = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, full[:, -keep:])
        chosen = torch.tensor([0, 4])
        torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits, full[:, chosen])


@pytest.mark.parametrize("keys", [("a", "b"), ()])
def test_wrong_number_of_images_names_both_counts(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor], tiles: PixelCache, keys: tuple[str, ...]
) -> None:
    features = model.get_image_features(tiles(keys)) if keys else torch.empty(0, 4, 64)
    with pytest.raises(
        DataError, match=f"the text has 4 image placeholders but the images give {4 * len(keys)} visual"
    ):
        model(input_ids=inputs["input_ids"], image_features=features)


def test_empty_batch_of_tiles_is_text_alone(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor], processor: NVILAProcessor
) -> None:
    none = torch.empty(0, 3, 1, 1)
    text = dict(processor(text="is there a circle?"))
    with torch.no_grad():
        assert torch.equal(model(**text, pixel_values=none).logits, model(**text).logits)
    with pytest.raises(DataError, match="the text has 4 image placeholders but the images give 0 visual tokens"):
        model(input_ids=inputs["input_ids"], pixel_values=none)


def generate(model: NVILAForConditionalGeneration, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    tokens = cast("Any", model).generate(**inputs, do_sample=False, max_new_tokens=10, eos_token_id=-1, **kwargs)
    assert isinstance(tokens, Tensor)
    return tokens


def test_generation_with_cache_equals_generation_without(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    with_cache = generate(model, inputs, use_cache=True)
    assert with_cache.shape[1] == inputs["input_ids"].shape[1] + 10
    assert torch.equal(with_cache, generate(model, inputs, use_cache=False))


def test_generation_encodes_the_image_once_and_depends_on_it(
    model: NVILAForConditionalGeneration, inputs: dict[str, Tensor], tiles: PixelCache
) -> None:
    calls = []
    hook = model.model.mm_projector.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = generate(model, inputs)
    finally:
        hook.remove()
    assert len(calls) == 1
    others = [generate(model, {**inputs, "pixel_values": tiles((key,))}) for key in "bcdefgh"]
    assert any(not torch.equal(first, other) for other in others)
    features = model.get_image_features(inputs["pixel_values"])
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "image_features": features}
    assert torch.equal(generate(model, given), first)


def test_batched_generation_equals_one_by_one(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    prompts = [PROMPT, PROMPT.replace("what color is the shape?", "is there a circle? yes or no? describe the image.")]
    images = [pictures["c"], pictures["d"]]
    together = generate(model, dict(processor(images, prompts, padding=True, padding_side="left")))
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = generate(model, dict(processor(image, prompt)))
        assert together[row, -10:].tolist() == alone[0, -10:].tolist()


def test_text_without_images_works(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
    inputs = dict(processor(text="is there a circle?"))
    assert "pixel_values" not in inputs
    with torch.no_grad():
        expected = model.model.language_model(input_ids=inputs["input_ids"]).last_hidden_state
        torch.testing.assert_close(model(**inputs).logits, model.lm_head(expected))


def test_blocks_behind_the_selected_layer_do_not_matter(
    fresh_model: NVILAForConditionalGeneration, tiles: PixelCache
) -> None:
    before = fresh_model.get_image_features(tiles(("a",)))
    tower = fresh_model.model.vision_tower
    with torch.no_grad():
        for parameter in [*tower.encoder.layers[2].parameters(), *tower.post_layernorm.parameters()]:
            parameter.fill_(float("nan"))
    assert torch.equal(fresh_model.get_image_features(tiles(("a",))), before)


def test_head_shares_the_embedding(fresh_model: NVILAForConditionalGeneration) -> None:
    assert fresh_model.get_output_embeddings().weight is fresh_model.get_input_embeddings().weight


def test_embeddings_can_be_replaced(model: NVILAForConditionalGeneration) -> None:
    changed = copy.deepcopy(model)
    changed.resize_token_embeddings(100, mean_resizing=False)
    assert changed.lm_head.out_features == changed.model.language_model.embed_tokens.num_embeddings == 100
    assert changed.get_output_embeddings().weight is changed.get_input_embeddings().weight


def test_gradient_checkpointing_gives_the_same_gradients(
    fresh_model: NVILAForConditionalGeneration, encoder: ConversationEncoder, tiles: PixelCache
) -> None:
    sample = encoder(vqa_sample(id="1", source="s", image="a", question="what color?", answer="red"))
    inputs = {
        "input_ids": torch.tensor([sample.ids]),
        "labels": torch.tensor([sample.labels]),
        "pixel_values": tiles(("a",)),
    }
    gradients = []
    for checkpointing in (False, True):
        fresh_model.train()
        if checkpointing:
            fresh_model.gradient_checkpointing_enable()
        fresh_model.zero_grad()
        fresh_model(**inputs).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in fresh_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
