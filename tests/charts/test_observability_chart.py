"""charts/nvila-observability: rules by promtool, dashboards by what Grafana and Prometheus need of them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm

    Render = Callable[..., list[Document]]
    Promtool = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-observability"
RUNBOOKS = ROOT / "docs" / "runbooks"
DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))
HERE = Path(__file__).parent
OPERATOR = ("--api-versions", "monitoring.coreos.com/v1")
# Panels show these; a unit that Grafana does not know is shown as text behind every number.
UNITS = {"short", "s", "bytes", "reqps", "percentunit", "h", "kwatth", "currencyUSD"}
# Metrics of others: Prometheus itself, prometheus-client, kube-state-metrics, prometheus-flask-exporter of MLflow.
FOREIGN = {
    "up",
    "process_resident_memory_bytes",
    "kube_pod_status_phase",
    "kube_pod_container_status_restarts_total",
    "kube_pod_container_status_terminated_reason",
    "kube_pod_completion_time",
    "kube_pod_start_time",
    "kube_pod_owner",
    "kube_horizontalpodautoscaler_status_current_replicas",
    "kube_horizontalpodautoscaler_status_desired_replicas",
    "kube_horizontalpodautoscaler_spec_max_replicas",
    "mlflow_http_request_total",
    "mlflow_http_request_duration_seconds_bucket",
}
each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def promtool() -> Promtool:
    """Prometheus' own checker."""
    beside = ROOT / ".tools" / "bin" / "promtool"
    binary = str(beside) if beside.is_file() else shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not here: python scripts/prometheus.py")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [binary, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


def rules_of(documents: list[Document]) -> dict[str, Any]:
    (found,) = (document["spec"] for document in documents if document["kind"] == "PrometheusRule")
    return dict(found)


@pytest.fixture
def rules(render: Render) -> dict[str, Any]:
    return rules_of(render(CHART, extra=OPERATOR))


def alerts_of(rules: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] not in {"row", "text"}]


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def queries() -> Iterator[tuple[str, str]]:
    """Yield where and what every panel asks, with Grafana's variables filled in."""
    for path in DASHBOARDS:
        for panel in panels(read(path)):
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "5m").replace("$price", "2.5")
                yield f"{path.stem}: {panel['title']}", re.sub(r"\$(\w+)", "x", expr)


# ----------------------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize("row", ["defaults", "rules-only", "several-namespaces"])
def test_rules_are_ones_of_prometheus(render: Render, promtool: Promtool, tmp_path: Path, row: str) -> None:
    matrix = yaml.safe_load((HERE / "observability_matrix.yaml").read_text(encoding="utf-8"))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules_of(render(CHART, matrix[row], extra=OPERATOR))))
    done = promtool("check", "rules", "--lint-fatal", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_not_beside(promtool: Promtool, rules: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    cases = yaml.safe_load((HERE / "alert_tests.yaml").read_text(encoding="utf-8"))
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], **cases}))
    done = promtool("test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"] for test in cases["tests"] for case in test.get("alert_rule_test", []) if case["exp_alerts"]
    }
    assert tested == {alert["alert"] for alert in alerts_of(rules)}


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(rules: dict[str, Any]) -> None:
    names = {alert["alert"] for alert in alerts_of(rules)}
    assert {path.stem for path in RUNBOOKS.glob("Nvila*.md")} == names
    index = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    for alert in alerts_of(rules):
        assert alert["annotations"]["runbook_url"].endswith(f"/docs/runbooks/{alert['alert']}.md")
        assert f"({alert['alert']}.md)" in index
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}
        assert alert["for"]


def test_values_reach_the_rules(render: Render) -> None:
    matrix = yaml.safe_load((HERE / "observability_matrix.yaml").read_text(encoding="utf-8"))
    rules = rules_of(render(CHART, matrix["rules-only"], extra=OPERATOR))
    alerts = {alert["alert"]: alert for alert in alerts_of(rules)}
    assert alerts["NvilaFirstTokenSlow"]["expr"].endswith("> 0.5")
    assert alerts["NvilaErrorsHigh"]["expr"].endswith("> 0.01")
    assert alerts["NvilaTrackingFails"]["expr"].endswith("> 0.01")
    assert alerts["NvilaQueueLong"]["expr"].endswith("> 2")
    assert alerts["NvilaTrainingWaitsForData"]["expr"].endswith("> 0.1")
    assert alerts["NvilaTrainingStepsSkipped"]["expr"].endswith("> 0")
    assert all(alert["labels"]["team"] == "vision" for alert in alerts.values())
    link = alerts["NvilaQueueLong"]["annotations"]["runbook_url"]
    assert link == "https://wiki.example.com/runbooks/NvilaQueueLong.md"
    everywhere = rules_of(render(CHART, matrix["several-namespaces"], extra=OPERATOR))
    assert 'namespace=~"nvila|kubeflow"' in alerts_of(everywhere)[0]["expr"]


# ----------------------------------------------------------------------------------------------------------------------
# Dashboards


def test_there_is_a_dashboard_of_each_kind_and_a_config_map_of_each(render: Render) -> None:
    assert [path.stem for path in DASHBOARDS] == ["data", "pipeline", "serving", "training"]
    maps = [document for document in render(CHART, extra=OPERATOR) if document["kind"] == "ConfigMap"]
    assert [document["metadata"]["labels"]["grafana_dashboard"] for document in maps] == ["1"] * 4
    shown = {name: json.loads(text) for document in maps for name, text in document["data"].items()}
    assert shown == {f"nvila-{path.stem}.json": read(path) for path in DASHBOARDS}
    assert len({dashboard["uid"] for dashboard in shown.values()}) == 4


@each_dashboard
def test_panels_are_complete_and_do_not_overlap(path: Path) -> None:
    dashboard = read(path)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(references) == len(set(references))


@each_dashboard
def test_variables_are_those_that_queries_use(path: Path) -> None:
    dashboard = read(path)
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps([panels(dashboard), [variable["query"] for variable in dashboard["templating"]["list"]]])
    used = set(re.findall(r"\$\{?(\w+)\}?", text)) - {"__rate_interval"}
    assert used == known


def test_every_query_is_one_of_prometheus(promtool: Promtool, tmp_path: Path) -> None:
    asked = list(queries())
    assert len(asked) >= 60
    rules = [{"record": f"q:{index}:x", "expr": expr} for index, (_, expr) in enumerate(asked)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", tmp_path / "queries.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "queries", "rules": [{"record": "q", "expr": "sum(up"}]}]})
    )
    assert promtool("check", "rules", tmp_path / "queries.yml").returncode != 0


def names_in(expr: str) -> set[str]:
    """Return the metrics that an expression names."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", " ", expr)
    bare = re.sub(r"\b(by|on|without|group_left|group_right)\s*\([^)]*\)", " ", bare)
    functions = {"sum", "max", "avg", "rate", "increase", "histogram_quantile", "and", "or", "on", "by", "count", "min"}
    return {name for name in re.findall(r"(?<![\w.])[a-z][\w:]*", bare) if name not in functions}


def test_metrics_of_the_server_are_those_that_it_offers(rules: dict[str, Any]) -> None:
    from prometheus_client import CollectorRegistry

    from nvila.inference.engine import EngineStats
    from nvila_platform.drift.reference import build_reference
    from nvila_platform.drift.watch import DriftWatch
    from nvila_platform.serving.drift import register_drift
    from nvila_platform.serving.engine_metrics import EngineCollector
    from nvila_platform.serving.identity import ModelIdentity
    from nvila_platform.serving.metrics import ServingMetrics

    registry = CollectorRegistry()
    metrics = ServingMetrics(ModelIdentity(name="eyes", version="1", digest="sha256:0"), registry)
    metrics.rejected("overloaded")
    stats = EngineStats(**dict.fromkeys((field.name for field in fields(EngineStats)), 0))
    registry.register(EngineCollector("eyes", lambda: stats))
    watch = DriftWatch(build_reference([{"images": [1.0]}], "one"), share=1, least=1)
    watch.add({"images": [1.0]})
    register_drift("eyes", watch, registry)
    offered = {sample.name for family in registry.collect() for sample in family.samples}
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    expressions = [expr for _, expr in queries()]
    expressions += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked = {name for expr in expressions for name in names_in(expr)}
    training = {name for name in asked if name.startswith(("nvila_train_", "nvila_curation_"))}
    assert asked - training - FOREIGN - recorded <= offered, asked - training - FOREIGN - recorded - offered
    # And the other way round: nothing that the server offers goes unseen; gen_ai_* are the same under other names.
    offered = {name for name in offered if not name.startswith("gen_ai_")}
    seen = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in offered if "_created" not in name} <= seen


def test_metrics_of_training_are_those_that_it_offers(rules: dict[str, Any]) -> None:
    if importlib.util.find_spec("nvila_platform.training") is None:
        pytest.skip("this checkout has no metrics of training")
    scrape = importlib.import_module("nvila_platform.training.scrape")
    source = Path(scrape.__file__ or "").read_text(encoding="utf-8")
    expressions = [expr for _, expr in queries()]
    expressions += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for name in {name for expr in expressions for name in names_in(expr) if name.startswith("nvila_train_")}:
        bare = name.removeprefix("nvila_train_").removesuffix("_total")
        assert f'"{bare}"' in source or f"nvila_train_{bare}" in source, name


def test_metrics_of_curation_are_those_that_it_offers() -> None:
    from nvila_platform.training.curation import CurationCollector

    counts = {"vqa": Counter({"kept": 1})}
    offered = {family.name for family in CurationCollector(lambda: counts).collect()}
    asked = {name for _, expr in queries() for name in names_in(expr) if name.startswith("nvila_curation_")}
    assert asked == offered


def test_what_each_dashboard_is_for_has_a_panel() -> None:
    titles = {path.stem: {panel["title"] for panel in panels(read(path))} for path in DASHBOARDS}
    assert {"Keep rate", "Quarantine", "Records by state", "Drift"} <= titles["data"]
    assert {"Runs", "Runs with a failed task", "Duration by run"} <= titles["pipeline"]
    assert "Replicas" in titles["serving"]
    # Every panel has an answer of its own kind: none only says in words where to look instead.
    assert not [panel for path in DASHBOARDS for panel in read(path)["panels"] if panel["type"] == "text"]


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"monitor": {}}, "additional properties 'monitor' not allowed"),
        ({"rules": {"thresholds": {"errorRate": 1}}}, "at '/rules/thresholds': additional properties 'errorRate'"),
        ({"rules": {"thresholds": {"errorRatio": 5}}}, "at '/rules/thresholds/errorRatio': maximum: got 5, want 1"),
        ({"monitors": {"interval": "30"}}, "at '/monitors/interval'"),
        ({"rules": {"runbooks": "docs"}}, "at '/rules/runbooks'"),
        ({"namespaces": "nvila"}, "at '/namespaces': got string, want array"),
        ({"fullnameOverride": "e" * 46}, "has 46 characters, at most 45 fit"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, values: dict[str, Any], said: str) -> None:
    done = helm.template(CHART, values, extra=OPERATOR)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("part", ["monitors", "rules"])
def test_a_part_without_the_operator_is_refused_with_the_way_out(helm: Helm, part: str) -> None:
    other = {"monitors": "rules", "rules": "monitors"}[part]
    done = helm.template(CHART, {other: {"enabled": False}})
    assert f"{part}.enabled needs the API monitoring.coreos.com/v1, which this cluster does not have" in done.stderr
    assert helm.template(CHART, {other: {"enabled": False}, part: {"enabled": False}}).returncode == 0


def test_monitors_find_the_pods_of_the_other_charts(render: Render) -> None:
    monitors = {
        d["metadata"]["name"].rpartition("-")[2]: d["spec"]
        for d in render(CHART, extra=OPERATOR)
        if "Monitor" in d["kind"]
    }
    assert monitors.keys() == {"serving", "training", "mlflow"}
    serving = render(ROOT / "charts" / "nvila-serving")
    runtime = next(d for d in serving if d["kind"] == "ServingRuntime")
    service = next(d for d in serving if d["kind"] == "InferenceService")
    (endpoint,) = monitors["serving"]["podMetricsEndpoints"]
    assert endpoint["portNumber"] == runtime["spec"]["containers"][0]["ports"][0]["containerPort"]
    wanted = dict(monitors["serving"]["selector"]["matchLabels"])
    # KServe's own label; the others come from the InferenceService.
    assert wanted.pop("component") == "predictor"
    assert wanted.items() <= service["metadata"]["labels"].items()
    mlflow = next(
        d
        for d in render(ROOT / "charts" / "nvila-platform")
        if d["kind"] == "Service" and "mlflow" in d["metadata"]["name"]
    )
    assert monitors["mlflow"]["selector"]["matchLabels"].items() <= mlflow["metadata"]["labels"].items()
    assert monitors["mlflow"]["endpoints"][0]["port"] == mlflow["spec"]["ports"][0]["name"]


def relabelled(spec: Document, meta: dict[str, str]) -> dict[str, str] | None:
    """Return the labels of a target as Prometheus makes them, or None when it is dropped."""
    labels = dict(meta)
    for rule in spec["podMetricsEndpoints"][0]["relabelings"]:
        value = ";".join(labels.get(name, "") for name in rule["sourceLabels"])
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        if rule.get("action", "replace") == "keep":
            if match is None:
                return None
        elif match is not None:
            text = re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1"))
            labels[rule["targetLabel"]] = match.expand(text)
    return {name: value for name, value in labels.items() if not name.startswith("__meta_")}


META = "__meta_kubernetes_pod_"
JOBSET, INDEX = f"{META}label_jobset_sigs_k8s_io_jobset_name", f"{META}label_batch_kubernetes_io_job_completion_index"
RUN = f"{META}label_pipeline_runid"


@pytest.mark.parametrize(
    ("meta", "target"),
    [
        (
            {f"{META}container_name": "node", f"{META}ip": "10.0.0.7", JOBSET: "nvila-train-1", INDEX: "0"},
            {"__address__": "10.0.0.7:9464", "trainjob": "nvila-train-1"},
        ),
        # Of several nodes only the first one listens: asking the others would raise alarms of targets that are down.
        ({f"{META}container_name": "node", f"{META}ip": "10.0.0.8", JOBSET: "nvila-train-1", INDEX: "1"}, None),
        ({f"{META}container_name": "node", f"{META}ip": "10.0.0.9", JOBSET: "nvila-train-1", INDEX: "10"}, None),
        (
            {f"{META}container_name": "main", f"{META}ip": "10.0.0.7", RUN: "0a1b"},
            {"__address__": "10.0.0.7:9464", "trainjob": "0a1b"},
        ),
        ({f"{META}container_name": "wait", f"{META}ip": "10.0.0.7", RUN: "0a1b"}, None),
        (
            {f"{META}container_name": "main", f"{META}ip": "fd00::7", RUN: "0a1b"},
            {"__address__": "[fd00::7]:9464", "trainjob": "0a1b"},
        ),
    ],
    ids=["first-node", "second-node", "eleventh-node", "task", "beside-the-task", "ipv6"],
)
def test_training_is_asked_once_and_where_it_listens(
    render: Render, meta: dict[str, str], target: dict[str, str] | None
) -> None:
    spec = next(
        d["spec"]
        for d in render(CHART, extra=OPERATOR)
        if d["metadata"]["name"].endswith("-training") and "Monitor" in d["kind"]
    )
    # A pod that trains declares no such port, and `port` or `portNumber` would find none.
    assert not {"port", "portNumber", "targetPort"} & spec["podMetricsEndpoints"][0].keys()
    assert relabelled(spec, meta) == target


def test_the_monitor_of_training_finds_what_the_code_and_the_platform_chart_make(render: Render) -> None:
    from nvila_platform.cluster.placement import METRICS_ADDRESS, WATCHED

    spec = next(
        d["spec"]
        for d in render(CHART, extra=OPERATOR)
        if d["metadata"]["name"].endswith("-training") and "Monitor" in d["kind"]
    )
    assert spec["selector"] == {"matchLabels": WATCHED}
    meta = {f"{META}container_name": "main", f"{META}ip": "0.0.0.0"}
    asked = relabelled(spec, meta)
    settings = next(
        d for d in render(ROOT / "charts" / "nvila-platform") if d["metadata"]["name"].endswith("-settings")
    )
    assert asked == {"__address__": METRICS_ADDRESS}
    assert settings["data"]["NVILA_METRICS_ADDRESS"] == METRICS_ADDRESS


def test_notes_give_the_next_three_commands(helm: Helm) -> None:
    done = helm.run(
        "install", "demo", CHART, "--namespace", "models", "--dry-run=client", "--set", "monitors.enabled=false",
        "--set", "rules.enabled=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    assert [line.split()[0] for line in notes.splitlines() if line.startswith("     ")] == ["kubectl"] * 3
