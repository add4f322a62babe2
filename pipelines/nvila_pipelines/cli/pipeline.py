"""`nvila pipeline`: pipelines on Kubeflow."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_pipelines.compile import GRAPHS
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvila_pipelines.kubeflow_api import KubeflowApi

SUMMARY = "run pipelines here; compile, upload, start, schedule, list and stop them on Kubeflow"
ACTIONS = ("run", "compile", "upload", "submit", "schedule", "list", "logs", "stop")
EPILOG = f"""\
graphs: {", ".join(GRAPHS)}

examples:
  nvila pipeline run evaluate-endpoint endpoint=models:/nvila@champion    on this machine, as Kubeflow would
  nvila pipeline compile lifecycle --out lifecycle.yaml          the file that "Upload pipeline" of the UI takes
  nvila pipeline compile train --profile cluster.yaml --resource  custom resources for GitOps
  nvila pipeline upload lifecycle --profile cluster.yaml
  nvila pipeline submit lifecycle recipe=fast seed=1 --experiment nightly
  nvila pipeline schedule evaluate-endpoint endpoint=http://nvila --cron "0 0 2 * * *"
  nvila pipeline list
  nvila pipeline logs RUN
  nvila pipeline stop RUN

environment: NVILA_KFP_ENDPOINT, NVILA_KFP_TOKEN, NVILA_KFP_NAMESPACE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = (
        "%(prog)s {run,compile,upload,submit,schedule} GRAPH [PARAMETER=VALUE ...] [options]\n"
        "       %(prog)s list | logs RUN | stop RUN [options]"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument(WORDS, nargs="*", metavar="GRAPH PARAMETER=VALUE", help="graph or run, and parameters of a run")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where tasks run: resources, GPUs, secrets ...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of compile: the file (default: GRAPH.yaml)")
    parser.add_argument("--resource", action="store_true", help="of compile: write custom resources of the pipeline")
    parser.add_argument("--endpoint", metavar="URL", help="API of Kubeflow Pipelines (default: NVILA_KFP_ENDPOINT)")
    parser.add_argument("--namespace", metavar="NAME", help="namespace of runs (default: NVILA_KFP_NAMESPACE)")
    parser.add_argument("--experiment", default="nvila", metavar="NAME", help="experiment of runs (default: nvila)")
    parser.add_argument("--name", metavar="NAME", help="of the run, schedule or pipeline (default: from the graph)")
    parser.add_argument("--version", metavar="NAME", help="of upload: name of the version (default: version and time)")
    parser.add_argument("--service-account", metavar="NAME", help="of submit and schedule: account of the tasks")
    parser.add_argument("--cron", metavar="CRON", help='of schedule: six fields, seconds first: "0 0 2 * * *"')
    parser.add_argument("--limit", type=whole_number, default=20, metavar="N", help="of list: runs (default: 20)")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    settings = replace(
        settings,
        kfp_endpoint=(args.endpoint or settings.kfp_endpoint).rstrip("/"),
        kfp_namespace=args.namespace or settings.kfp_namespace,
    )
    if args.action in ("list", "logs", "stop"):
        return _about_runs(args, settings)
    graph, words = _graph(args)
    if args.action == "run":
        return _run_here(graph, words, args, settings)
    with tempfile.TemporaryDirectory() as scratch:
        package = _package(graph, args, Path(scratch))
        if args.action == "compile":
            return _compile(graph, package, args, settings)
        return _send(graph, package, words, args, settings)


def _graph(args: argparse.Namespace) -> tuple[str, list[str]]:
    if not args.words or "=" in args.words[0]:
        raise ConfigError(f"{args.action} needs a graph", f"name one of {', '.join(GRAPHS)}")
    graph, *words = args.words
    if words and args.action in ("compile", "upload"):
        raise ConfigError(f"{words[0]} is a parameter of a run, which {args.action} does not start", "leave it out")
    if args.action == "schedule" and not args.cron:
        raise ConfigError("no schedule is given", 'add --cron "0 0 2 * * *"')
    if args.action == "schedule":
        from nvila_pipelines.kubeflow_api import check_cron

        args.cron = check_cron(args.cron)
    return graph, words


def _package(graph: str, args: argparse.Namespace, scratch: Path) -> Path:
    """Return the compiled graph: the shipped one, or one placed as the profile says."""
    from nvila_pipelines.compile import compile_graph, shipped

    if args.profile is None:
        return shipped(graph)
    from nvila_pipelines.graphs.profile import read_profile

    return compile_graph(graph, scratch / f"{graph}.yaml", read_profile(args.profile))


def _compile(graph: str, package: Path, args: argparse.Namespace, settings: Settings) -> int:
    import yaml

    from nvila_pipelines.kubeflow_api import version_resource
    from nvila_platform.artifacts import storage_errors

    out = args.out or Path(f"{graph}.yaml")
    text = package.read_text(encoding="utf-8")
    if args.resource:
        version = args.version or _version(text)
        resources = version_resource(package, args.name or f"nvila-{graph}", version, settings.kfp_namespace)
        text = yaml.safe_dump_all(resources, sort_keys=False)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    if args.json:
        emit_json({"graph": graph, "file": str(out.absolute())})
    else:
        emit(f"{graph}: {out.absolute()}")
    return 0


def _run_here(graph: str, words: list[str], args: argparse.Namespace, settings: Settings) -> int:
    from nvila_pipelines.compile import shipped
    from nvila_pipelines.kubeflow_api import arguments_of
    from nvila_pipelines.local_graph import TASKS_FOLDER, run_graph
    from nvila_platform.telemetry import ProgressView

    if args.profile is not None:
        raise ConfigError("--profile places tasks in a cluster, and run is on this machine", "leave it out")
    arguments = arguments_of(shipped(graph), words)
    with ProgressView(format=settings.log_format) as view:
        done = run_graph(graph, arguments, settings, view)
    tasks = done.directory / TASKS_FOLDER
    if args.json:
        emit_json({"graph": graph, "run_id": done.run_id, "tasks": str(tasks)})
        return 0
    for report in sorted(tasks.glob("*/report")):
        text = report.read_text(encoding="utf-8")
        emit(f"{report.parent.name}: {report}" if text.startswith("<") else f"{report.parent.name}\n\n{text}")
    return 0


def _send(graph: str, package: Path, words: list[str], args: argparse.Namespace, settings: Settings) -> int:
    from nvila_pipelines.kubeflow_api import KubeflowApi, arguments_of

    said: dict[str, str]
    name = args.name or f"nvila-{graph}"
    if args.action == "upload":
        api = KubeflowApi(settings, args.experiment)
        stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
        version = args.version or f"{_version(package.read_text(encoding='utf-8'))}-{stamp}"
        pipeline, made = api.upload(package, name, version)
        said = {"pipeline_id": pipeline, "version_id": made, "name": name, "version": version}
    else:
        arguments = arguments_of(package, words)
        if graph in ("lifecycle", "train"):
            _check_recipe(arguments)
        else:
            _check_release(arguments)
        api = KubeflowApi(settings, args.experiment)
        if args.action == "schedule":
            made = api.schedule(package, name, args.cron, arguments, service_account=args.service_account)
            said = {"schedule_id": made, "name": name}
        else:
            run_id = api.submit(package, name, arguments, service_account=args.service_account)
            said = {"run_id": run_id, "name": name, "link": api.link(run_id)}
    if args.json:
        emit_json(said)
    else:
        for key, value in said.items():
            emit(f"{key}: {value}")
    return 0


def _check_recipe(arguments: dict[str, object]) -> None:
    """Find a wrong recipe here rather than on the cluster.

    A recipe that is a file there and not here is left to the first task.
    """
    from nvila_pipelines.recipe import load_recipe, recipe_names

    recipe = arguments.get("recipe", "quickstart")
    overrides = [str(word) for word in _list(arguments.get("overrides"))]
    fields = {"seed": "seed", "min_accuracy": "gate.min_accuracy", "register_as": "register.name"}
    overrides += [f"{field}={arguments[name]}" for name, field in fields.items() if arguments.get(name)]
    if "recipe" in arguments or overrides:
        if str(recipe) in recipe_names():
            load_recipe(str(recipe), overrides)
        elif "/" not in str(recipe) and not str(recipe).lstrip().startswith("{"):
            load_recipe(str(recipe))


def _check_release(arguments: dict[str, object]) -> None:
    """Find a wrong name, alias or policy here rather than on the cluster, after a model was made.

    Raises:
        ConfigError: One is wrong; the message begins with the parameter.
    """
    from nvila.evaluation.policy import parse_policy
    from nvila_platform.registration import check_name
    from nvila_platform.registry import check_alias

    checks: dict[str, Callable[[str], object]] = {
        "register_as": check_name,
        "alias": check_alias,
        "policy": lambda text: parse_policy(text, "policy"),
    }
    for name, check in checks.items():
        if name in arguments:
            try:
                check(str(arguments[name]))
            except ConfigError as e:
                raise ConfigError(f"parameter {name}: {e.message}", e.hint) from e


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def _version(text: str) -> str:
    """Return a name that changes with the content: the package's version and a digest."""
    import hashlib

    from nvila import __version__

    return f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _about_runs(args: argparse.Namespace, settings: Settings) -> int:
    from nvila_pipelines.kubeflow_api import KubeflowApi

    wanted = 0 if args.action == "list" else 1
    if len(args.words) != wanted:
        raise ConfigError(
            f"{args.action} takes {'no name' if not wanted else 'the id of one run'}", "see nvila pipeline --help"
        )
    api = KubeflowApi(settings, args.experiment)
    if args.action == "list":
        return _list_runs(api, args)
    if args.action == "stop":
        api.stop(args.words[0])
        said = {"run_id": args.words[0], "state": "CANCELING"}
        emit_json(said) if args.json else emit(f"stopping {args.words[0]}; training saves a checkpoint first")
        return 0
    lines = []
    for line in api.logs(args.words[0]):
        lines.append(line)
        if not args.json:
            emit(line)
    if args.json:
        emit_json({"run_id": args.words[0], "lines": lines})
    return 0


def _list_runs(api: KubeflowApi, args: argparse.Namespace) -> int:
    runs = api.runs(args.limit)
    if args.json:
        emit_json({"runs": [asdict(one) for one in runs]})
        return 0
    for one in runs:
        emit(f"{one.run_id}  {one.state:<10}  {one.created_at:<25}  {one.name}  {one.error}".rstrip())
    return 0
