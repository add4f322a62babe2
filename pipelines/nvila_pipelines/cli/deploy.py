"""`nvila deploy`: a registered model becomes an endpoint on a cluster."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError, GateError
from nvila_pipelines.cli.failures import report
from nvila_pipelines.cli.options import whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.deployment.request import DeployRequest
    from nvila_pipelines.deployment.run import Deployed

SUMMARY = "roll a registered model out to a KServe endpoint, step by step, or take it back"
EPILOG = """\
Without --policy all traffic moves to the new pods once they are ready. With one, they get it in steps, and the section
`live` of the policy decides after each whether to go on or to roll back:

  live: {max_error_rate: 0.02, ttft_p95_ms: 1500, max_ttft_ratio: 1.2, min_requests: 50}

KEY=VALUE and --values are values of charts/nvila-serving: image.tag=0.2.0, autoscaling.class=keda, resources ...

examples:
  nvila deploy models:/nvila@candidate --dry-run
  nvila deploy nvila@candidate --policy policy.yaml --prometheus http://localhost:9090 --steps 10,50,100 --interval 300
  nvila deploy nvila/7 --name eyes --values production.yaml autoscaling.maxReplicas=8
  nvila deploy nvila@candidate --mode knative autoscaling.minReplicas=0

The same command goes on where it stopped. When the model serves, the alias champion moves to it; the one before is
`previous`, which nvila rollback brings back. Exit code 1: the model was taken back.

environment: KUBECONFIG, NVILA_PROMETHEUS_URL, NVILA_PROMETHEUS_TOKEN
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL [KEY=VALUE ...] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(WORDS, nargs="*", metavar="MODEL KEY=VALUE", help="models:/NAME@ALIAS, then values to change")
    parser.add_argument("--name", default="", metavar="NAME", help="of the endpoint (default: the model's)")
    parser.add_argument("--namespace", default="", metavar="NAME", help="where (default: the kubeconfig's context's)")
    parser.add_argument("--values", type=Path, metavar="FILE", help="values of the pods, as the chart takes them")
    parser.add_argument(
        "--mode", choices=("standard", "knative"), default="standard", help="of KServe; knative can scale to zero"
    )
    parser.add_argument("--policy", type=Path, metavar="FILE", help="decides about every step by its section `live`")
    parser.add_argument("--prometheus", default="", metavar="URL", help="metrics to decide by")
    parser.add_argument("--steps", default="", metavar="N,N", help="shares of the traffic (default: 10,50,100)")
    parser.add_argument("--interval", type=whole_number, default=120, metavar="S", help="a step's time (default: 120)")
    parser.add_argument(
        "--timeout", type=whole_number, default=900, metavar="S", help="wait for pods and for requests (default: 900)"
    )
    parser.add_argument("--alias", default="champion", metavar="NAME", help="what it becomes (default: champion)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifests and change nothing")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.deployment.run import deploy
    from nvila_platform.rollout.rollout import UNDONE

    request = _request(args, settings)
    if args.dry_run:
        return _dry_run(request, settings, as_json=args.json)
    done = deploy(request, settings, notice)
    show(done, as_json=args.json)
    if done.outcome.state == UNDONE:
        # Reported, not raised: for machines the outcome stays the last line of standard output.
        error = GateError(f"{done.outcome.revision.model} was rolled back: {done.outcome.reason}", _hint(done))
        report(error)
        return error.exit_code
    return 0


def notice(text: str) -> None:
    """Write a line about the work to standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(done: Deployed, *, as_json: bool) -> None:
    """Write how it ended."""
    if as_json:
        emit_json(done.to_dict())
        return
    revision = done.outcome.revision
    emit(f"{done.endpoint}: {revision.name} ({revision.model}) {done.outcome.state}")
    if done.url:
        emit(f"url: {done.url}")
    if done.file is not None:
        emit(f"verdict: {done.file}")


def _request(args: argparse.Namespace, settings: Settings) -> DeployRequest:
    from nvila_pipelines.deployment.request import DeployRequest, steps_of
    from nvila_pipelines.evaluation.gate import read_policy
    from nvila_platform.registry import ALIASES

    models = [word for word in args.words if "=" not in word]
    if len(models) != 1:
        raise ConfigError(f"{len(models)} models are named, deploy needs one", "nvila deploy models:/NAME@ALIAS")
    if args.alias not in ALIASES:
        raise ConfigError(f"--alias {args.alias} is unknown", f"use one of {', '.join(ALIASES)}")
    request = DeployRequest(
        model=models[0],
        endpoint=args.name,
        namespace=args.namespace,
        values=args.values,
        overrides=tuple(word for word in args.words if "=" in word),
        mode="Knative" if args.mode == "knative" else "Standard",
        prometheus=(args.prometheus or settings.prometheus_url).rstrip("/"),
        steps=steps_of(args.steps) if args.steps else (),
        interval_s=float(args.interval),
        timeout_s=float(args.timeout),
        alias=args.alias,
    )
    return replace(request, policy=read_policy(args.policy)) if args.policy is not None else request


def _dry_run(request: DeployRequest, settings: Settings, *, as_json: bool) -> int:
    import yaml

    from nvila_pipelines.deployment.run import render

    made = render(request, settings, request.namespace or "default")
    for warning in made.warnings:
        notice(f"warning: {warning}")
    manifests = [made.runtime, made.service]
    if as_json:
        emit_json({"manifests": manifests, "revision": made.revision.name, "warnings": list(made.warnings)})
    else:
        emit(yaml.safe_dump_all(manifests, sort_keys=False).rstrip())
    return 0


def _hint(done: Deployed) -> str:
    return f"see {done.file}" if done.file is not None else f"see nvila status {done.endpoint}"
