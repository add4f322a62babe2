"""From a recipe to the plan of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nvila.training.planning.devices import gpu_named, parse_memory
from nvila.training.planning.plan import AssumedSample, Hardware, StagePlan, plan_dict, plan_training
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.recipe_schema import AssumedData


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """The plan of a recipe's training, and what it was made for."""

    recipe: str
    precision: str
    optimizer: str
    hardware: Hardware
    currency: str
    stages: tuple[StagePlan, ...]


def planned(recipe: Recipe, *, memory: str | None = None, stages: Sequence[str] | None = None) -> TrainingPlan:
    """Plan the training of a recipe.

    Args:
        recipe: The recipe.
        memory: Memory of a GPU instead of what its kind has, such as 80GiB.
        stages: Stages to plan; None for all.

    Raises:
        ConfigError: The amount cannot be read, the GPUs do not divide a batch, or a sample does not fit.
    """
    section, config = recipe.plan, recipe.train_config()
    hardware = Hardware(
        gpu=gpu_named(section.gpu),
        gpus=section.gpus,
        memory=None if memory is None else parse_memory(memory),
        mfu=section.mfu,
        price_per_gpu_hour=section.price_per_gpu_hour,
    )
    if stages is not None:
        config = replace(config, stages=tuple(stage for stage in config.stages if stage.name in stages))
    assumed = {stage.name: assumed_sample(recipe, stage.name) for stage in config.stages}
    return TrainingPlan(
        recipe=recipe.name,
        precision=config.precision.name,
        optimizer=config.optimizer,
        hardware=hardware,
        currency=section.currency,
        stages=plan_training(config, assumed, hardware),
    )


def plan_json(recipe: Recipe, plan: TrainingPlan) -> dict[str, Any]:
    """Return the JSON form: what was assumed, and the plan of every stage."""
    known = [stage for stage in plan.stages if stage.gpu_hours is not None]
    return {
        "recipe": plan.recipe,
        "precision": plan.precision,
        "optimizer": plan.optimizer,
        "gpu": plan.hardware.gpu.name,
        "gpus": plan.hardware.gpus,
        "gpu_memory": plan.hardware.bytes,
        "mfu": plan.hardware.mfu,
        "assumed": recipe.plan.model_dump(mode="json")["data"],
        "stages": [plan_dict(stage) for stage in plan.stages],
        "gpu_hours": sum(stage.gpu_hours or 0 for stage in known) if len(known) == len(plan.stages) else None,
        "currency": plan.currency,
    }


def assumed_sample(recipe: Recipe, stage: str) -> AssumedSample:
    """Return what the recipe takes a sample of a stage to be."""
    data = recipe.plan.data.get(stage, AssumedData())
    return AssumedSample(
        samples=data.samples,
        images=((data.image_width, data.image_height),) * data.images,
        videos=data.videos,
        text_tokens=data.text_tokens,
        answer_tokens=data.answer_tokens,
    )
