"""`nvila pipeline` against an HTTP service that checks requests as the API of Kubeflow Pipelines does."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from nvila_pipelines.cli.app import main
from nvila_pipelines.compile import shipped

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas

TOKEN = "of-this-test"
API = "/apis/v2beta1"


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kubeflow:
    """Pipelines, experiments, runs and schedules in memory."""

    def __init__(self) -> None:
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: list[dict[str, Any]] = []
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: list[dict[str, Any]] = []
        self.rights = {"team-a"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.serve(self)

            do_POST = do_GET  # noqa: N815  # the name that http.server calls

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        try:
            if request.headers.get("authorization", "").removeprefix("Bearer ") != TOKEN:
                raise RefusedError(401, "the token has expired")
            status, answer = 200, self._answer(request, body)
        except RefusedError as e:
            status, answer = e.status, {"code": 7, "message": str(e)}
        data = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> Any:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        for pattern, method, action in self._routes():
            match = re.fullmatch(pattern, parts.path)
            if match and method == request.command:
                return action(match.groupdict(), query, body, request)
        raise RefusedError(404, f"no route {request.command} {parts.path}")

    def _routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        return [
            (f"{API}/healthz", "GET", lambda *_: {"multi_user": False}),
            (f"{API}/pipelines/upload", "POST", self._upload),
            (f"{API}/pipelines/upload_version", "POST", self._upload_version),
            (f"{API}/pipelines", "GET", self._list_pipelines),
            (f"{API}/experiments", "GET", self._list_experiments),
            (f"{API}/experiments", "POST", self._create_experiment),
            (f"{API}/runs", "GET", self._list_runs),
            (f"{API}/runs", "POST", self._create_run),
            (f"{API}/runs/(?P<run>[^/:]+)", "GET", self._get_run),
            (f"{API}/runs/(?P<run>[^/:]+):terminate", "POST", self._terminate),
            (f"{API}/recurringruns", "POST", self._schedule),
            ("/apis/v1alpha1/runs/(?P<run>[^/]+)/nodes/(?P<node>[^/]+)/log", "GET", self._log),
        ]

    def _namespace(self, namespace: str | None, verb: str, resource: str) -> None:
        if namespace not in self.rights:
            raise RefusedError(
                403, f"User 'ada' is not authorized with reason: cannot {verb} {resource} in '{namespace}'"
            )

    def _upload(self, _: Any, query: dict[str, str], body: bytes, request: BaseHTTPRequestHandler) -> Any:
        self._namespace(query.get("namespace"), "create", "pipelines")
        _check_spec(_uploaded(body, request))
        if any(one["display_name"] == query["name"] for one in self.pipelines.values()):
            raise RefusedError(409, f"pipeline {query['name']} exists")
        made = {"pipeline_id": uuid.uuid4().hex, "display_name": query["name"], "namespace": query["namespace"]}
        self.pipelines[made["pipeline_id"]] = made
        return made

    def _upload_version(self, _: Any, query: dict[str, str], body: bytes, request: BaseHTTPRequestHandler) -> Any:
        _check_spec(_uploaded(body, request))
        if query["pipelineid"] not in self.pipelines:
            raise RefusedError(404, f"pipeline {query['pipelineid']} not found")
        made = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": uuid.uuid4().hex,
            "display_name": query["name"],
        }
        self.versions.append(made)
        return made

    def _list_pipelines(self, _: Any, query: dict[str, str], *__: Any) -> Any:
        self._namespace(query.get("namespace"), "list", "pipelines")
        (predicate,) = json.loads(query["filter"])["predicates"]
        wanted = predicate["stringValue"]
        return {"pipelines": [one for one in self.pipelines.values() if one["display_name"] == wanted]}

    def _list_experiments(self, _: Any, query: dict[str, str], *__: Any) -> Any:
        self._namespace(query.get("namespace"), "list", "experiments")
        wanted = json.loads(query["filter"])["predicates"][0]["stringValue"]
        return {"experiments": [one for one in self.experiments.values() if one["display_name"] == wanted]}

    def _create_experiment(self, _: Any, __: Any, body: bytes, ___: Any) -> Any:
        asked = json.loads(body)
        self._namespace(asked.get("namespace"), "create", "experiments")
        made = {"experiment_id": uuid.uuid4().hex, **asked}
        self.experiments[made["experiment_id"]] = made
        return made

    def _create_run(self, _: Any, __: Any, body: bytes, ___: Any) -> Any:
        asked = json.loads(body)
        experiment = self.experiments.get(asked["experiment_id"])
        if experiment is None:
            raise RefusedError(404, "experiment not found")
        _check_run(asked)
        now = datetime.now(UTC) + timedelta(seconds=len(self.runs))
        made = {
            "run_id": uuid.uuid4().hex,
            "state": "RUNNING",
            "created_at": now.isoformat(),
            "run_details": {
                "task_details": [
                    {"task_id": "1", "display_name": "check", "state": "SUCCEEDED", "pod_name": "pod-1"},
                    {"task_id": "2", "display_name": "root", "state": "RUNNING"},
                ]
            },
            **asked,
        }
        self.runs[made["run_id"]] = made
        return made

    def _list_runs(self, _: Any, query: dict[str, str], *__: Any) -> Any:
        self._namespace(query.get("namespace"), "list", "runs")
        assert query["sort_by"] == "created_at desc"
        runs = sorted(self.runs.values(), key=lambda one: str(one["created_at"]), reverse=True)
        return {"runs": runs[: int(query["page_size"])]}

    def _get_run(self, match: dict[str, str], *_: Any) -> Any:
        if match["run"] not in self.runs:
            raise RefusedError(404, f"run {match['run']} not found")
        return self.runs[match["run"]]

    def _terminate(self, match: dict[str, str], *_: Any) -> Any:
        self._get_run(match)["state"] = "CANCELING"
        return {}

    def _log(self, match: dict[str, str], *_: Any) -> Any:
        self._get_run(match)
        return f"log of {match['node']}"

    def _schedule(self, _: Any, __: Any, body: bytes, ___: Any) -> Any:
        asked = json.loads(body)
        _check_run(asked)
        if len(asked["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise RefusedError(400, "cron needs six fields")
        made = {"recurring_run_id": uuid.uuid4().hex, **asked}
        self.schedules.append(made)
        return made


def _uploaded(body: bytes, request: BaseHTTPRequestHandler) -> list[Any]:
    message = BytesParser().parsebytes(
        b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + body
    )
    parts = message.get_payload()
    assert isinstance(parts, list)
    first = parts[0]
    assert not isinstance(first, str)
    content = first.get_payload(decode=True)
    assert isinstance(content, bytes)
    return list(yaml.safe_load_all(content))


def _check_spec(documents: list[Any]) -> Any:
    """Parse as the API server does: into the message that KFP defines."""
    from google.protobuf import json_format  # type: ignore[import-untyped]  # without stubs here
    from kfp.pipeline_spec import pipeline_spec_pb2

    try:
        return json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    except json_format.ParseError as e:
        raise RefusedError(400, f"invalid pipeline spec: {e}") from e


def _check_run(asked: dict[str, Any]) -> None:
    spec = asked["pipeline_spec"]
    parsed = _check_spec([spec.get("pipeline_spec", spec)])
    declared = parsed.root.input_definitions.parameters
    given = asked["runtime_config"].get("parameters", {})
    for name in given:
        if name not in declared:
            raise RefusedError(400, f"parameter {name} is not declared")
    for name, one in declared.items():
        if name not in given and not one.is_optional and not one.HasField("default_value"):
            raise RefusedError(400, f"parameter {name} is required")


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kubeflow]:
    service = Kubeflow()
    monkeypatch.setenv("NVILA_KFP_ENDPOINT", service.url)
    monkeypatch.setenv("NVILA_KFP_TOKEN", TOKEN)
    monkeypatch.setenv("NVILA_KFP_NAMESPACE", "team-a")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield service
    service.server.shutdown()
    service.server.server_close()


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_compile_writes_what_the_ui_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "p.yaml"
    assert main(["pipeline", "compile", "lifecycle", "--out", str(out), "--json"]) == 0
    assert said(capsys) == {"graph": "lifecycle", "file": str(out)}
    assert out.read_text() == shipped("lifecycle").read_text()


def test_compile_writes_custom_resources(tmp_path: Path, crds: CrdSchemas) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("defaults: {node_selector: {pool: cpu}}")
    out = tmp_path / "p.yaml"
    words = ["pipeline", "compile", "train", "--profile", str(profile), "--resource", "--out", str(out)]
    assert main([*words, "--namespace", "team-a"]) == 0
    pipeline, version = yaml.safe_load_all(out.read_text())
    for one in (pipeline, version):
        assert crds.errors(one) == []
        assert one["metadata"]["namespace"] == "team-a"
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "nvila-train"
    assert version["spec"]["pipelineSpec"]["pipelineInfo"]["name"] == "nvila-train"
    assert "exec-train" in version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_upload_makes_a_pipeline_once_and_then_versions(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "upload", "lifecycle", "--version", "one", "--json"]) == 0
    first = said(capsys)
    assert main(["pipeline", "upload", "lifecycle", "--version", "two", "--json"]) == 0
    second = said(capsys)
    assert first["pipeline_id"] == second["pipeline_id"]
    assert [one["display_name"] for one in kubeflow.versions] == ["one", "two"]


def test_a_run_is_submitted_listed_followed_and_stopped(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", "submit", "lifecycle", "recipe=fast", 'overrides=["train.precision=bf16"]', "seed=3"]
    assert main([*words, "--experiment", "nightly", "--name", "mine", "--service-account", "runner", "--json"]) == 0
    run_id = said(capsys)["run_id"]
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["parameters"] == {
        "recipe": "fast",
        "overrides": ["train.precision=bf16"],
        "seed": "3",
    }
    assert run["service_account"] == "runner"
    (experiment,) = kubeflow.experiments.values()
    assert (experiment["display_name"], experiment["namespace"]) == ("nightly", "team-a")
    assert main(["pipeline", "list", "--json"]) == 0
    (listed,) = said(capsys)["runs"]
    assert (listed["run_id"], listed["name"], listed["state"]) == (run_id, "mine", "RUNNING")
    assert main(["pipeline", "logs", run_id]) == 0
    assert capsys.readouterr().out.splitlines() == ["== check: SUCCEEDED", "log of pod-1"]
    assert main(["pipeline", "stop", run_id]) == 0
    assert kubeflow.runs[run_id]["state"] == "CANCELING"


def test_a_schedule_runs_one_at_a_time(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", "schedule", "evaluate-endpoint", "endpoint=http://nvila", "--cron", "0 0 2 * * *"]
    assert main([*words, "--service-account", "runner", "--json"]) == 0
    (schedule,) = kubeflow.schedules
    assert schedule["service_account"] == "runner"
    assert said(capsys)["schedule_id"] == schedule["recurring_run_id"]
    assert int(schedule["max_concurrency"]) == 1
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit", "lifecycles"], "no graph 'lifecycles'"),
        (["submit", "lifecycle", "sed=1"], "no parameter 'sed'"),
        (["submit", "lifecycle", "seed=many"], "seed"),
        (["submit", "lifecycle", "min_accuracy=1.5"], "gate.min_accuracy"),
        (["submit", "lifecycle", "overrides=x"], "overrides"),
        (["submit", "lifecycle", "recipe=fsat"], "unknown recipe 'fsat'"),
        (["submit", "tune"], "'data' is missing"),
        (["submit", "tune", "data=x", "register_as=a b"], "parameter register_as: model name 'a b'"),
        (["submit", "quantize-and-release", "alias=best"], "parameter alias: unknown alias 'best'"),
        (["submit", "quantize-and-release", "policy=tusks: {}"], "parameter policy: "),
        (["schedule", "tune", "data=x"], "no schedule"),
        (["schedule", "tune", "data=x", "--cron", "0 2 * * *"], "six fields"),
        (["upload", "tune", "data=x"], "does not start"),
        (["submit"], "needs a graph"),
        (["logs"], "the id of one run"),
        (["stop", "nonsense"], "not found"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_at_once(
    kubeflow: Kubeflow, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", *words]) == 2
    assert says in capsys.readouterr().err
    assert not kubeflow.runs


def test_an_expired_token_is_named(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVILA_KFP_TOKEN", "old-secret")
    assert main(["pipeline", "list"]) == 2
    error = capsys.readouterr().err
    assert "expired" in error
    assert "NVILA_KFP_TOKEN" in error
    assert "old-secret" not in error


def test_missing_rights_are_named(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "submit", "lifecycle", "--namespace", "team-b"]) == 1
    error = capsys.readouterr().err
    assert "no rights in namespace 'team-b'" in error
    assert "cannot list experiments" in error


def test_a_service_that_is_away_is_worth_another_try(
    closed_endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "list", "--endpoint", f"http://{closed_endpoint}"]) == 75
    problem, fix = capsys.readouterr().err.splitlines()
    assert "cannot be reached" in problem
    assert "NVILA_KFP_ENDPOINT" in fix
    # A wrong schedule is named before anybody is asked.
    words = ["schedule", "tune", "data=x", "--cron", "daily", "--endpoint", f"http://{closed_endpoint}"]
    assert main(["pipeline", *words]) == 2
    assert "'daily' is no schedule" in capsys.readouterr().err


def test_without_an_endpoint_the_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "list"]) == 2
    assert "NVILA_KFP_ENDPOINT" in capsys.readouterr().err
