"""The table of steps: what a step's key depends on, and that a step reads nothing else of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvila.errors import ConfigError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import step_config, step_key
from nvila_pipelines.steps.table import STEPS, step_spec
from nvila_platform.store import ArtifactRef

Watch = Callable[[Recipe, str], Any]

# One change for every section, and some for fields that only part of a section's readers see.
CHANGES = {
    "name": "name=other",
    "seed": "seed=7",
    "data": "data.validation_images=9",
    "model": "model.max_length=100",
    "curate": "curate.keep_rate=0.25",
    "train.betas": "train.betas=[0.8, 0.9]",
    "train.precision": "train.precision=fp32",
    # How the work is done: unfinished work goes on when it changes.
    "train.num_processes": "train.num_processes=2",
    "train.num_threads": "train.num_threads=2",
    "train.zero_stage": "train.zero_stage=3",
    "train.offload": "train.offload=optimizer",
    "train.gradient_checkpointing": "train.gradient_checkpointing=true",
    "train.checkpoints": "train.checkpoints.every_steps=5",
    "quantize": "quantize.vision=none",
    "evaluate": "evaluate.batch_size=3",
    "gate": "gate.min_accuracy=0.5",
    "register": "register.alias=champion",
    "serve": "serve.questions=5",
    "plan": "plan.gpus=2",
}
CHANGES_KEY_OF = {
    "name": set[str](),
    "seed": {"curate", "train"},
    "data": {"data"},
    "model": {"train"},
    "curate": {"curate"},
    "train.betas": {"curate", "train"},
    "train.precision": {"train"},
    "train.num_processes": set[str](),
    "train.num_threads": set[str](),
    "train.zero_stage": set[str](),
    "train.offload": set[str](),
    "train.gradient_checkpointing": set[str](),
    "train.checkpoints": set[str](),
    "quantize": {"quantize"},
    "evaluate": {"evaluate-wide", "evaluate-quantized"},
    "gate": {"gate"},
    "register": {"register"},
    "serve": {"serve"},
    "plan": set[str](),
}


def ref(step: str, digest: str = "d") -> ArtifactRef:
    return ArtifactRef(step=step, key="0" * 64, digest=digest * 64, uri="file:///nowhere")


def keys(recipe: Recipe) -> dict[str, str]:
    return {
        name: step_key(spec, recipe, {key: ref(source) for key, source in spec.inputs.items()})
        for name, spec in STEPS.items()
    }


def test_the_table_of_changes_covers_every_section(micro: Recipe) -> None:
    assert {name.partition(".")[0] for name in CHANGES} == set(micro.to_dict())


@pytest.mark.parametrize("section", CHANGES)
def test_a_section_changes_the_keys_of_exactly_the_steps_that_name_it(
    section: str, micro: Recipe, change: Callable[..., Recipe]
) -> None:
    before, after = keys(micro), keys(change(CHANGES[section]))
    assert {name for name in STEPS if before[name] != after[name]} == CHANGES_KEY_OF[section]


@pytest.mark.parametrize("step", [name for name, spec in STEPS.items() if spec.inputs])
def test_every_input_is_in_the_key(step: str, micro: Recipe) -> None:
    spec = STEPS[step]
    inputs = {key: ref(source) for key, source in spec.inputs.items()}
    before = step_key(spec, micro, inputs)
    for name, source in spec.inputs.items():
        assert step_key(spec, micro, inputs | {name: ref(source, "e")}) != before


def test_two_uses_of_one_function_have_keys_of_their_own(micro: Recipe) -> None:
    same = {"data": ref("data"), "model": ref("train")}
    assert step_key(STEPS["evaluate-wide"], micro, same) != step_key(STEPS["evaluate-quantized"], micro, same)


@pytest.mark.parametrize(
    ("overrides", "expected"), [((), {"register"}), (("gate.max_live_drop=0.1",), {"register", "gate"})]
)
def test_the_run_is_in_the_key_of_a_step_that_every_run_does_again_and_of_no_other(
    change: Callable[..., Recipe], overrides: tuple[str, ...], expected: set[str]
) -> None:
    recipe = change(*overrides)
    changed = {
        name
        for name, spec in STEPS.items()
        if step_key(spec, recipe, {key: ref(source) for key, source in spec.inputs.items()}, "run-1")
        != step_key(spec, recipe, {key: ref(source) for key, source in spec.inputs.items()}, "run-2")
    }
    assert changed == expected


def test_the_code_version_is_in_the_key(micro: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(micro)
    monkeypatch.setattr("nvila_pipelines.steps.runner.code_version", lambda: "9.9+changed")
    after = keys(micro)
    assert all(before[name] != after[name] for name in STEPS)


def test_inputs_come_from_earlier_rows() -> None:
    seen: set[str] = set()
    for name, spec in STEPS.items():
        assert set(spec.inputs.values()) <= seen, name
        seen.add(name)


def test_sections_exist_in_every_recipe(micro: Recipe) -> None:
    for spec in STEPS.values():
        assert set(step_config(spec, micro)) == {*spec.sections, *spec.options}


@pytest.mark.parametrize("step", STEPS)
def test_every_row_has_a_function(step: str) -> None:
    assert callable(step_spec(step).load())


def test_unknown_step_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown step 'trian'") as failed:
        step_spec("trian")
    assert failed.value.hint == "did you mean 'train'?"


def test_the_watch_sees_what_is_not_in_a_row(micro: Recipe, watched: Watch) -> None:
    view = watched(micro, "curate")
    assert view.curate is not None
    assert micro.curate is not None
    assert view.curate.keep_rate == micro.curate.keep_rate
    assert view.train.betas == micro.train.betas
    assert view.scorer_config("small") == micro.scorer_config("small")
    for read in (lambda: view.model, lambda: view.train.precision, lambda: view.train.stages, view.train_config):
        with pytest.raises(AssertionError, match="not in its row"):
            read()
    assert watched(micro, "register").register.alias == "candidate"
    with pytest.raises(AssertionError, match="reads register"):
        _ = watched(micro, "quantize").register


def test_the_watch_lets_a_whole_section_through(micro: Recipe, watched: Watch) -> None:
    assert watched(micro, "train").train_config() == micro.train_config()
    assert watched(micro, "quantize").quantization_config() == micro.quantization_config()
