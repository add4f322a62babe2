#!/usr/bin/env bash
# The whole platform on a kind cluster of this machine: Kubeflow Pipelines, Trainer, KServe, and NVILA beside them.
#
#   scripts/kind.sh up           make the cluster and install everything; run again after an interruption, it goes on
#   scripts/kind.sh e2e          up, then run the tiny lifecycle on it and assert what came out
#   scripts/kind.sh down         remove the cluster and all that is in it
#   scripts/kind.sh --dry-run ... say what would be run, run nothing
#
# Needs Docker, kind, kubectl and helm 4 on PATH (kubectl and helm: make charts), 4 cores, 12 GiB of memory and 30 GiB
# of disk. Nothing outside the cluster is changed but the kubeconfig's context.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CLUSTER=${NVILA_KIND_CLUSTER:-nvila}
NAMESPACE=nvila
PIPELINES=kubeflow
# What the charts and manifests of this version are checked against.
KUBERNETES=v1.34.0
CERT_MANAGER=v1.18.2
KSERVE=v0.21.0
KFP=2.17.0
TRAINER=2.3.0
IMAGES="mlflow pipelines serve train"

DRY_RUN=""
if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=yes
    shift
fi
PATH="$PWD/.tools/bin:$PATH"
VERSION=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' model/nvila/_version.py)

say() { printf '\n== %s\n' "$*" >&2; }

run() {
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

kube() { run kubectl --context "kind-$CLUSTER" "$@"; }
chart() { run helm --kube-context "kind-$CLUSTER" upgrade --install --wait --timeout 15m "$@"; }

require() {
    [ -n "$DRY_RUN" ] && return
    for program in "$@"; do
        command -v "$program" >/dev/null && continue
        case $program in
        docker) fix="https://docs.docker.com/engine/install" ;;
        kind) fix="https://kind.sigs.k8s.io/docs/user/quick-start/#installation" ;;
        *) fix="make charts" ;;
        esac
        echo "error: $program is not here; install it: $fix" >&2
        exit 1
    done
    docker info >/dev/null 2>&1 || {
        echo "error: Docker does not answer; start it, or add yourself to the group docker" >&2
        exit 1
    }
}

make_cluster() {
    if [ -z "$DRY_RUN" ] && kind get clusters 2>/dev/null | grep -qx "$CLUSTER"; then
        say "cluster $CLUSTER is there"
        return
    fi
    say "making cluster $CLUSTER, Kubernetes $KUBERNETES"
    run kind create cluster --name "$CLUSTER" --image "kindest/node:$KUBERNETES" --wait 5m
}

# A secret is made once: another password would not open the volumes that the first one closed.
secret() {
    local namespace=$1 name=$2
    shift 2
    if [ -z "$DRY_RUN" ] && kubectl --context "kind-$CLUSTER" -n "$namespace" get secret "$name" >/dev/null 2>&1; then
        return
    fi
    kube -n "$namespace" create secret generic "$name" "$@"
}

# Prints a new password, or the given word in a dry run.
password() {
    if [ -n "$DRY_RUN" ]; then
        echo "$1"
    else
        openssl rand -hex 20
    fi
}

namespace() {
    if [ -z "$DRY_RUN" ] && kubectl --context "kind-$CLUSTER" get namespace "$1" >/dev/null 2>&1; then
        return
    fi
    kube create namespace "$1"
}

install_platforms() {
    say "cert-manager $CERT_MANAGER and KServe $KSERVE"
    chart cert-manager oci://quay.io/jetstack/charts/cert-manager --version "$CERT_MANAGER" \
        --namespace cert-manager --create-namespace --set crds.enabled=true
    chart kserve-crd oci://ghcr.io/kserve/charts/kserve-crd --version "$KSERVE" --namespace kserve --create-namespace
    chart kserve oci://ghcr.io/kserve/charts/kserve-resources --version "$KSERVE" --namespace kserve \
        --set kserve.controller.deploymentMode=Standard
    say "Kubeflow Trainer $TRAINER"
    chart kubeflow-trainer oci://ghcr.io/kubeflow/charts/kubeflow-trainer --version "$TRAINER" \
        --namespace kubeflow-system --create-namespace
    say "Kubeflow Pipelines $KFP (some minutes)"
    local source=github.com/kubeflow/pipelines/manifests/kustomize
    kube apply -k "$source/cluster-scoped-resources?ref=$KFP"
    kube wait --for condition=established --timeout=2m crd/applications.app.k8s.io
    kube apply -k "$source/env/platform-agnostic?ref=$KFP"
    kube -n "$PIPELINES" rollout status deployment/ml-pipeline --timeout=15m
}

load_images() {
    say "building the images, without CUDA, and loading them into the node"
    # shellcheck disable=SC2086 # a list of names
    run "$PYTHON" scripts/images.py $IMAGES --cpu --engine docker
    local tag
    for image in $IMAGES; do
        case $image in
        serve | train) tag=$VERSION-cpu ;; # another torch, another tag
        *) tag=$VERSION ;;
        esac
        run kind load docker-image "nvila/$image:$tag" --name "$CLUSTER"
    done
}

install_nvila() {
    say "NVILA $VERSION"
    namespace "$NAMESPACE"
    local s3_key
    s3_key=$(password S3_KEY)
    if [ -z "$DRY_RUN" ] && kubectl --context "kind-$CLUSTER" -n "$NAMESPACE" get secret nvila-s3 >/dev/null 2>&1; then
        s3_key=$(kubectl --context "kind-$CLUSTER" -n "$NAMESPACE" get secret nvila-s3 \
            -o jsonpath='{.data.secret-key}' | base64 --decode)
    fi
    for namespace in "$NAMESPACE" "$PIPELINES"; do
        secret "$namespace" nvila-s3 --from-literal=access-key=nvila --from-literal=secret-key="$s3_key"
    done
    # As KServe's storage initializer reads it.
    secret "$NAMESPACE" nvila-storage --from-literal=AWS_ACCESS_KEY_ID=nvila --from-literal=AWS_SECRET_ACCESS_KEY="$s3_key"
    kube -n "$NAMESPACE" annotate --overwrite secret nvila-storage serving.kserve.io/s3-usehttps=0 \
        serving.kserve.io/s3-endpoint="nvila-platform-s3.$NAMESPACE:9000" serving.kserve.io/s3-region=us-east-1
    secret "$NAMESPACE" nvila-postgres \
        --from-literal=password="$(password PASSWORD)"
    chart nvila charts/nvila --namespace "$NAMESPACE" --values charts/nvila/values-laptop.yaml \
        --set nvila-platform.pipelines.namespace="$PIPELINES" \
        --set nvila-platform.pipelines.rbac.servingNamespace="$NAMESPACE"
    run helm --kube-context "kind-$CLUSTER" test nvila --namespace "$NAMESPACE"
}

up() {
    require docker kind kubectl helm
    make_cluster
    install_platforms
    load_images
    install_nvila
    say "ready. MLflow: kubectl -n $NAMESPACE port-forward service/nvila-platform-mlflow 5000:5000"
    say "Kubeflow Pipelines: kubectl -n $PIPELINES port-forward service/ml-pipeline-ui 8081:80"
}

PYTHON=${PYTHON:-.venv/bin/python}
case ${1:-} in
up) up ;;
e2e)
    up
    say "running the tiny lifecycle"
    export KUBECONFIG=${KUBECONFIG:-$HOME/.kube/config}
    run "$PYTHON" -m pytest --cluster -p no:cacheprovider tests/cluster
    ;;
down) run kind delete cluster --name "$CLUSTER" ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
