"""`nvila train`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import add_recipe_arguments, recipe_of, whole_number
from nvila_pipelines.cli.output import emit_json
from nvila_pipelines.cli.step import run_recipe
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.recipe import Recipe

SUMMARY = "train the model of a recipe, with the steps it needs before"
_TINY = "-tiny"
_PLAN_WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="the tiny twin of the recipe, which trains on a CPU")
    parser.add_argument("--stage", metavar="NAME", help="train this stage alone, from the finished one before it")
    parser.add_argument("--dry-run", action="store_true", help="show what training takes and costs, train nothing")
    parser.add_argument(
        "--gpu-memory", metavar="AMOUNT", help="with --dry-run: memory of a GPU, such as 80GiB (default: its kind's)"
    )
    group = parser.add_argument_group("where training runs")
    group.add_argument(
        "--launcher", choices=("local", "trainjob"), help="processes here, or a Kubeflow TrainJob (default: local)"
    )
    group.add_argument("--profile", type=Path, metavar="FILE", help="nodes of the job: its task train")
    group.add_argument("--nodes", type=whole_number, metavar="N", help="nodes of the job (default: the profile's)")
    group.add_argument(
        "--gpus", type=whole_number, metavar="N", help="GPUs of each node, one process each (default: the profile's)"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.tiny:
        _choose_twin(args)
    recipe = recipe_of(args)
    if args.gpu_memory is not None and not args.dry_run:
        raise ConfigError("--gpu-memory is for --dry-run, which is not given", "add --dry-run")
    if args.dry_run:
        return _show_plan(recipe, args)
    from nvila_pipelines.training.checks import check_trainable
    from nvila_pipelines.training.nodes import check_nodes
    from nvila_pipelines.training.stages import check_predecessor

    settings = _placed(args, settings)
    check_nodes(recipe, settings)
    check_trainable(recipe)
    if args.stage is not None:
        check_predecessor(recipe, args.stage, settings)
        recipe = recipe.up_to(args.stage)
    return run_recipe("train", recipe, args, settings)


def _placed(args: argparse.Namespace, settings: Settings) -> Settings:
    """Return settings that say where training runs."""
    from nvila_pipelines.graphs.profile import TRAIN, read_profile

    job = settings.train_job
    if args.profile is not None:
        if args.launcher != "trainjob":
            raise ConfigError("--profile says where a job runs, which is not asked for", "add --launcher trainjob")
        profile = read_profile(args.profile)
        own = profile.of(TRAIN).model_copy(update={"launcher": "trainjob"})
        placement = profile.model_copy(update={"tasks": {**profile.tasks, TRAIN: own}}).job()
        job = "" if placement is None else placement.model_dump_json(exclude_defaults=True)
    if args.launcher == "trainjob" and not job:
        raise ConfigError("--launcher trainjob needs nodes", "add --profile FILE, or set NVILA_TRAIN_JOB")
    return replace(
        settings,
        train_job="" if args.launcher == "local" else job,
        train_nodes=args.nodes or settings.train_nodes,
        train_gpus=args.gpus or settings.train_gpus,
    )


def _choose_twin(args: argparse.Namespace) -> None:
    """Put the tiny twin in the place of the recipe that is named."""
    from nvila_pipelines.recipe import recipe_names

    twins = [name.removesuffix(_TINY) for name in recipe_names() if name.endswith(_TINY)]
    names = [word for word in args.words if "=" not in word]
    if len(names) != 1 or names[0].removesuffix(_TINY) not in twins:
        raise ConfigError(
            f"--tiny: {names[0] if names else 'no recipe'} has no tiny twin", f"name one of {', '.join(twins)}"
        )
    base = names[0].removesuffix(_TINY)
    args.words = [base + _TINY if word == names[0] else word for word in args.words]


def _show_plan(recipe: Recipe, args: argparse.Namespace) -> int:
    from nvila_pipelines.training.planned import plan_json, planned

    stages = None if args.stage is None else list(recipe.up_to(args.stage).train.stages)[-1:]
    plan = planned(recipe, memory=args.gpu_memory, stages=stages)
    if args.json:
        emit_json(plan_json(recipe, plan))
        return 0
    from rich.console import Console

    from nvila_pipelines.training.table import render_plan

    console = Console()
    # Columns that are cut tell nothing; a narrow terminal wraps instead.
    render_plan(plan, Console(width=max(console.width, _PLAN_WIDTH)))
    return 0
