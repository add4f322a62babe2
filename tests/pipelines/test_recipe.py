"""Recipes: files, extension, overrides, and what is said about mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from nvila.errors import ConfigError
from nvila.training.config import TrainConfig
from nvila_pipelines.recipe import Recipe, load_recipe, recipe_names

HEAVY = {"torch", "transformers", "numpy", "mlflow", "kfp"}


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_loads_and_makes_its_configurations(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    config = recipe.train_config()
    names = [stage.name for stage in config.stages]
    assert [name for name in names if name not in ("base", "video")] == ["align", "vision", "language", "instruct"]
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert recipe.quantization_config().group_size == recipe.quantize.group_size
    if recipe.curate is None:
        with pytest.raises(ConfigError, match=f"recipe {name} has no scorers"):
            recipe.scorer_config("small")
        return
    for scorer in ("small", "large"):
        assert recipe.scorer_config(scorer).backend == "torch"
        assert recipe.scorer_config(scorer).precision.name == "fp32"


def test_scorers_are_known_by_size() -> None:
    with pytest.raises(ConfigError, match=r"unknown scorer 'smal' \(did you mean 'small'"):
        load_recipe().scorer_config("smal")


def test_train_config_takes_over_what_the_recipe_says() -> None:
    recipe = load_recipe("quickstart", ["seed=7", "train.precision=bf16", "train.stages.instruct.lr={language: null}"])
    config = recipe.train_config()
    assert (config.seed, config.precision.name) == (7, "bf16")
    assert config.precision.fp8.min_features == recipe.train.fp8.min_features == 16
    assert set(config.stages[-1].lr) == {"vision", "projector"}
    assert config.model.vision["hidden_size"] == recipe.model.vision.hidden_size
    assert config.betas == recipe.train.betas


def test_a_stage_may_count_tokens_and_read_any_data() -> None:
    changes = "{images_per_step: null, batch_tokens: 4096, micro_batch_tokens: 1024, pack: true, data: a*2 + s3://b/c}"
    stage = (
        load_recipe("quickstart", [f"train.stages.align={changes}", "train.num_processes=2"]).train_config().stages[1]
    )
    assert (stage.images_per_step, stage.batch_tokens, stage.micro_batch_tokens, stage.pack) == (0, 4096, 1024, True)
    assert stage.data == "a*2 + s3://b/c"


def test_projector_names_are_those_of_the_model_layer() -> None:
    from nvila.vision.projectors import PROJECTORS
    from nvila_pipelines.recipe_schema import Projector

    assert set(get_args(Projector)) == set(PROJECTORS)


def test_reading_recipes_needs_no_heavy_package() -> None:
    program = "import sys; from nvila_pipelines.recipe import load_recipe; load_recipe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())


def test_json_and_yaml_forms_come_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("fast", ["train.stages.align.lr.projector=1e-5"])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    # Also what a caller gets that dumps the model itself uses the names of the file.
    assert "register" in recipe.model_dump(mode="json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"seed": 1}'])
def test_what_is_no_recipe_in_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.from_json(text)


def test_recipe_is_frozen() -> None:
    recipe = load_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


# ----------------------------------------------------------------------------------------------------------------------
# Extension


def test_fast_differs_from_quickstart_only_in_what_it_names() -> None:
    text = yaml.safe_load(
        (Path(sys.modules[Recipe.__module__].__file__ or "").parent / "recipes/fast.yaml").read_text()
    )
    quickstart, fast = load_recipe("quickstart").to_dict(), load_recipe("fast").to_dict()

    def leaves(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    before, after, named = leaves(quickstart), leaves(fast), leaves(text)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= set(named)
    assert set(named) - {"extends"} <= set(after)


def test_own_file_extends_a_built_in_recipe_and_is_named_after_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "extends: quickstart\nseed: 5\n"))
    assert (recipe.name, recipe.seed) == ("mine", 5)
    assert recipe.train == load_recipe("quickstart").train


def test_own_file_extends_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "extends: fast\nseed: 5\n", "base.yaml")
    recipe = load_recipe(str(write(tmp_path, "extends: base.yaml\ntrain: {zero_stage: 2}\n")))
    assert (recipe.seed, recipe.train.zero_stage) == (5, 2)


def test_null_takes_a_stage_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "extends: quickstart\ntrain: {stages: {vision: null}}\n"))
    assert list(recipe.train.stages) == ["base", "align", "language", "instruct"]
    assert load_recipe("quickstart", ["train.stages.vision=null"]).train == recipe.train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml\n", r"in a circle: mine.yaml -> mine.yaml"),
        ("extends: [1]\n", r"extends is \[1\]"),
        ("extends: quikstart\n", "unknown recipe 'quikstart'.*did you mean 'quickstart'"),
        ("seed: 1\nseed: 2\n", r"mine.yaml line 2: the key 'seed' stands twice"),
        ("train:\n  stages:\n    a: 1\n    a: 2\n", "line 4: the key 'a' stands twice"),
        ("seed: [1\n", "mine.yaml"),
        ("- 1\n", "a recipe is a mapping of fields, this is a list"),
        ("", "this is empty"),
        ("seed: 1\n", r"mine.yaml: recipe field data is missing \(and \d+ more\)"),
        ("extends: quickstart\ntrain: 3\n", r"recipe field train is 3 \(expected a section with the fields precision,"),
        ("extends: quickstart\n1: 2\n", "mine.yaml"),
        ("extends: quickstart\nname: !!python/name:os.system\n", "could not determine a constructor"),
        ("extends: quickstart\nname: 2024-13-45\n", "mine.yaml"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", r"unknown recipe 'quikstart' \(did you mean 'quickstart'\?\)"),
        ("nothing-alike", r"known: fast, nvila-8b, .*quickstart"),
        ("absent.yaml", "recipe file absent.yaml does not exist"),
        ("/", "recipe file / is a folder"),
        ("", "unknown recipe ''"),
    ],
)
def test_unknown_recipe_is_named_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(name)


# ----------------------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("5e-4", 0.0005),
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        (".5e-1", 0.05),
        ("2.5e-3", 0.0025),
        ("0.5", 0.5),
        ("1", 1.0),
    ],
)
def test_numbers_are_read_as_people_write_them(word: str, value: float) -> None:
    recipe = load_recipe("quickstart", [f"train.stages.align.lr.projector={word}"])
    assert recipe.train.stages["align"].lr.projector == pytest.approx(value)


def test_overrides_apply_in_order_and_reach_lists_and_sections() -> None:
    recipe = load_recipe(
        "quickstart",
        ["seed=1", "seed=2", "train.betas=[0.8, 0.9]", "train.stages.align={steps: 60, warmup_steps: 0}"],
    )
    assert (recipe.seed, recipe.train.betas) == (2, (0.8, 0.9))
    before = load_recipe("quickstart").train.stages["align"]
    after = recipe.train.stages["align"]
    assert (after.steps, after.warmup_steps, after.images_per_step) == (60, 0, before.images_per_step)


def test_later_override_wins_over_the_file(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "extends: quickstart\nseed: 5\n"), ["seed=6"]).seed == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"'seed' is no override \(write key=value"),
        ("=1", "is no override"),
        ("seed=", "override seed has no value"),
        ("seed=[", "override seed: "),
        ("sed=1", r"unknown recipe field sed \(did you mean 'seed'\?\)"),
        ("train.stages.algn.steps=1", r"field train.stages.algn \(did you mean 'train.stages.align'\?\)"),
        ("train.stages.align.lr.projectr=1", r"did you mean 'train.stages.align.lr.projector'\?"),
        ("registr.name=a", "did you mean 'register'"),
        ("register={nam: a}", r"unknown recipe field register.nam \(did you mean 'register.name'\?\)"),
        ("train.stages.align={stepz: 1}", "did you mean 'train.stages.align.steps'"),
        ("seed.x=1", r"unknown recipe field seed.x: seed is a value, not a section"),
        (
            "train.stages=3",
            r"train.stages=3 would replace a whole section \(set one of its fields: train.stages.base",
        ),
        ("model=null", "recipe field model is missing"),
        ("seed=x", r"recipe field seed is 'x' \(expected a valid integer\)"),
        ("seed=1.5", "recipe field seed is 1.5"),
        ("seed=true", "recipe field seed is True"),
        ("seed=-1", "recipe field seed is -1.*greater than or equal to 0"),
        ("name=a b", r"recipe field name is 'a b' \(use letters"),
        ("train.precision=fp9", r"is 'fp9' \(did you mean 'fp8'\? allowed: fp32, bf16, fp8\)"),
        ("quantize.vision=off", r"is False \(allowed: none, w8a8, w4a16, int8, fp8\)"),
        ("data.dataset=7", r"is 7 \(allowed: easy-vqa\)"),
        ("train.betas=3", r"is 3 \(expected a list\)"),
        ("train.betas=[1, 2, 3]", r"expected a list of 2"),
        ("train.betas=[0.9, x]", r"recipe field train.betas.1 is 'x'"),
        ("train.betas=[0.9, 1.0]", r"recipe field train.betas.1 is 1.0"),
        ("train.max_grad_norm=.inf", "recipe field train.max_grad_norm is inf.*finite"),
        ("train.stages.align.lr.projector=-1e-3", "greater than 0"),
        ("curate.keep_rate=1.5", "less than or equal to 1"),
        ("train.stages={A B: {steps: 1}}", "recipe field train.stages.A B is 'A B'"),
        ("train.stages={base: null, align: null, vision: null, language: null, instruct: null}", "at least one entry"),
        ("name=" + "x" * 200, r"is 'x{56}\.\.\."),
    ],
)
def test_mistakes_in_an_override_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.hidden_size=63", "model.vision.hidden_size is 63, no multiple of num_attention_heads"),
        ("model.vision.patch_size=7", "model.vision.image_size is 64, no multiple of patch_size 7"),
        ("model.language.num_attention_heads=3", "model.language.hidden_size is 128, no multiple"),
        ("model.language={num_attention_heads: 4, num_key_value_heads: 3}", "no multiple of num_key_value_heads 3"),
        ("model.select_layer=9", "model.select_layer is 9, none of the . hidden states"),
        ("model.select_layer=-9", "model.select_layer is -9"),
        ("model.max_length=100000", "model.max_length is 100000, over language.max_position_embeddings"),
        ("train.stages.align.warmup_steps=100000", "align.warmup_steps is 100000, which leaves none"),
        ("train.stages.align.lr.projector=null", "train.stages.align.lr names no part"),
        ("train={backend: torch, num_processes: 2}", "train.backend is torch, one process, but num_processes is 2"),
        ("train.num_processes=1009", "images_per_step is .* cannot be dealt to 1009 processes"),
        ("train.stages.align.batch_tokens=4096", "has both images_per_step and batch_tokens"),
        ("train.stages.align.images_per_step=null", "has neither images_per_step nor batch_tokens"),
        ("train.stages.align.pack=true", "align.pack needs batch_tokens"),
        ("train.stages.align.micro_batch_tokens=9", "align.micro_batch_tokens needs batch_tokens"),
        ("train.stages.align.data=caption", "align.data is 'caption'.*did you mean 'captions'.*; with batch_tokens"),
        (
            "train.stages.align={images_per_step: null, batch_tokens: 9, micro_batch_tokens: 10}",
            "align.micro_batch_tokens is 10, more than batch_tokens 9",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart", [override])
