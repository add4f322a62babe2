"""What docs/install.md has a reader type: helm and kubectl take it, and it speaks of what the charts make."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
UMBRELLA = ROOT / "charts" / "nvila"
APIS = ("kueue.x-k8s.io/v1beta2", "monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1")
API_FLAGS = tuple(word for api in APIS for word in ("--api-versions", api))
PROFILES = ("laptop", "gpu", "production")
# The second step of the guide; flags, since they come after the profile.
MODEL = "s3://nvila/artifacts/quantize/0123"
SERVING = ("--set", "parts.serving.enabled=true", "--set", f"nvila-serving.model.storageUri={MODEL}")
SHORT = {"deploy": "deployment", "svc": "service", "sts": "statefulset"}


def commands(program: str) -> list[list[str]]:
    """Return the words of every use of a program in the guide's shell blocks, up to what another program gets."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", GUIDE, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    text = re.sub(r"(^|\s)# .*", "", text, flags=re.MULTILINE)
    # What the shell puts in, and the namespaces of the loop.
    text = re.sub(r"\$\([^()]*(\([^()]*\))*[^()]*\)|\$key", "WORD", text)
    text = text.replace("$namespace", "nvila").replace("$uri", MODEL)
    parts = [part for line in text.splitlines() for part in re.split(r"\s(?:\||&&?|>|<|;)(?:\s|$)", line)]
    return [shlex.split(part)[1:] for part in parts if part.split()[:1] == [program]]


def kubectl(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    binary = ROOT / ".tools" / "bin" / "kubectl"
    if not binary.is_file():
        pytest.skip("kubectl is not here: python scripts/tools.py")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": os.devnull}
    return subprocess.run([binary, *words], capture_output=True, text=True, check=False, env=env, timeout=60)


def profile(render: Render, name: str, *more: str) -> list[Document]:
    flags = (*API_FLAGS, "--values", str(UMBRELLA / f"values-{name}.yaml"), "--namespace", "nvila", *more)
    return render(UMBRELLA, {}, "nvila", flags)


def test_kserve_has_one_version_everywhere() -> None:
    script = (ROOT / "scripts" / "kind.sh").read_text(encoding="utf-8")
    (version,) = re.findall(r"^KSERVE=v(\d+\.\d+)\.\d+$", script, re.MULTILINE)
    (row,) = (line for line in GUIDE.splitlines() if line.startswith("| [KServe]"))
    assert f"| {version} |" in row
    readme = (ROOT / "charts" / "nvila-serving" / "README.md").read_text(encoding="utf-8")
    assert f"shortly before {version};" in re.sub(r"\s+", " ", readme)


def test_the_guide_has_commands_of_both_programs() -> None:
    assert len(commands("kubectl")) >= 12
    assert len(commands("helm")) >= 4


@pytest.mark.parametrize("words", commands("helm"), ids=" ".join)
def test_helm_takes_its_commands(helm: Helm, words: list[str]) -> None:
    if words[0] == "install" or (words[0] == "upgrade" and {"--set", "-f", "--values"} & set(words)):
        # The nearest thing without a cluster whose APIs could be looked up.
        here = (str(ROOT / word) if word.startswith(("charts/", "examples/")) else word for word in words[1:])
        done = helm.run("template", *here, *API_FLAGS)
        assert done.returncode == 0, done.stderr
    else:
        # The arguments are right; what is missing is a cluster.
        assert "cluster unreachable" in helm.run(*words).stderr


def test_serving_is_a_second_step_that_names_a_model(helm: Helm) -> None:
    first, second = (
        next(words for words in commands("helm") if words[0] == verb and "charts/nvila/values-gpu.yaml" in words)
        for verb in ("install", "upgrade")
    )
    assert second[1 : len(first)] == first[1:]

    def endpoints(words: list[str]) -> list[Any]:
        done = helm.run("template", *(str(ROOT / w) if w.startswith("charts/") else w for w in words[1:]), *API_FLAGS)
        made = [document for document in yaml.safe_load_all(done.stdout) if document]
        return [d["spec"]["predictor"]["model"]["storageUri"] for d in made if d["kind"] == "InferenceService"]

    assert endpoints(first) == []
    assert endpoints(second) == [MODEL]


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_images_that_the_guide_pushes_are_those_that_a_profile_pulls(render: Render, name: str) -> None:
    """What the registry is told to hold by the guide, and what nobody pushed there."""
    registry = "registry.example.com"
    documents = profile(render, name, *SERVING, "--set", f"global.imageRegistry={registry}")
    images = set(re.findall(r"'image': '([^']+)'", str(documents)))
    own = {image for image in images if image.startswith(f"{registry}/")}
    assert 'make images ARGS="--registry registry.example.com/nvila --push ' in GUIDE
    assert {image.partition(":")[0] for image in own} == {
        f"{registry}/nvila/{n}" for n in ("mlflow", "pipelines", "serve")
    }
    assert {image.partition("/")[0] for image in images - own} == ({"docker.io"} if name == "gpu" else set())


def test_a_mirror_gets_the_images_that_the_charts_then_ask_it_for(render: Render, tmp_path: Path) -> None:
    (block,) = (one for one in re.findall(r"(?ms)^ *```bash\n(.*?)^ *```", GUIDE) if "skopeo" in one)
    program = tmp_path / "skopeo"
    program.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    bash = shutil.which("bash") or "bash"
    done = subprocess.run([bash, "-eu", "-c", block], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copied = {}
    for line in (tmp_path / "asked").read_text(encoding="utf-8").splitlines():
        *flags, source, target = line.split()
        # The index of all platforms, byte by byte: anything else has another digest.
        assert flags == ["copy", "--all", "--preserve-digests"]
        copied[target.removeprefix("docker://")] = source.rpartition("@")[2]
    mirror = {"image": {"registry": "registry.example.com"}}
    chart = ROOT / "charts" / "nvila-platform"
    pulled = set()
    for kind in ("seaweedfs", "minio"):
        stores = {name: {"enabled": name == kind, **mirror} for name in ("seaweedfs", "minio")}
        documents = render(chart, {"postgres": {"bundled": mirror}, "s3": stores})
        pulled |= {
            container["image"]
            for document in documents
            if document["kind"] == "StatefulSet"
            for container in document["spec"]["template"]["spec"]["containers"]
        }
    assert pulled == {f"{image}@{digest}" for image, digest in copied.items()}
    for kind in ("postgres.bundled", "s3.seaweedfs", "s3.minio"):
        assert f"`nvila-platform.{kind}.image.registry" in GUIDE


def test_every_command_on_the_release_names_its_namespace() -> None:
    inline = [shlex.split(code)[1:] for code in re.findall(r"`(helm [^`]*\bnvila\b[^`]*)`", GUIDE)]
    found = [words for words in (*commands("helm"), *inline) if "--dry-run=server" not in words]
    assert len(found) > len(commands("helm"))
    for words in found:
        assert words[words.index("-n") + 1] == "nvila", words


@pytest.mark.parametrize("words", [w for w in commands("kubectl") if "create" in w], ids=" ".join)
def test_kubectl_takes_what_is_created(words: list[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("team-a 00 120\n")
    given = [word.replace("api-keys=keys", f"api-keys={keys}") for word in words]
    done = kubectl(tmp_path, *given, "--dry-run=client", "-o", "yaml")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["metadata"]["name"]


def test_every_resource_that_is_named_is_one_of_a_profile(render: Render) -> None:
    made = {
        f"{document['kind'].lower()}/{document['metadata']['name']}"
        for name in PROFILES
        for document in profile(render, name, *SERVING)
    }
    named = set()
    for words in commands("kubectl"):
        for word in words:
            kind, slash, name = word.partition("/")
            if slash and SHORT.get(kind, kind) in {"deployment", "statefulset", "service", "inferenceservice"}:
                named.add(f"{SHORT.get(kind, kind)}/{name}")
    assert {"statefulset/nvila-platform-postgres", "deployment/nvila-platform-mlflow"} <= named <= made


def routed(render: Render) -> list[Document]:
    """Return what production with the routes of the example is."""
    files = (UMBRELLA / "values-production.yaml", ROOT / "examples" / "production-routes.yaml")
    flags = (*API_FLAGS, *(word for file in files for word in ("--values", str(file))), *SERVING)
    return render(UMBRELLA, {}, "nvila", flags)


def gateway_example() -> dict[str, Document]:
    text = (ROOT / "examples" / "production-gateway.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_the_routes_of_the_example_hang_on_listeners_of_its_gateway(render: Render, crds: CrdSchemas) -> None:
    gateway = gateway_example()["Gateway"]
    assert crds.errors(gateway) == []
    listeners = {one["name"]: one for one in gateway["spec"]["listeners"]}
    routes = [document for document in routed(render) if document["kind"] == "HTTPRoute"]
    assert len(routes) == len(listeners) == 2
    for route in routes:
        assert crds.errors(route) == []
        (parent,) = route["spec"]["parentRefs"]
        assert (parent["name"], parent["namespace"]) == (gateway["metadata"]["name"], gateway["metadata"]["namespace"])
        listener = listeners[parent["sectionName"]]
        assert route["spec"]["hostnames"] == [listener["hostname"]]
        # TLS ends there, and the listener admits the namespace that the guide installs into.
        assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")
        admitted = listener["allowedRoutes"]["namespaces"]["selector"]["matchLabels"]["kubernetes.io/metadata.name"]
        assert admitted == "nvila"
    gateway["spec"]["listeners"][0]["tls"]["certificates"] = []
    assert crds.errors(gateway) != []


def test_sign_on_stands_before_the_route_to_mlflow_and_no_other(render: Render) -> None:
    policy = gateway_example()["SecurityPolicy"]
    routes = {document["metadata"]["name"]: document for document in routed(render) if document["kind"] == "HTTPRoute"}
    (target,) = policy["spec"]["targetRefs"]
    assert (target["kind"], policy["metadata"]["namespace"]) == ("HTTPRoute", "nvila")
    route = routes[target["name"]]
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == "nvila-platform-mlflow"
    oidc = policy["spec"]["oidc"]
    assert oidc["redirectURL"] == f"https://{route['spec']['hostnames'][0]}/oauth2/callback"
    assert oidc["redirectURL"] in GUIDE
    secret = next(words for words in commands("kubectl") if oidc["clientSecret"]["name"] in words)
    assert secret[:2] == ["-n", "nvila"]
    assert any(word.startswith("--from-literal=client-secret=") for word in secret)


def test_the_gateways_proxies_are_let_in_and_answered(render: Render) -> None:
    documents = routed(render)
    for name in ("nvila-platform-mlflow", "nvila-serving"):
        (policy,) = (d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == name)
        assert "envoy-gateway-system" in json.dumps(policy["spec"]["ingress"]), name
    (mlflow,) = (d for d in documents if d["kind"] == "Deployment" and d["metadata"]["name"] == "nvila-platform-mlflow")
    env = {one["name"]: one.get("value") for one in mlflow["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert "mlflow.example.com" in env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_models_are_copied_from_the_store_of_production() -> None:
    values = yaml.safe_load((UMBRELLA / "values-production.yaml").read_text(encoding="utf-8"))
    notes = [
        dict(word.split("=", 1) for word in words if word.startswith("serving.kserve.io/"))
        for words in commands("kubectl")
        if "annotate" in words and "nvila-storage" in words
    ]
    bundled, production = notes
    assert bundled["serving.kserve.io/s3-endpoint"].startswith("nvila-platform-s3.")
    assert production["serving.kserve.io/s3-endpoint"] == values["nvila-platform"]["s3"]["external"]["endpoint"]
    assert production["serving.kserve.io/s3-usehttps"] == "1"
    # Nothing of the bundled store is left behind.
    assert bundled.keys() <= production.keys()


def secrets_of(node: Any) -> set[tuple[str, str]]:
    """Return name and key of every secret that a document reads; no key where all of it is read."""
    found: set[tuple[str, str]] = set()
    if isinstance(node, dict):
        if isinstance(reference := node.get("secretKeyRef"), dict):
            found.add((reference["name"], reference["key"]))
        if isinstance(name := node.get("secretName"), str):
            found.add((name, ""))
        if node.get("kind") == "ServiceAccount":
            found |= {(one["name"], "") for one in node.get("secrets", [])}
        for value in node.values():
            found |= secrets_of(value)
    elif isinstance(node, list):
        for value in node:
            found |= secrets_of(value)
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_every_secret_of_a_profile_is_made_with_its_keys(render: Render, name: str) -> None:
    made: dict[str, set[str]] = {}
    for words in commands("kubectl"):
        if "create" in words and "secret" in words:
            given = [word for word in words if word.startswith(("--from-literal=", "--from-file="))]
            keys = {word.split("=")[1] for word in given}
            made.setdefault(words[words.index("generic") + 1], set()).update(keys)
    read = {pair for document in profile(render, name, *SERVING) for pair in secrets_of(document)}
    assert read
    for secret, key in read:
        assert secret in made
        assert not key or key in made[secret], (secret, key)
