"""Wrong values of charts/nvila-serving are refused by name; schema, values and README agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-serving"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-key": ({"replicas": 2}, "additional properties 'replicas' not allowed"),
    "typo-in-a-section": ({"image": {"tga": "1"}}, "at '/image': additional properties 'tga' not allowed"),
    "typo-in-a-probe": ({"probes": {"startup": {"period": 1}}}, "at '/probes/startup': additional properties 'period'"),
    "typo-in-global": ({"global": {"registry": "x"}}, "at '/global': additional properties 'registry' not allowed"),
    "typo-in-limits": ({"resources": {"limits": {"memoy": "1Gi"}}}, "additional properties 'memoy' not allowed"),
    "typo-in-env": ({"server": {"extraEnv": [{"name": "A", "valu": "1"}]}}, "additional properties 'valu' not allowed"),
    "text-for-a-switch": ({"autoscaling": {"enabled": "false"}}, "at '/autoscaling/enabled': got string, want boolean"),
    "number-for-a-tag": ({"image": {"tag": 1.2}}, "at '/image/tag': got number, want string"),
    "moving-tag": ({"image": {"tag": "latest"}}, 'image.tag "latest" names another image tomorrow'),
    "variant-of-a-tag": ({"image": {"variant": "cpu", "tag": "1"}}, "image.variant chooses among the chart's own tags"),
    "unknown-variant": ({"image": {"variant": "rocm"}}, "at '/image/variant'"),
    "short-digest": ({"image": {"digest": "sha256:abc"}}, "at '/image/digest'"),
    "tag-in-repository": ({"image": {"repository": "nvila/serve:1"}}, "at '/image/repository'"),
    "path-for-a-uri": ({"model": {"storageUri": "/models/x"}}, "at '/model/storageUri'"),
    "no-model": ({"model": {"storageUri": ""}}, "model.storageUri is empty: name the model's folder"),
    "folder-of-the-node": (
        {"server": {"extraVolumes": [{"name": "x", "hostPath": {"path": "/"}}]}},
        "at '/server/extraVolumes/0': additional properties 'hostPath' not allowed",
    ),
    "root": ({"podSecurityContext": {"runAsUser": 0}}, "at '/podSecurityContext/runAsUser'"),
    "may-be-root": ({"podSecurityContext": {"runAsNonRoot": False}}, "at '/podSecurityContext/runAsNonRoot'"),
    "privileged-port": ({"server": {"port": 80}}, "at '/server/port'"),
    "no-pods": (
        {"autoscaling": {"minReplicas": 0}},
        "autoscaling.minReplicas is 0, and nothing would bring a first pod",
    ),
    "no-pods-always": (
        {"autoscaling": {"enabled": False, "minReplicas": 0}},
        "autoscaling.minReplicas is 0, and nothing would bring a first pod",
    ),
    "no-pods-by-the-pods-own-metric": (
        {"autoscaling": {"class": "keda", "minReplicas": 0, "keda": {"serverAddress": "http://p:9090"}}},
        "autoscaling.minReplicas is 0, and nothing would bring a first pod",
    ),
    "less-than-no-pods": ({"autoscaling": {"minReplicas": -1}}, "at '/autoscaling/minReplicas'"),
    "unknown-scaler": ({"autoscaling": {"class": "vpa"}}, "at '/autoscaling/class'"),
    "keda-without-prometheus": ({"autoscaling": {"class": "keda"}}, "needs autoscaling.keda.serverAddress"),
    "unknown-metric": ({"autoscaling": {"metric": "gpu"}}, "at '/autoscaling/metric'"),
    "max-under-min": ({"autoscaling": {"minReplicas": 5}}, "autoscaling.maxReplicas is 4"),
    "no-time-after-draining": (
        {"server": {"drainSeconds": 60}},
        "server.terminationGracePeriodSeconds is 60, which leaves nothing",
    ),
    "secrets-without-account": (
        {"serviceAccount": {"create": False, "secrets": ["s3"]}},
        "serviceAccount.secrets needs serviceAccount.create",
    ),
    "own-selector-label": ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "/commonLabels/app.kubernetes.io~1name"),
    "budget-of-zero": ({"podDisruptionBudget": {"maxUnavailable": 0}}, "at '/podDisruptionBudget/maxUnavailable'"),
    "production-without-keys": (
        {"playground": {"enabled": False}},
        "playground.enabled off is production, which lets nobody in without a key: set access.existingSecret",
    ),
    "rate-of-nobody": ({"access": {"requestsPerMinute": 5}}, "access.requestsPerMinute counts callers"),
    "networks-without-hosts": ({"media": {"networks": ["10.0.0.0/8"]}}, "media.networks are where media.hosts may be"),
    "media-by-http": ({"media": {"hosts": ["http://images.example.com"]}}, "at '/media/hosts/0'"),
    "media-store-elsewhere": ({"media": {"store": "gs://bucket"}}, "at '/media/store'"),
    "share-of-nothing": ({"drift": {"share": 0}}, "at '/drift/share'"),
    "route-without-gateway": ({"route": {"enabled": True}}, "route.enabled needs the API gateway.networking.k8s.io/v1"),
    "name-too-long": ({"fullnameOverride": "e" * 49}, "has 49 characters, at most 48 fit"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused_by_name(helm: Helm, values: dict[str, Any], said: str) -> None:
    done = helm.template(CHART, values, extra=("--api-versions", "keda.sh/v1alpha1"))
    assert done.returncode != 0
    assert said in done.stderr


def test_keda_without_its_api_is_refused_with_the_way_out(helm: Helm) -> None:
    values = {"autoscaling": {"class": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}}
    done = helm.template(CHART, values)
    assert "autoscaling.class keda needs the API keda.sh/v1alpha1, which this cluster does not have" in done.stderr
    assert helm.template(CHART, values, extra=("--api-versions", "keda.sh/v1alpha1")).returncode == 0


def test_a_route_without_a_gateway_is_refused_with_the_way_out(helm: Helm) -> None:
    done = helm.template(CHART, {"route": {"enabled": True}}, extra=("--api-versions", "gateway.networking.k8s.io/v1"))
    assert "route.enabled needs a gateway to hang on: set route.parentRefs" in done.stderr


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("r" * 40, 'name "' + "r" * 40 + '-nvila-serving" has 54 characters'),
        ("2nd", 'name "2nd-nvila-serving" must start with a letter'),
        ("v1.2", 'name "v1.2-nvila-serving" must start with a letter and hold only a-z, 0-9 and -'),
    ],
)
def test_release_names_that_kserve_cannot_use_are_refused_with_the_way_out(helm: Helm, release: str, said: str) -> None:
    done = helm.template(CHART, release=release)
    assert said in done.stderr
    assert "set fullnameOverride" in done.stderr
    assert helm.template(CHART, {"fullnameOverride": "eyes"}, release).returncode == 0


def test_old_kubernetes_is_refused(helm: Helm) -> None:
    done = helm.template(CHART, extra=("--kube-version", "1.29.0"))
    assert ">=1.30.0-0" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Values, their schema and their documentation agree


def docs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "chart_docs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_readme_documents_the_values_as_they_are() -> None:
    done = docs("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_readme_is_found_and_mended(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "chart")
    values = chart / "values.yaml"
    values.write_text(values.read_text(encoding="utf-8") + "# -- A new | key,\n# on two lines.\nfresh: 1\n")
    before = (chart / "README.md").read_text(encoding="utf-8")
    found = docs("--check", chart)
    assert (found.returncode, (chart / "README.md").read_text(encoding="utf-8")) == (1, before)
    assert "out of date" in found.stdout
    assert docs(chart).returncode == 0
    assert "| `fresh` | `1` | A new | key, on two lines. |".replace("new |", "new \\|") in (
        chart / "README.md"
    ).read_text(encoding="utf-8")
    assert docs("--check", chart).returncode == 0


def test_a_value_without_documentation_is_refused_by_line(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "chart")
    (chart / "values.yaml").write_text("# -- Known.\nknown:\n  # not a doc comment\n  bare: 1\n")
    done = docs(chart)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("values.yaml:4: no '# --' comment above 'bare: 1'")
