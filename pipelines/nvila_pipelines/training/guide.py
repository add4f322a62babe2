"""The memory guide of the documentation: which settings fit which model on which GPUs, from the planner's numbers."""

from __future__ import annotations

from dataclasses import replace

from nvila.training.planning.devices import GIB, gpu_named
from nvila.training.planning.memory import MemoryPlan, fitting
from nvila.training.planning.plan import Hardware, plan_training
from nvila_pipelines.recipe import load_recipe
from nvila_pipelines.training.planned import assumed_sample

# Recipe, and the stage that takes most: every part learns.
_MODELS = (
    ("nvila-lite-2b", "instruct"),
    ("nvila-lite-8b", "instruct"),
    ("nvila-8b", "instruct"),
    ("nvila-8b-video", "video"),
)
_COUNTS = (1, 8, 64)
_MEMORIES_GIB = (24, 40, 48, 80, 141)


def memory_guide() -> str:
    """Return one table for every model: settings by number of GPUs and their memory, for one sample on each."""
    out = []
    for name, stage_name in _MODELS:
        out.append(f"### {name}, stage {stage_name}\n")
        heads = " | ".join(f"{memory} GiB" for memory in _MEMORIES_GIB)
        out.append(f"| GPUs | {heads} |\n|---|{'---|' * len(_MEMORIES_GIB)}")
        for count in _COUNTS:
            plans = _plans(name, stage_name, count)
            cells = [_cell(plans, memory * GIB) for memory in _MEMORIES_GIB]
            out.append(f"| {count} | {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def _plans(name: str, stage_name: str, gpus: int) -> tuple[MemoryPlan, ...]:
    recipe = load_recipe(name)
    config = recipe.train_config()
    stage = next(one for one in config.stages if one.name == stage_name)
    config = replace(config, stages=(replace(stage, images_per_step=gpus),))
    hardware = Hardware(gpu=gpu_named("h100"), gpus=gpus)
    (plan,) = plan_training(config, {stage_name: assumed_sample(recipe, stage_name)}, hardware)
    return plan.memory


def _cell(plans: tuple[MemoryPlan, ...], memory: int) -> str:
    best = fitting([replace(plan, available=memory) for plan in plans])
    if best is None:
        return "-"
    words = [f"ZeRO {best.zero_stage}"]
    words += ["checkpointing"] if best.checkpointing else []
    words += ["offload"] if best.offload != "none" else []
    return f"{', '.join(words)}: {best.total / GIB:.0f}"
