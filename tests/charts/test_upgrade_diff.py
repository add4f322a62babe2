"""scripts/upgrade_diff.py: an upgrade from the last release breaks nothing, and what would break one is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import upgrade_diff as upgrade

ROOT = Path(__file__).resolve().parents[2]
POSTGRES = "charts/nvila-platform/templates/postgres"
MLFLOW = "charts/nvila-platform/templates/mlflow"
HELPERS = "charts/nvila-platform/templates/_helpers.tpl"

pytestmark = pytest.mark.usefixtures("helm")


RECORDED: dict[str, Any] = json.loads((ROOT / upgrade.RECORD).read_text(encoding="utf-8"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The charts and the version, to be changed."""
    shutil.copytree(ROOT / "charts", tmp_path / "charts", symlinks=True)
    (tmp_path / "model" / "nvila").mkdir(parents=True)
    shutil.copy(ROOT / "model" / "nvila" / "_version.py", tmp_path / "model" / "nvila")
    return tmp_path


def lost(tree: Path, *names: str) -> list[str]:
    """Return the differences of the tree to the record, in some of its rows."""
    old = {**RECORDED, "rows": {name: row for name, row in RECORDED["rows"].items() if name in names}}
    assert len(old["rows"]) == len(names)
    found: list[str] = upgrade.differences(old, upgrade.record(tree, upgrade.rows_of(old)))
    return found


def test_an_upgrade_from_the_last_release_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade.main([]) == 0, capsys.readouterr().out


def test_the_record_has_every_chart_and_every_profile() -> None:
    charts = {(row["chart"], row.get("profile", "")) for row in RECORDED["rows"].values()}
    profiles = {("nvila", path.stem.removeprefix("values-")) for path in (ROOT / "charts/nvila").glob("values-*.yaml")}
    assert charts == {(name, "") for name in ("nvila-platform", "nvila-serving", "nvila-observability")} | profiles
    kinds = {key.split()[0] for row in RECORDED["rows"].values() for key in row["resources"]}
    assert {"StatefulSet", "Deployment", "Service", "RoleBinding", "InferenceService", "HTTPRoute"} <= kinds
    assert "error" not in {key for row in RECORDED["rows"].values() for key in row["resources"]}


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "charts/nvila-platform/templates/_helpers.tpl",
            "[ReadWriteOnce]",
            "[ReadWriteMany]",
            "volumeClaimTemplates was",
        ),
        (
            f"{POSTGRES}/statefulset.yaml",
            "  serviceName: ",
            "  serviceName: new-",
            'postgres: spec.serviceName was "demo',
        ),
        (f"{MLFLOW}/service.yaml", "spec:\n", "spec:\n  clusterIP: None\n", 'spec.clusterIP was null, is "None"'),
        (f"{MLFLOW}/service.yaml", "  name: ", "  name: new-", "Service models/demo-nvila-platform-mlflow is gone"),
        (
            "charts/nvila-platform/templates/_helpers.tpl",
            "app.kubernetes.io/component:",
            "component:",
            "spec.selector was",
        ),
        ("charts/nvila-platform/values.schema.json", '"createBucket"', '"makeBucket"', "of 0.1.0 are refused"),
        ("charts/nvila-platform/templates/s3/bucket-job.yaml", "kind: Job", "kind: Job #", ""),
    ],
    ids=["volumes", "service-of-pods", "address", "name", "selector", "value", "nothing"],
)
def test_a_change_that_breaks_an_upgrade_is_named(tree: Path, file: str, old: str, new: str, said: str) -> None:
    path = tree / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    # Values that all rows set are refused in this one.
    row = "nvila-platform"
    if file.endswith(".json"):
        recorded = RECORDED["rows"][row]
        older = {"version": "0.1.0", "rows": {row: {**recorded, "values": {"s3": {"createBucket": True}}}}}
        found = upgrade.differences(older, upgrade.record(tree, upgrade.rows_of(older)))
    else:
        found = lost(tree, row)
    assert any(said in line for line in found) if said else found == [], found


def test_a_job_that_helm_does_not_make_again_may_not_change(tree: Path) -> None:
    path = tree / "charts/nvila-platform/templates/s3/bucket-job.yaml"
    kept = path.read_text(encoding="utf-8").replace("before-hook-creation,hook-succeeded", "hook-succeeded")
    path.write_text(kept, encoding="utf-8")
    row = {"row": {"chart": "nvila-platform", "values": {}}}
    before = upgrade.record(tree, row)
    path.write_text(kept.replace("name: bucket\n", "name: make\n"), encoding="utf-8")
    (found,) = upgrade.differences(before, upgrade.record(tree, row))
    assert "Job models/demo-nvila-platform-bucket: spec.template was" in found


def test_what_is_new_breaks_nothing(tree: Path) -> None:
    (tree / "charts/nvila-platform/templates/extra.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: extra\n  namespace: models\n"
    )
    assert lost(tree, "nvila-platform", "nvila-laptop") == []


def test_charts_of_a_revision_can_be_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    assert upgrade.main(["--from", "HEAD"]) == 0, capsys.readouterr().out
    assert upgrade.main(["--from", "no-such-tag"]) == 1
    assert "error: git archive no-such-tag: " in capsys.readouterr().err


def test_the_check_of_charts_runs_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, _, recipe = makefile.partition("\ncharts: setup\n")
    assert "scripts/upgrade_diff.py\n" in recipe.partition("\n\n")[0]
