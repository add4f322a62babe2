"""Counts what is proved of the charts without a cluster, by proving it again.

Every row of the matrices of tests/charts and every profile is rendered by the real helm, and every object is validated:
Kubernetes' own against the schemas of each version that the charts admit, those of others against their definitions.
The policies are the tests of tests/charts that hold for every row; the answers to the dashboards' queries come of the
slow test that runs a server and a Prometheus (skipped by --quick).

python benchmarks/platform/charts.py
python benchmarks/platform/charts.py --quick     # no dashboards
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "charts"
CRDS = ROOT.parent / "shared" / "crds"
# Of the tests for every row, those that are policies; all of a name are counted, whichever file they are in.
POLICIES = (
    "test_pods_are_locked_down",
    "test_containers_are_locked_down",
    "test_containers_have_requests_limits_and_probes",
    "test_server_is_probed_on_its_own_port",
    "test_images_do_not_move",
    "test_no_secret_is_written_down",
    "test_rights_are_small_and_stay_in_a_namespace",
    "test_resources_are_labelled_and_named_within_the_limits",
    "test_every_resource_is_labelled_and_named_within_the_limits",
    "test_selectors_find_exactly_the_pods_of_their_part",
    "test_selectors_find_the_pods_that_kserve_makes",
)
FILES = ("test_every_chart.py", "test_serving_chart.py")
DASHBOARDS = "test_dashboards_answer.py"


@dataclass
class Count:
    """What was rendered and validated."""

    combinations: int = 0
    objects: int = 0
    validations: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Count what is proved of the charts without a cluster.")
    parser.add_argument("--quick", action="store_true", help="without the dashboards' queries")
    args = parser.parse_args()
    count = validate()
    print(f"{count.combinations} combinations of values, {count.objects} objects, {count.validations} validations")
    suite = run_tests([], [word for name in POLICIES for word in ("or", name)][1:])
    found = [claim_of("combinations", "combinations of values rendered and validated", count.combinations, 60)]
    found += [claim_of("objects", "objects validated", count.objects, 1, not count.wrong, notes(count))]
    checked = sum(suite.passed.values())
    kept = f"{len(suite.passed)} policies, over the rows of their chart"
    found += [claim_of("policies", "checks of policies that passed", checked, 1, not suite.failed, kept)]
    details: dict[str, Any] = {"wrong": count.wrong, "unknown": dict(count.unknown), "policies": suite.passed}
    if not args.quick:
        asked = run_tests(["--slow", str(TESTS / DASHBOARDS)], [])
        queries, answered = (int(asked.properties.get(key, 0)) for key in ("queries", "answered"))
        note = f"of {queries} asked of a real Prometheus that scraped a real server; drawn in docs/images"
        found += [claim_of("queries", "queries of dashboards answered", answered, max(queries, 1), True, note)]
        details["queries"] = dict(asked.properties)
    for one in found:
        print(f"{one.what}: {one.ratio:g} ({'met' if one.met else 'NOT MET'}) {one.notes}")
    print(f"written: {write_result('platform-charts', found, details)}")
    return 0 if all(one.met for one in found) else 1


def claim_of(id: str, what: str, value: int, goal: int, fine: bool = True, notes: str = "") -> Claim:
    """Build a claim of a count."""
    return claim(id, what, [value], f"at least {goal}, without a failure", fine and value >= goal, notes)


def notes(count: Count) -> str:
    """Say what the number of objects stands for."""
    unknown = ", ".join(f"{kind} ({times})" for kind, times in sorted(count.unknown.items()))
    without = f"; no definition is at hand of {unknown}" if unknown else ""
    return f"{count.validations} validations over the versions{without}"


# ---- Rendering and validation.


def load(name: str) -> ModuleType:
    """Load a module of tests/charts, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows() -> Iterator[tuple[str, Path, dict[str, Any], tuple[str, ...]]]:
    """Yield name, chart, values and flags of every combination."""
    every, serving = load("test_every_chart"), load("test_serving_chart")
    for row in every.ROWS:
        chart, values, extra = row.values
        yield str(row.id), chart, values, extra
    for name, values in serving.MATRIX.items():
        yield f"serving-{name}", serving.CHART, values, serving.APIS


def validate() -> Count:
    """Render every combination and validate every object."""
    tools = load("conftest")
    built_in = load("built_in_validation").BuiltInSchemas(tools.KUBERNETES)
    crds = load("crd_validation").CrdSchemas(CRDS, (TESTS / "definitions",))
    count = Count()
    with tempfile.TemporaryDirectory(prefix="nvila-helm-") as home:
        helm = tools.Helm(ROOT / ".tools" / "bin" / "helm", Path(home))
        for name, chart, values, extra in rows():
            done = helm.template(chart, values, "demo", extra)
            count.combinations += 1
            if done.returncode:
                count.wrong.append(f"{name}: {done.stderr.strip()}")
                continue
            is_built_in = sys.modules["test_every_chart"].is_built_in
            for document in tools.yaml.safe_load_all(done.stdout):
                if document:
                    _validate(document, name, count, built_in if is_built_in(document) else crds)
    return count


def _validate(document: dict[str, Any], name: str, count: Count, schemas: Any) -> None:
    try:
        errors = schemas.errors(document)
    except LookupError:
        count.unknown[document["kind"]] += 1
        return
    count.objects += 1
    count.validations += len(getattr(schemas, "versions", ("the one definition",)))
    count.wrong += [f"{name}: {error}" for error in errors]


# ---- Tests.


@dataclass
class Suite:
    """What a run of tests said."""

    passed: dict[str, int]
    failed: list[str]
    properties: dict[str, str]


def run_tests(words: list[str], names: list[str]) -> Suite:
    """Run tests of tests/charts; returns how often each one passed.

    Raises:
        SystemExit: None ran.
    """
    with tempfile.TemporaryDirectory(prefix="nvila-tests-") as folder:
        report = Path(folder) / "report.xml"
        chosen = words or [str(TESTS / name) for name in FILES]
        only = ["-k", " ".join(names)] if names else []
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, "-o", "junit_family=xunit1", *chosen, *only],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if not report.is_file():
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        # Written by pytest a moment ago.
        cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314
    bad = [case.attrib["name"] for case in cases if any(case.findall(tag) for tag in ("failure", "error", "skipped"))]
    passed = Counter(case.attrib["name"].partition("[")[0] for case in cases if case.attrib["name"] not in bad)
    properties = {one.attrib["name"]: one.attrib["value"] for case in cases for one in case.iter("property")}
    return Suite(dict(passed), bad, properties)


if __name__ == "__main__":
    sys.exit(main())
