"""Staged training in processes of its own, through the launcher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nvila_pipelines.steps.context import StepContext
from nvila_platform.artifacts import write_atomically
from nvila_platform.settings import PLACEMENT_VARIABLES
from nvila_platform.training.backup import restore
from nvila_platform.training.backup_store import open_backups
from nvila_platform.training.history import HISTORY_FILE, read_history

if TYPE_CHECKING:
    from nvila.training.config import BaseModels

_SPEED = "tokens_per_second"


def run(context: StepContext) -> dict[str, float]:
    """Train all stages and leave the final model in `model/`.

    Outputs: `<number>-<stage>/` for every stage, `model/`, `metrics.jsonl`.
    """
    from nvila_pipelines.training.nodes import check_nodes, open_launcher

    # Before anything is fetched: a batch that cannot be dealt out fails in seconds.
    processes = check_nodes(context.recipe, context.settings)
    config, out = context.recipe.train_config(), context.out_dir
    backups = open_backups(context.settings, out.name)
    if backups is not None:
        restore(backups, out, context.reporter.notice)
    spec = out / ".train.json"
    spec.write_text(
        json.dumps(
            {
                "config": config.to_dict(),
                "data": str(context.inputs["data"]),
                "selection": str(context.inputs["selection"]),
                "out": str(out),
                "events": str(context.events_path),
            }
        ),
        encoding="utf-8",
    )
    section = context.recipe.train
    env = {name: value for name, value in context.settings.to_env().items() if name not in PLACEMENT_VARIABLES}
    if context.tracking_run is not None:
        # With NVILA_TRACK_TRAINING=direct the first process of training has a run of its own, below the pipeline's.
        env.setdefault("MLFLOW_RUN_ID", context.tracking_run)
    if section.num_threads is not None:
        env["OMP_NUM_THREADS"] = str(section.num_threads)
    run_id = context.events_path.parent.name
    open_launcher(context.settings, out.name, context.reporter.notice, run_id).run(
        "nvila_pipelines.steps.train_process",
        [str(spec)],
        num_processes=processes,
        env=env,
        log_path=context.log_path,
    )
    last = f"{len(config.stages)}-{config.stages[-1].name}"
    shutil.copytree(out / last, out / "model", dirs_exist_ok=True)
    carry_licences(config.model.base, out / "model")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The speed stays out of the files: equal weights must give an equal digest.
    speeds = [line.pop(_SPEED) for line in lines if _SPEED in line]
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    losses = {f"loss_{stage.name}": _last_loss(lines, stage.name) for stage in config.stages}
    history = read_history(out / HISTORY_FILE)
    used = {f"{name}_{stage}": value for stage, one in history.items() for name, value in one.usage.items()}
    return losses | ({_SPEED: float(speeds[-1])} if speeds else {}) | used


def carry_licences(base: BaseModels | None, model: Path) -> None:
    """Say beside the weights which pretrained parts they were made of, and under which licences."""
    from nvila.base_models import local_bases
    from nvila.checkpoints.documents import write_base_documents

    if base is not None:
        local = local_bases(base)
        parts = {
            "vision": (base.vision, Path(local.vision)),
            "language": (base.language, Path(local.language)),
        }
        write_base_documents(parts, model)


def _last_loss(lines: list[dict[str, float | str]], stage: str) -> float:
    return float(next(line["loss_smooth"] for line in reversed(lines) if line["stage"] == stage))
