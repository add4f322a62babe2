"""`nvila gate`: may this model be deployed?"""

from __future__ import annotations

import argparse
from pathlib import Path

from nvila.errors import ConfigError, GateError
from nvila_pipelines.cli.evaluation_options import add_evaluation_arguments, request_of
from nvila_pipelines.cli.failures import report
from nvila_pipelines.cli.options import prepare_workspace
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.settings import Settings

SUMMARY = "apply a policy to a model; exit code 1 when it may not be deployed"
EPILOG = """\
A policy is YAML: limits of scores, of losses against the live model on the same samples, of time and size.

  against: models:/nvila@champion
  min_samples: 200
  max_drop: 0.01
  tasks:
    easy_vqa: {min_score: 0.9, categories: {open_shape: {min_score: 0.8}}}
  latency: {p95_ms: 800}
  size: {max_mib: 300}

examples:
  nvila gate models:/nvila@candidate --policy policy.yaml
  nvila gate MODEL --policy policy.yaml --against models:/nvila/3
  nvila gate http://nvila.example.org --policy policy.yaml        what is deployed, as its clients see it

outputs in DIR: MODEL/DATE_verdict.json beside the results; a registered version gets the tags nvila.gate.state and
nvila.gate.reason
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL --policy FILE [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(WORDS, nargs="*", metavar="MODEL", help="model folder, models:/NAME@ALIAS, or endpoint")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="the policy; its tasks are evaluated")
    parser.add_argument("--against", metavar="MODEL", help="live model to compare with, instead of the policy's")
    add_evaluation_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.evaluation.gate import policy_request, read_policy, run_gate, verdict_lines
    from nvila_platform.telemetry import ProgressView

    if len(args.words) != 1:
        raise ConfigError(f"{len(args.words)} models are named, a gate needs one", "nvila gate MODEL --policy FILE")
    if args.policy is None:
        raise ConfigError("no policy is named", "add --policy FILE; nvila gate --help shows one")
    if args.tasks:
        raise ConfigError("--tasks names tasks, but the policy does", "leave --tasks out")
    policy = read_policy(args.policy)
    prepare_workspace(settings)
    with ProgressView(format=settings.log_format) as view:
        outcome = run_gate(
            args.words[0],
            policy,
            lambda model: policy_request(request_of(model, args, settings), policy, args.policy.absolute().parent),
            settings,
            view,
            against=args.against,
        )
    if args.json:
        emit_json(outcome.verdict.to_dict() | {"against": outcome.live, "file": str(outcome.file)})
    else:
        for line in verdict_lines(outcome.verdict):
            emit(line)
        emit(f"verdict: {outcome.file}")
    if not outcome.verdict.passed:
        # Reported, not raised: for machines the verdict stays the last line of standard output.
        error = GateError(f"the gate refused the model: {outcome.verdict.reason}", f"see {outcome.file}")
        report(error)
        return error.exit_code
    return 0
