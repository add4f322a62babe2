"""A verb of the `nvila` command as the work of a Kubeflow task."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvila.errors import ConfigError, NvilaError
from nvila_pipelines.report.kubeflow import markdown_table, numbers_of
from nvila_pipelines.steps.component import OutputArtifact, run_task, write_metrics, write_text
from nvila_pipelines.steps.pipeline_job import PipelineJob
from nvila_pipelines.steps.verb_tracking import below_pipeline
from nvila_platform.settings import Settings


def run_verb(
    verb: str,
    words: Sequence[str],
    job: PipelineJob,
    metrics: OutputArtifact,
    report: OutputArtifact,
    result: OutputArtifact,
    *,
    refusal: bool = False,
) -> dict[str, Any]:
    """Run a verb and write what it says to the task's artifacts.

    Args:
        verb: Name of the verb.
        words: Its arguments.
        job: The pipeline's run, whose run in MLflow gets one of this task.
        metrics: Gets the numbers.
        report: Gets them as a table.
        result: Gets all that the verb says with --json.
        refusal: Whether exit code 1 with an answer is an answer, as of a gate.

    Returns:
        What the verb says.

    Raises:
        SystemExit: The verb failed; its typed error was left for the parent process.
    """

    def work(settings: Settings) -> dict[str, Any]:
        with below_pipeline(settings, job, verb) as tell:
            answer = _said(verb, [*words, "--json"], settings, refusal)
            tell(words, answer)
        return answer

    said = run_task(verb, "", work)
    numbers = numbers_of(said)
    write_metrics(metrics, numbers)
    rows = [[name, f"{value:.6g}"] for name, value in numbers.items()]
    title = str(said.get("model") or said.get("file") or verb)
    write_text(report, f"## {title}\n\n{markdown_table(['what', 'value'], rows)}\n")
    write_text(result, json.dumps(said))
    result.metadata.update({name: said[name] for name in ("digest", "key", "model", "path") if said.get(name)})
    return said


def run_gate_verb(
    model: str,
    policy: str,
    options: Sequence[str],
    job: PipelineJob,
    metrics: OutputArtifact,
    report: OutputArtifact,
    result: OutputArtifact,
) -> bool:
    """Run the gate with a policy that is text; returns whether the model passed."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "policy.yaml"
        file.write_text(policy, encoding="utf-8")
        words = [model, "--policy", str(file), *options]
        said = run_verb("gate", words, job, metrics, report, result, refusal=True)
    checks = [
        [one["name"], str(one["value"]), str(one["limit"]), "passed" if one["passed"] else "**refused**"]
        for one in said["checks"]
    ]
    write_text(report, f"## {said['reason']}\n\n{markdown_table(['check', 'value', 'limit', 'verdict'], checks)}\n")
    return bool(said["passed"])


def run_deploy_verb(
    model: str,
    name: str,
    policy: str,
    options: Sequence[str],
    job: PipelineJob,
    metrics: OutputArtifact,
    report: OutputArtifact,
    result: OutputArtifact,
) -> bool:
    """Roll a model out with a policy that is text; returns whether it serves.

    Where the text limits nothing of a rollout, as of one that a gate alone needs, all traffic moves at once.
    """
    from nvila.evaluation.policy import parse_policy

    with TemporaryDirectory() as folder:
        words = [model, "--name", name, *options]
        if policy.strip() and parse_policy(policy, "policy").live is not None:
            file = Path(folder) / "policy.yaml"
            file.write_text(policy, encoding="utf-8")
            words += ["--policy", str(file)]
        said = run_verb("deploy", words, job, metrics, report, result, refusal=True)
    steps = said["verdicts"]
    rows = [
        [
            f"{step['percent']} %",
            one["name"],
            str(one["value"]),
            str(one["limit"]),
            "passed" if one["passed"] else "**no**",
        ]
        for step in steps
        for one in step["checks"]
    ]
    last = steps[-1]["checks"] if steps else []
    write_metrics(metrics, {one["name"]: one["value"] for one in last if one["value"] is not None})
    title = f"## {said['model']} {said['state']} on {said['endpoint']}"
    why = f"\n\n{said['reason']}" if said["reason"] else ""
    table = f"\n\n{markdown_table(['share', 'check', 'value', 'limit', 'verdict'], rows)}" if rows else ""
    write_text(report, f"{title}{why}{table}\n")
    return bool(said["state"] != "rolled back")


def move_alias(model: str, alias: str) -> str:
    """Move an alias to the version that an address means now; returns the address by number."""
    from nvila_platform.registry import resolve, set_alias

    def work(settings: Settings) -> str:
        version = resolve(settings, model)
        set_alias(settings, version.name, alias, version.version)
        return version.model_uri

    return run_task("promote", "", work)


def _said(verb: str, words: Sequence[str], settings: Settings, refusal: bool) -> dict[str, Any]:
    from nvila_pipelines.cli.app import build_parser

    output = io.StringIO()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = build_parser().parse_args([verb, *words])
    except SystemExit as e:
        lines = complaint.getvalue().strip().splitlines() or [f"nvila {verb} does not take {' '.join(words)}"]
        raise ConfigError(lines[0].removeprefix("error: "), f"see nvila {verb} --help") from e
    with contextlib.redirect_stdout(output):
        code = importlib.import_module(f"nvila_pipelines.cli.{verb}").run(args, settings)
    lines = output.getvalue().strip().splitlines()
    sys.stderr.write(f"{output.getvalue()}\n")
    if code != 0 and not (refusal and code == 1 and lines):
        raise NvilaError(f"nvila {verb} ended with {code}", "see the log of the task")
    found: dict[str, Any] = json.loads(lines[-1])
    return found
