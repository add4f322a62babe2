"""Every variant of the model, tiny: towers, decoders, tilings and video pooling, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nvila.configuration import NVILAConfig
from nvila.errors import CapabilityError, DataError
from nvila.modeling import NVILAForConditionalGeneration

IMAGE, VIDEO, LF, VOCABULARY = 90, 91, 10, 97
VISION = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
S2: dict[str, Any] = {
    "image_aspect_ratio": "dynamic_s2",
    "mm_projector_type": "mlp_downsample",
    "s2_scales": "16,32,48",
}


def build(text: dict[str, Any] | None = None, **kwargs: Any) -> NVILAForConditionalGeneration:
    torch.manual_seed(3)
    config = NVILAConfig(
        vision_config=dict(VISION),
        text_config={"model_type": "qwen2", **TEXT, **(text or {})},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_end_token_id=LF,
        **kwargs,
    )
    model = NVILAForConditionalGeneration(config)
    model.eval()
    return model


def tiles(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def spliced_by_hand(model: NVILAForConditionalGeneration, ids: Tensor, images: Tensor, videos: Tensor) -> Tensor:
    """The loop over tokens that the model avoids."""
    queues = {IMAGE: list(images), VIDEO: list(videos)}
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    rows = [[queues[token].pop(0) if token in queues else table[token] for token in row] for row in ids.tolist()]
    assert not queues[IMAGE]
    assert not queues[VIDEO]
    return torch.stack([torch.stack(row) for row in rows])


def row(*parts: list[int]) -> list[int]:
    return [token for part in parts for token in part]


DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "llama": {"model_type": "llama"},
    "smollm3": {"model_type": "smollm3"},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt_neox": {"model_type": "gpt_neox", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", DECODERS)
def test_any_decoder_gives_the_logits_of_its_causal_model(name: str) -> None:
    model = build(DECODERS[name])
    causal = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    causal.base_model.load_state_dict(model.model.language_model.state_dict())
    with torch.no_grad():
        causal.get_output_embeddings().weight.copy_(model.lm_head.weight)
    ids = torch.tensor([[5, 6, 7, 8, 9, 11]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, causal(input_ids=ids).logits)
    assert model.config.tie_word_embeddings == causal.config.tie_word_embeddings
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["gemma2", "cohere", "llama"])
def test_loss_goes_through_the_head_of_the_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(DECODERS[name])
    ids = torch.randint(20, 80, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    monkeypatch.setattr("nvila.modeling.WHOLE_LOGITS", 0)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    nll, _ = model.supervised_nll(model.model(input_ids=ids).last_hidden_state, ids)
    torch.testing.assert_close(nll.mean(), expected)


def test_loss_is_divided_by_the_items_of_all_batches() -> None:
    model = build()
    ids = torch.tensor([[5, 6, 7, 8]])
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids, num_items_in_batch=12).loss, loss / 4)
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", [{}, S2], ids=["plain", "s2"])
def test_images_and_videos_of_a_batch_are_spliced_in_order(variant: dict[str, Any], implementation: str) -> None:
    model = build(video_pool_sizes=[[2, 1, 1]], **variant)
    model.set_attn_implementation(implementation)
    pixels, frames, counts = tiles(2), tiles(6, 1), torch.tensor([4, 2])
    n = model.config.num_image_tokens
    image, video = [IMAGE] * n + [LF], [VIDEO] * n + [LF]
    ids = torch.tensor([row(image, [7], video, video, [8]), row([9], video, image, [3] * (n + 2))])
    with torch.no_grad():
        images = model.get_image_features(pixels).reshape(-1, 32)
        videos = model.get_video_features(frames, counts)
        embeds = spliced_by_hand(model, ids, images, videos)
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
        given = {"pixel_values": pixels, "pixel_values_videos": frames, "video_frames": counts}
        torch.testing.assert_close(model(input_ids=ids, **given).logits, expected)


def test_the_tower_runs_once_for_all_images_and_frames() -> None:
    model = build()
    seen = []
    hook = model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    n = model.config.num_image_tokens
    ids = torch.tensor([[IMAGE] * n * 2 + [VIDEO] * n * 3])
    model(input_ids=ids, pixel_values=tiles(2), pixel_values_videos=tiles(3))
    hook.remove()
    assert seen == [5]


@pytest.mark.parametrize(
    ("ids", "media", "message"),
    [
        ([IMAGE] * 3, {"pixel_values": tiles(1)}, "3 image placeholders but the images give 4 visual"),
        ([VIDEO] * 3, {"pixel_values_videos": tiles(1)}, "3 video placeholders but the videos give 4 visual"),
        ([IMAGE] * 4, {"pixel_values_videos": tiles(1)}, "4 image placeholders but the images give 0 visual"),
        ([IMAGE] * 4, {}, "4 image placeholders but the images give 0 visual"),
        ([VIDEO] * 4, {}, "4 video placeholders but the videos give 0 visual"),
        ([5] * 4, {"pixel_values": tiles(1)}, "0 image placeholders but the images give 4 visual"),
        (
            [VIDEO] * 8,
            {"pixel_values_videos": tiles(2), "video_frames": torch.tensor([1, 2])},
            "video_frames counts 3 frames but pixel_values_videos has 2",
        ),
    ],
)
def test_placeholders_and_media_are_counted_by_kind(ids: list[int], media: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build()(input_ids=torch.tensor([ids]), **media)


def test_an_answer_may_hold_the_id_of_a_placeholder() -> None:
    model = build()
    cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache).logits.shape == (1, 1, VOCABULARY)
    assert model(input_ids=torch.tensor([[VIDEO, 5]]), past_key_values=cache).logits.shape == (1, 2, VOCABULARY)


def test_pooling_one_by_one_is_no_pooling() -> None:
    model = build()
    frames = tiles(3)
    with torch.no_grad():
        torch.testing.assert_close(model.get_video_features(frames), model.get_image_features(frames).flatten(0, 1))


def test_pyramid_of_poolings_is_the_means_one_after_the_other() -> None:
    model = build(video_pool_sizes=[[2, 1, 1], [4, 2, 2]])
    with torch.no_grad():
        frames = model.get_image_features(tiles(4))
        pooled = model.get_video_features(tiles(4))
    expected = [frames[:2].mean(0), frames[2:].mean(0), frames.mean((0, 1), keepdim=True)[0]]
    torch.testing.assert_close(pooled, torch.cat(expected))


def test_single_tile_with_s2_is_three_equal_copies() -> None:
    model = build(**S2)
    pixels = tiles(2)
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        expected = model.model.mm_projector(torch.cat([features] * 3, dim=-1))
        torch.testing.assert_close(model.get_image_features(pixels), expected.flatten(0, 1))
        given = model.get_image_features(pixels, torch.zeros(2, 2, dtype=torch.long))
    torch.testing.assert_close(given, expected.flatten(0, 1))


def test_s2_tokens_run_row_by_row_over_the_image() -> None:
    """Against a loop over positions of the merged map; 2 columns and 5 rows, so that axes cannot be swapped."""
    model = build(**S2)
    columns, rows = 2, 5
    pixels = tiles(5 + columns * rows)
    with torch.no_grad():
        out = model.get_image_features(pixels, torch.tensor([[columns, rows]]))
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2].view(-1, 4, 4, 12)
        last = features[5:].view(rows, columns, 4, 4, 12).permute(0, 2, 1, 3, 4).reshape(rows * 4, columns * 4, 12)
        middle = features[1:5].view(2, 2, 4, 4, 12).permute(0, 2, 1, 3, 4).reshape(8, 8, 12)
        pools = [
            nn.functional.adaptive_avg_pool2d(part.permute(2, 0, 1), (rows * 4, columns * 4)).permute(1, 2, 0)
            for part in (features[0], middle)
        ]
        merged = torch.cat([*pools, last], dim=-1)
        expected = torch.empty(rows * 2, columns * 2, 32)
        for y in range(rows):
            for x in range(columns):
                tile = merged[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(1, 16, 36)
                expected[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = model.model.mm_projector(tile).view(2, 2, 32)
    torch.testing.assert_close(out, expected.flatten(0, 1))


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, eos_token_id=-1, **kwargs)
    assert isinstance(out, Tensor)
    return out[:, ids.shape[1] :]


def test_beams_and_samples_take_their_own_rows_media() -> None:
    model = build(**S2)
    n = model.config.num_image_tokens
    ids = torch.tensor([[5] * n + [IMAGE] * n + [6], [IMAGE] * 2 * n + [7]])
    pixels = tiles(3)
    together = generate(model, ids, pixel_values=pixels, num_beams=3, do_sample=False)
    alone = [
        generate(model, ids[:1], pixel_values=pixels[:1], num_beams=3, do_sample=False),
        generate(model, ids[1:], pixel_values=pixels[1:], num_beams=3, do_sample=False),
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    video = torch.tensor([[VIDEO] * n + [6]])
    torch.manual_seed(0)
    samples = generate(model, video, pixel_values_videos=tiles(1), do_sample=True, num_return_sequences=4)
    assert samples.shape == (4, 6)
    assert len({tuple(sample) for sample in samples.tolist()}) > 1


def test_generation_with_video_and_cache_equals_generation_without() -> None:
    model = build(video_pool_sizes=[[2, 1, 1]], **S2)
    n = model.config.num_image_tokens
    ids = torch.tensor([row([5], [IMAGE] * n, [LF], [VIDEO] * n, [LF, 6])])
    given = {"pixel_values": tiles(1), "pixel_values_videos": tiles(2, 1), "do_sample": False}
    cached = generate(model, ids, **given)
    assert cached.tolist() == generate(model, ids, use_cache=False, **given).tolist()
    assert cached.tolist() == generate(model, ids, cache_implementation="static", **given).tolist()


def test_time_tokens_have_soft_targets_in_training_only() -> None:
    times = list(range(60, 66))
    model = build(num_time_tokens=6, time_token_ids=times, soft_ce_std=1.0)
    ids = torch.tensor([[5, 62, 7, 65, 8]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        hard = -logs[range(4), ids[0, 1:]]
        soft = hard.clone()
        for place, target in ((0, 62), (2, 65)):
            weights = torch.tensor([2.718281828459045 ** (-((target - other) ** 2) / 2) for other in times])
            soft[place] = -(weights / weights.sum() * logs[place, times]).sum()
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, hard.mean())
        torch.testing.assert_close(model.train()(input_ids=ids, labels=ids).loss, soft.mean())


def test_gradient_checkpointing_with_s2_and_video_changes_no_gradient() -> None:
    n = 4
    ids = torch.tensor([row([IMAGE] * n, [LF], [VIDEO] * n, [LF, 6, 7])])
    found = []
    for checkpointing in (False, True):
        model = build(**S2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, pixel_values=tiles(1), pixel_values_videos=tiles(1, 1)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("vision_tower" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_flash_attention_refuses_a_mask_of_pairs() -> None:
    model = build()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(CapabilityError, match="flash_attention_2 takes no mask of pairs"):
        model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_hidden_states_and_attentions_come_on_request() -> None:
    model = build()
    model.set_attn_implementation("eager")
    out = model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
