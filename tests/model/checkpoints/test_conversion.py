"""Checkpoints converted from every layout to every other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SiglipVisionModel

from nvila.assembly import load_model, save_model
from nvila.checkpoints import LAYOUTS, convert, detect_layout
from nvila.checkpoints.expected import expected_shapes
from nvila.checkpoints.layouts import from_ours, to_ours
from nvila.checkpoints.shards import INDEX_FILE
from nvila.configuration import NVILAConfig
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

if TYPE_CHECKING:
    from tests.model.checkpoints.conftest import Tiny

LITE = {"image_aspect_ratio": "dynamic", "dynamic_s2": False, "s2_scales": "", "video_encoder": None}


@pytest.mark.parametrize(
    ("options", "through"),
    [
        ({}, ["nvila"]),
        ({"tied": True, "dtype": torch.bfloat16}, ["hf"]),
        ({"projector": "mlp_downsample_3x3_fix", "top": LITE, "sharded": True}, ["hf", "nvila"]),
        ({"media": False, "tied": True, "dtype": torch.float16}, ["nvila", "hf"]),
        ({"media": False, "dtype": torch.bfloat16}, ["nvila"]),
    ],
)
def test_round_trip_gives_back_every_bit_and_every_key(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], through: list[str]
) -> None:
    start = tiny.make(tmp_path / "start", **options)
    at = start
    for step, layout in enumerate(through):
        result = convert(at, tmp_path / str(step), layout, max_shard_bytes=20_000)
        assert detect_layout(result.path) == result.layout == layout
        assert (result.path / INDEX_FILE).is_file()
        at = result.path
    convert(at, tmp_path / "end", "vila")
    if options.get("sharded"):
        merged = load_file(start / "llm" / "model-00001-of-00002.safetensors")
        merged |= load_file(start / "llm" / "model-00002-of-00002.safetensors")
        for path in (start / "llm").glob("model-*"):
            path.unlink()
        (start / "llm" / INDEX_FILE).unlink()
        save_file(merged, start / "llm" / "model.safetensors")
    tiny.assert_same_weights(start, tmp_path / "end")
    assert tiny.configs(tmp_path / "end") == tiny.configs(start)


def test_our_model_survives_the_other_layouts(
    tiny: Tiny,
    saved_model: Path,
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    tmp_path: Path,
    pictures: dict[str, Image.Image],
) -> None:
    convert(saved_model, tmp_path / "vila", "vila")
    convert(tmp_path / "vila", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "nvila")
    tiny.assert_same_weights(saved_model, tmp_path / "ours")
    top = json.loads((tmp_path / "vila" / "config.json").read_text(encoding="utf-8"))
    assert (top["mm_hidden_size"], top["hidden_size"]) == (32, 64)
    loaded, its_processor = load_model(tmp_path / "ours")
    inputs = processor(pictures["a"], "<image>what color?")
    again = its_processor(pictures["a"], "<image>what color?")
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**inputs).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_compute_what_they_did_in_the_original(tiny: Tiny, tmp_path: Path, tied: bool) -> None:
    start = tiny.make(tmp_path / "start", tied=tied)
    convert(start, tmp_path / "ours", "nvila")
    model, _ = load_model(tmp_path / "ours")
    alone = AutoModelForCausalLM.from_pretrained(start / "llm").eval()
    ids = torch.arange(8, 20).view(2, 6)
    pixels = torch.randn(2, 3, 16, 16)
    state = {
        name.removeprefix("vision_model."): value
        for name, value in load_file(start / "vision_tower" / "model.safetensors").items()
    }
    tower = SiglipVisionModel(model.config.vision_config).eval()
    tower.load_state_dict({key: state[key.removeprefix("vision_model.")] for key in tower.state_dict()})
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
        ours = model.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(ours, tower(pixels).last_hidden_state)


def test_configuration_says_the_same_in_our_words(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny.make(tmp_path / "start", dtype=torch.bfloat16)
    convert(start, tmp_path / "ours", "nvila")
    model, processor = load_model(tmp_path / "ours")
    config = model.config
    assert config.mm_projector_type == "mlp_downsample"
    assert config.s2_scales == [16, 32, 48]
    assert config.image_aspect_ratio == "dynamic_s2"
    assert config.video_pool_sizes == [[2, 1, 1]]
    assert config.something_of_theirs == tiny.TOP["something_of_theirs"]
    assert config.text_config.use_mrope is False
    assert model.dtype == torch.bfloat16
    tokens = [config.image_token_id, config.video_token_id, config.image_end_token_id]
    assert processor.tokenizer.convert_ids_to_tokens(tokens) == ["<image>", "<vila/video>", "\n"]
    assert (model.generation_config.temperature, *processor.image_processor.image_mean) == (0.7, 0.4, 0.5, 0.6)


def test_missing_media_tokens_get_mean_rows_in_the_original_order(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny.make(tmp_path / "start", media=False)
    rows = len(tiny.words(media=False))
    result = convert(start, tmp_path / "ours", "nvila")
    assert result.added_tokens == ["<vila/sentinel>", "<image>", "<vila/video>"]
    model, processor = load_model(tmp_path / "ours")
    assert processor.tokenizer.convert_tokens_to_ids(result.added_tokens) == [rows, rows + 1, rows + 2]
    assert (model.config.image_token_id, model.config.video_token_id) == (rows + 1, rows + 2)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        matrix = model.state_dict()[name]
        assert matrix.shape[0] == model.config.text_config.vocab_size == rows + 3
        assert torch.equal(matrix[rows:], matrix[:rows].double().mean(0).float().expand(3, -1))


def test_changes_made_in_our_layout_reach_the_original(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny.make(tmp_path / "start", media=False)
    convert(start, tmp_path / "ours", "nvila")
    model, processor = load_model(tmp_path / "ours")
    processor.tokenizer.add_tokens(["<t0>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.max_tiles = 10
    model.config.text_config.rope_parameters["rope_theta"] = 2e6
    model.config.video_pool_sizes = [[1, 1, 1]]
    save_model(model, processor, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "end", "vila")
    rows = len(tiny.words(media=False)) + 4
    end, before = tiny.configs(tmp_path / "end"), tiny.configs(start)
    assert end["config.json"]["max_tiles"] == 10
    assert end["config.json"]["video_encoder"] == {"_target_": "llava.model.encoders.BasicVideoEncoder"}
    assert (end["llm/config.json"]["vocab_size"], end["llm/config.json"]["rope_theta"]) == (rows, 2e6)
    assert load_file(tmp_path / "end" / "llm" / "model.safetensors")["lm_head.weight"].shape == (rows, tiny.HIDDEN)
    assert "<t0>" in (tmp_path / "end" / "llm" / "tokenizer.json").read_text(encoding="utf-8")
    untouched = {"llm_cfg", "s2_scales", "resume_path", "something_of_theirs", "model_dtype"}
    assert {key: end["config.json"][key] for key in untouched} == {key: tiny.TOP[key] for key in untouched}
    assert end["vision_tower/config.json"] == before["vision_tower/config.json"]


@pytest.mark.parametrize(
    ("projector", "top", "kind", "tiling"),
    [
        ("mlp_downsample", {}, "nvila", "dynamic_s2"),
        ("mlp_downsample_3x3_fix", LITE, "nvila_lite", "dynamic"),
        ("mlp_downsample", LITE | {"image_aspect_ratio": "resize"}, "nvila", "resize"),
    ],
)
def test_flat_checkpoint_that_leaves_its_variant_to_code(
    tiny: Tiny, tmp_path: Path, projector: str, top: dict[str, Any], kind: str, tiling: str
) -> None:
    convert(tiny.make(tmp_path / "start", projector=projector, top=top), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == kind
    bare = {key: config[key] for key in ("architectures", "model_type", "text_config", "vision_config")}
    tiny.dump(tmp_path / "hf" / "config.json", bare)
    convert(tmp_path / "hf", tmp_path / "ours", "nvila")
    model, _ = load_model(tmp_path / "ours")
    assert (model.config.mm_projector_type, model.config.image_aspect_ratio) == (projector, tiling)
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    tiny.assert_same_weights(tmp_path / "hf", tmp_path / "again")


def test_flat_names_are_those_that_other_programs_read(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny.make(tmp_path / "start"), tmp_path / "hf", "hf")
    names = {name.removeprefix("./") for name in tiny.weights(tmp_path / "hf")}
    expected = {f"llm.{name}" for name in tiny.llm_shapes(1, tied=False)} | {
        f"vision_tower.{name}" for name in tiny.tower_shapes()
    }
    assert names == expected | {f"mm_projector.{name}" for name in tiny.projector_shapes("", tiny.WIDTH)}
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    vocabulary = tiny.words(media=True).get_vocab()
    assert (config["image_token_id"], config["video_token_id"]) == (vocabulary["<image>"], vocabulary["<vila/video>"])


def test_video_model_with_scales_keeps_them(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny.make(tmp_path / "start", top={"image_aspect_ratio": "resize"})
    convert(start, tmp_path / "ours", "nvila")
    assert load_model(tmp_path / "ours")[0].config.mm_channels == 3 * tiny.WIDTH


def test_what_savers_of_the_past_left_is_tolerated(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny.make(tmp_path / "start" / "model")
    tiny.edit(start / "config.json", auto_map={"AutoModel": "evil.Model"})
    (start / "evil.py").write_text("raise SystemExit", encoding="utf-8")
    (start / "LICENSE").write_text("theirs", encoding="utf-8")
    tiny.change_weights(start / "llm", lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    tiny.change_weights(
        start / "vision_tower", lambda w: {name.removeprefix("vision_model."): value for name, value in w.items()}
    )
    tower = json.loads((start / "vision_tower" / "config.json").read_text(encoding="utf-8"))
    del tower["vision_use_head"]
    tiny.dump(start / "vision_tower" / "config.json", tower)
    notices: list[str] = []

    class Listener:
        def progress(self, *_: object) -> None: ...

        def notice(self, text: str) -> None:
            notices.append(text)

    convert(tmp_path / "start", tmp_path / "ours", "nvila", reporter=Listener())
    load_model(tmp_path / "ours")
    assert "inv_freq" in notices[0]
    assert not list((tmp_path / "ours").rglob("*.py"))
    assert "evil" not in (tmp_path / "ours" / "config.json").read_text(encoding="utf-8")
    assert (tmp_path / "ours" / "LICENSE").read_text(encoding="utf-8") == "theirs"


def test_names_and_shapes_at_the_published_size() -> None:
    """437 tensors of the tower, and the projector's shapes, as in the files of NVILA-8B."""
    shapes = expected_shapes(NVILAConfig.from_preset("nvila-8b"))
    original = {from_ours("vila", name): shape for name, shape in shapes.items()}
    assert sum(name.startswith("vision_tower/vision_model.") for name in original) == 437
    assert original["mm_projector/layers.2.weight"] == (3584, 13824)
    assert original["llm/model.layers.27.self_attn.k_proj.bias"] == (512,)
    assert original["llm/lm_head.weight"] == original["llm/model.embed_tokens.weight"]
    for layout in LAYOUTS:
        assert all(to_ours(layout, from_ours(layout, name)) == name for name in shapes)
