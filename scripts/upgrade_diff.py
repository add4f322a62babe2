"""Compare what the charts render with the last release: names, selectors and what Kubernetes lets nobody change.

`helm upgrade` fails on a changed immutable field, and a resource under another name is a new one: an empty volume, an
unreachable service. charts/released.json holds, for each row of values, what the last release made of it; the values go
with it, so a value that the charts take no more is found too.

Usage:
    python scripts/upgrade_diff.py                # against charts/released.json; `make charts` runs this
    python scripts/upgrade_diff.py --from v0.1.0  # against the charts of a git revision
    python scripts/upgrade_diff.py --record       # at a release, or after a break that CHANGELOG tells how to live with
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path("charts") / "released.json"
APIS = (
    "gateway.networking.k8s.io/v1",
    "keda.sh/v1alpha1",
    "kubeflow.org/v1alpha1",
    "kueue.x-k8s.io/v1beta2",
    "monitoring.coreos.com/v1",
    "pipelines.kubeflow.org/v2beta1",
)
# Fields that an API server refuses to change, and selectors, which would lose the running pods.
FIXED: Mapping[str, tuple[str, ...]] = {
    "ClusterQueue": ("spec.namespaceSelector",),
    "Deployment": ("spec.selector",),
    "InferenceService": ("metadata.annotations.serving.kserve.io/deploymentMode",),
    "Job": ("spec.selector", "spec.template", "spec.completions"),
    "LocalQueue": ("spec.clusterQueue",),
    "NetworkPolicy": ("spec.podSelector",),
    "PersistentVolumeClaim": ("spec",),
    "PodDisruptionBudget": ("spec.selector",),
    "RoleBinding": ("roleRef",),
    "Service": ("spec.clusterIP", "spec.selector"),
    "StatefulSet": (
        "spec.selector",
        "spec.serviceName",
        "spec.podManagementPolicy",
        "spec.volumeClaimTemplates",
    ),
}
# The release that every row is rendered as.
RELEASE, NAMESPACE = "demo", "models"
Documents = list[dict[str, Any]]
Identity = dict[str, dict[str, Any]]


class UpgradeError(Exception):
    """A reason that fits on one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Compare the charts with those of the last release.")
    parser.add_argument(
        "--from", dest="revision", default="", help="git revision to compare with instead of the record"
    )
    parser.add_argument("--record", action="store_true", help="write down what the charts make now")
    args = parser.parse_args(argv)
    try:
        if args.record:
            (ROOT / RECORD).write_text(json.dumps(record(ROOT), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            return 0
        with old_charts(ROOT, args.revision) as old:
            found = differences(old, record(ROOT, rows_of(old)))
    except UpgradeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in found:
        print(line)
    if found:
        print(
            f"{len(found)} differences break an upgrade from {old['version']}. Take them back; or say in CHANGELOG.md"
            " how to upgrade, then: python scripts/upgrade_diff.py --record"
        )
    return 1 if found else 0


@contextmanager
def old_charts(root: Path, revision: str) -> Iterator[dict[str, Any]]:
    """Yield what to compare with: the record, or the charts of a revision, rendered in a folder that goes away."""
    recorded: dict[str, Any] = json.loads((root / RECORD).read_text(encoding="utf-8"))
    if not revision:
        yield recorded
        return
    command = ["git", "archive", revision, "charts", "model/nvila/_version.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if done.returncode:
        raise UpgradeError(f"git archive {revision}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="nvila-charts-") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as packed:
            packed.extractall(folder, filter="data")
        # Rows that the revision cannot render have nothing to lose.
        old = record(Path(folder), rows_of(recorded))
        yield {**old, "rows": {name: row for name, row in old["rows"].items() if "error" not in row["resources"]}}


def rows() -> dict[str, dict[str, Any]]:
    """Return the rows of values that a release is recorded with: `name -> {chart, profile, values}`."""
    found: dict[str, dict[str, Any]] = {}
    for chart in ("nvila-observability", "nvila-platform", "nvila-serving"):
        found[chart] = {"chart": chart, "values": {}}
    # The second step of an installation, which has everything of the first.
    serving = {
        "parts": {"serving": {"enabled": True}},
        "nvila-serving": {"model": {"storageUri": "s3://nvila/artifacts/quantize/0123"}},
    }
    for profile in ("laptop", "gpu", "production"):
        found[f"nvila-{profile}"] = {"chart": "nvila", "profile": profile, "values": serving}
    minio = {"seaweedfs": {"enabled": False}, "minio": {"enabled": True}}
    found["nvila-platform-minio"] = {"chart": "nvila-platform", "values": {"s3": minio}}
    queue = {"kueue": {"enabled": True}, "pipelines": {"podDefault": {"enabled": True}, "upload": {"enabled": True}}}
    found["nvila-platform-queue"] = {"chart": "nvila-platform", "values": queue}
    route = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["eyes.example.com"]}
    keda = {"class": "keda", "keda": {"serverAddress": "http://prometheus.monitoring.svc:9090"}}
    found["nvila-serving-route"] = {"chart": "nvila-serving", "values": {"route": route, "autoscaling": keda}}
    return found


def rows_of(recorded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a record without what they made."""
    return {name: {key: row[key] for key in row if key != "resources"} for name, row in recorded["rows"].items()}


def record(root: Path, of: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Render rows with the charts of a tree and keep what an upgrade must not change.

    A row that does not render has the reason in the place of its resources.
    """
    line = (root / "model" / "nvila" / "_version.py").read_text(encoding="utf-8")
    made = {}
    for name, row in (rows() if of is None else of).items():
        try:
            made[name] = {**row, "resources": identity(render(root, row))}
        except UpgradeError as error:
            made[name] = {**row, "resources": {"error": {"said": str(error)}}}
    return {"version": line.split('__version__ = "')[1].split('"')[0], "rows": made}


def render(root: Path, row: Mapping[str, Any]) -> Documents:
    """Render a row with helm.

    Raises:
        UpgradeError: Helm refuses the values, or is not here.
    """
    own = ROOT / ".tools" / "bin" / "helm"
    helm = str(own) if own.is_file() else shutil.which("helm")
    if helm is None:
        raise UpgradeError("helm is not here; fetch it: python scripts/tools.py")
    chart = root / "charts" / row["chart"]
    command = [helm, "template", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", "-"]
    if row.get("profile"):
        command[-2:] = ["--values", str(chart / f"values-{row['profile']}.yaml"), "--values", "-"]
    for api in APIS:
        command += ["--api-versions", api]
    done = subprocess.run(
        command,
        input=yaml.safe_dump(row["values"]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KUBECONFIG": os.devnull},
    )
    if done.returncode:
        raise UpgradeError(done.stderr.strip().replace("\n", " "))
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def identity(documents: Documents) -> Identity:
    """Return `kind namespace/name -> fields` that must stay as they are."""
    found: Identity = {}
    for document in documents:
        metadata, kind = document["metadata"], document["kind"]
        if "before-hook-creation" in metadata.get("annotations", {}).get("helm.sh/hook-delete-policy", ""):
            # Helm deletes it before it makes it again.
            continue
        values = {path: value for path in FIXED.get(kind, ()) if (value := _at(document, path)) is not None}
        found[f"{kind} {metadata.get('namespace', '')}/{metadata['name']}"] = values
    return found


def _at(document: Mapping[str, Any], path: str) -> Any:
    first, _, rest = path.partition(".")
    if path in document or not rest:
        return document.get(path)
    inner = document.get(first)
    return _at(inner, rest) if isinstance(inner, dict) else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line for everything that breaks an upgrade; what is only new breaks nothing."""
    found = []
    for name, row in old["rows"].items():
        now = new["rows"][name]["resources"]
        if "error" in now:
            found.append(f"{name}: the values of {old['version']} are refused: {now['error']['said']}")
            continue
        for key, fields in row["resources"].items():
            if key not in now:
                found.append(f"{name}: {key} is gone: its name or namespace changed, or it is not made any more")
                continue
            for path in sorted({*fields, *now[key]}):
                before, after = fields.get(path), now[key].get(path)
                if before != after:
                    found.append(f"{name}: {key}: {path} was {json.dumps(before)}, is {json.dumps(after)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
