"""The recipes of NVILA: published settings, the shapes of the presets, twins that keep them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ConfigError
from nvila.presets import preset
from nvila_pipelines.recipe import load_recipe, recipe_names
from nvila_pipelines.recipe_training import batch_advice

REAL = ["nvila-lite-2b", "nvila-lite-8b", "nvila-8b", "nvila-8b-video"]
ALL = ("vision", "projector", "language")


def settings(name: str) -> dict[str, tuple[dict[str, float], int | None, float | None]]:
    stages = load_recipe(name).train.stages
    return {
        stage: ({str(part): rate for part, rate in one.lr.rates().items()}, one.images_per_step, one.max_grad_norm)
        for stage, one in stages.items()
    }


def rates(parts: tuple[str, ...], rate: float) -> dict[str, float]:
    return dict.fromkeys(parts, rate)


@pytest.mark.parametrize("name", ["nvila-lite-2b", "nvila-lite-8b"])
def test_settings_of_the_scripts_of_lite(name: str) -> None:
    assert settings(name) == {
        "align": (rates(("projector",), 1e-3), 2048, None),
        "vision": (rates(("vision", "projector"), 5e-5), 1024, None),
        "language": (rates(("projector", "language"), 5e-5), 1024, None),
        "instruct": (rates(ALL, 2e-5), 2048, None),
    }
    assert load_recipe(name).model.max_length == 4096


def test_settings_of_the_scripts_of_nvila() -> None:
    found = settings("nvila-8b")
    assert found == {
        "align": (rates(("projector",), 1e-3), 512, None),
        "vision": (rates(("vision", "projector"), 2e-5), 1024, 5.0),
        "language": (rates(("projector", "language"), 2e-5), 1024, None),
        "instruct": (rates(ALL, 1.5e-5), 1024, 5.0),
    }
    assert load_recipe("nvila-8b").model.max_length == 8192
    video = load_recipe("nvila-8b-video").train.stages["video"]
    assert settings("nvila-8b-video") == found | {"video": (rates(ALL, 2e-5), 2048, None)}
    assert (video.tiling, video.frames, video.pool_sizes, video.max_length) == ("resize", 256, ((8, 1, 1),), 16384)


@pytest.mark.parametrize("name", REAL)
def test_settings_of_the_paper(name: str) -> None:
    found = settings(f"{name}-paper")
    assert found.pop("video", (rates(ALL, 2e-5), 2048, None)) == (rates(ALL, 2e-5), 2048, None)
    assert found == {
        "align": (rates(("projector",), 1e-3), 2048, None),
        "vision": (rates(("vision", "projector"), 5e-5), 2048, None),
        "language": (rates(("projector", "language"), 5e-5), 2048, None),
        "instruct": (rates(ALL, 2e-5), 2048, None),
    }
    train = load_recipe(f"{name}-paper").train
    assert (train.optimizer, train.weight_decay, train.betas) == ("adamw", 0.0, (0.9, 0.999))
    assert {(one.warmup_ratio, one.schedule, one.epochs) for one in train.stages.values()} == {(0.03, "cosine", 1.0)}


@pytest.mark.parametrize("name", ["nvila-lite-2b", "nvila-lite-8b", "nvila-8b"])
def test_shapes_are_those_of_the_preset(name: str) -> None:
    from nvila.configuration import NVILAConfig
    from nvila.training.planning.sizes import nvila_config

    ours, published = nvila_config(load_recipe(name).model.to_config()), NVILAConfig(**preset(name))
    for field in ("mm_projector_type", "mm_vision_select_layer", "mm_channels", "num_image_tokens", "tiling"):
        assert getattr(ours, field) == getattr(published, field), field
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
        assert getattr(ours.vision_config, field) == getattr(published.vision_config, field), field
    for field in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "rope_parameters", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(ours.text_config, field) == getattr(published.text_config, field), field


@pytest.mark.parametrize("name", REAL)
def test_a_twin_keeps_stages_parts_tiling_and_projector(name: str) -> None:
    real, twin = load_recipe(name), load_recipe(f"{name}-tiny")
    assert list(twin.train.stages) == list(real.train.stages)
    for one, other in zip(twin.train.stages.values(), real.train.stages.values(), strict=True):
        assert (set(one.lr.rates()), one.trains) == (set(other.lr.rates()), other.trains)
        assert (one.schedule, one.warmup_ratio, one.tiling) == (other.schedule, other.warmup_ratio, other.tiling)
        assert one.data is not None
    for field in ("projector", "select_layer", "tiling", "max_tiles", "time_tokens"):
        assert getattr(twin.model, field) == getattr(real.model, field), field
    assert len(twin.model.s2_scales) == len(real.model.s2_scales)
    assert twin.model.base is None


def test_every_real_recipe_has_both_presets_and_a_twin() -> None:
    assert {f"{name}{form}" for name in REAL for form in ("", "-paper", "-tiny")} <= set(recipe_names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages.align.lr.vision=1e-5", r"lr\.vision is 1e-05, but trains leaves vision frozen.*add vision to"),
        ("train.stages.align.lr={projector: null, vision: 1e-5}", r"align\.lr\.vision is 1e-05"),
        ("train.stages.vision.lr.vision=null", r"lr\.vision is missing, but trains names vision"),
        ("train.stages.align.steps=5", r"stages\.align has both steps and epochs.*null for the other"),
        ("train.stages.align.epochs=null", r"stages\.align has neither steps nor epochs"),
        ("train.stages.align.warmup_steps=5", r"warmup_ratio and warmup_steps 5 are both given"),
        ("train.stages.align.images_per_step=2050", r"2050 and cannot be dealt to 8 processes.*2048 or 2056, or"),
        ("train.stages.align.tiling=dynamc", r"did you mean 'dynamic'"),
        ("train.stages.align.max_lenght=5", r"unknown recipe field .*did you mean .*max_length"),
        ("model.from.visoin=x", r"unknown recipe field model\.from\.visoin.*did you mean 'model\.from\.vision'"),
        ("model.s2_scales=[448]", r"s2_scales is given, but tiling is dynamic"),
        ("plan.gpu=h10", r"plan\.gpu is 'h10'.*did you mean 'h100'"),
        ("plan.data.align.answer_tokens=500", r"answer_tokens is 500, over text_tokens 60"),
    ],
)
def test_contradictions_are_refused_in_one_line(override: str, message: str) -> None:
    recipe = "nvila-lite-8b"
    with pytest.raises(ConfigError, match=message) as failed:
        load_recipe(recipe, [override])
    assert "\n" not in str(failed.value)


def test_a_stage_with_another_projector_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stages\.align\.tiling is dynamic_s2, model\.tiling is dynamic: .*channels"):
        load_recipe("nvila-lite-8b", ["train.stages.align.tiling=dynamic_s2"]).train_config()
    with pytest.raises(ConfigError, match=r"tiling is dynamic, model\.tiling is dynamic_s2"):
        load_recipe("nvila-8b", ["train.stages.align.tiling=dynamic"]).train_config()
    with pytest.raises(ConfigError, match="use resize or dynamic in the stage"):
        load_recipe("nvila-lite-8b", ["train.stages.align.tiling=pad"]).train_config()


def test_stages_of_a_built_in_data_set_name_its_data() -> None:
    with pytest.raises(ConfigError, match=r"stages\.align\.data is 'caption'.*did you mean 'captions'"):
        load_recipe("nvila-8b-tiny", ["train.stages.align.data=caption"])
    with pytest.raises(ConfigError, match=r"stages\.align\.data is 'clips'"):
        load_recipe("nvila-8b-tiny", ["train.stages.align.data=clips"])
    assert load_recipe("nvila-8b", ["train.stages.align.data=mine"]).train.stages["align"].data == "mine"


def test_a_stage_sets_what_it_differs_in() -> None:
    overrides = [f"train.stages.align.{word}" for word in ("max_grad_norm=2.5", "weight_decay=0.1", "attention=eager")]
    config = load_recipe("nvila-8b", overrides).train_config()
    align = config.for_stage(config.stages[0])
    assert (align.max_grad_norm, align.weight_decay, align.attention) == (2.5, 0.1, "eager")
    other = config.for_stage(config.stages[2])
    assert (other.max_grad_norm, other.weight_decay, other.attention) == (1.0, 0.0, "sdpa")


def test_epochs_and_ratios_become_steps() -> None:
    stage = load_recipe("nvila-8b").train_config().stages[0]
    resolved = stage.resolved(595_000)
    # 595,000 / 512 = 1162.1; 3% of that, rounded up.
    assert (resolved.steps, resolved.warmup_steps) == (1162, 35)
    assert stage.resolved(3).steps == 1


def test_several_recipes_are_extended_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: nvila-8b\nseed: 1\nmodel: {max_length: 100}\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("seed: 2\nmodel: {from: null}\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("extends: [a.yaml, b.yaml]\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "c.yaml")
    assert (recipe.name, recipe.seed, recipe.model.max_length, recipe.model.base) == ("c", 2, 100, None)


@pytest.mark.parametrize(
    ("batch", "processes", "advice"),
    [
        (8, 4, ""),
        (10, 4, "use 8 or 12, or 5 processes"),
        (3, 8, "use 8, or 3 processes"),
        (7, 2, "use 6 or 8, or 1 process"),
    ],
)
def test_advice_on_batches_names_what_divides(batch: int, processes: int, advice: Any) -> None:
    assert batch_advice(batch, processes) == advice
