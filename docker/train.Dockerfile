# The image of the steps that compute: curate, train, tune, quantize, evaluate. CUDA comes with PyPI's torch.
#
#   docker build -f docker/train.Dockerfile -t nvila/train:0.1.0 --build-arg VERSION=0.1.0 .
#
# Without a GPU, a much smaller torch, tagged 0.1.0-cpu (scripts/images.py --cpu):
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# With Transformer Engine, whose PyTorch part is compiled against CUDA's headers while the image is built:
#   python scripts/images.py train --transformer-engine
# which gives BUILD_IMAGE, BASE_IMAGE and TRANSFORMER_ENGINE.

# Of 2026-11-26, as several public projects pin this tag; renewed by make pin-images.
ARG BASE_IMAGE=python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
ARG BUILD_IMAGE=${BASE_IMAGE}
# For Transformer Engine. Both of one distribution, so that the interpreter is the same.
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04@sha256:0230b7f243483cb15969fa3cc724a9459599604427052fc2a0d4291c7c0647dd
ARG CUDA_BASE_IMAGE=nvidia/cuda:13.0.3-cudnn-runtime-ubuntu24.04@sha256:14f6d08d1cd4a96effbfe3101d0b56326f552c199d05e4979ee0bd616df5811b

# ---- Dependencies alone. This stage does not see the source, so its large layer changes only with the pins.
FROM ${BUILD_IMAGE} AS dependencies
ARG EXTRAS=quickstart
ARG TRANSFORMER_ENGINE=""
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# CUDA's images have no Python; where there is one, this does nothing.
# hadolint ignore=DL3008
RUN python3 -m venv --help >/dev/null 2>&1 \
    || { apt-get update \
        && apt-get install --yes --no-install-recommends python3-dev python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# Empty packages are enough for pip to resolve the project's extras.
RUN mkdir -p model/nvila pipelines/nvila_pipelines platform/nvila_platform \
    && touch README.md LICENSE \
        model/nvila/__init__.py pipelines/nvila_pipelines/__init__.py platform/nvila_platform/__init__.py \
    && echo '__version__ = "0"' > model/nvila/_version.py \
    && python3 -m venv /opt/nvila \
    && /opt/nvila/bin/pip install --no-cache-dir ".[${EXTRAS}]" \
    && if [ -n "${TRANSFORMER_ENGINE}" ]; then \
        /opt/nvila/bin/pip install --no-cache-dir --no-build-isolation "${TRANSFORMER_ENGINE}"; \
    fi \
    && /opt/nvila/bin/pip uninstall --yes nvila

# ---- What is inside, package by package, for scanners.
FROM dependencies AS sbom
RUN python3 -m venv /opt/cyclonedx \
    && PIP_CONSTRAINT="" /opt/cyclonedx/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && mkdir /sbom \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-reproducible --output-file /sbom/nvila.cdx.json \
        /opt/nvila/bin/python

# ---- The project, as one wheel. Built by the pip of the stage above: a base image may have none of its own.
FROM dependencies AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY pipelines pipelines
COPY platform platform
RUN /opt/nvila/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# ---- What runs.
FROM ${BASE_IMAGE} AS runtime
ARG BASE_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nvila-train" \
      org.opencontainers.image.description="The steps of the NVILA pipelines that compute" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# DeepSpeed compiles its communication kernel at first use. The compiler's version is the base image's, so it is not
# pinned here a second time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ "$(command -v python3 >/dev/null && echo g++ || echo python3)" \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 nvila \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/nvila --shell /usr/sbin/nologin nvila
# Owned by root: a step cannot change the code of the next one.
COPY --from=dependencies --chown=0:0 /opt/nvila /opt/nvila
COPY --from=sbom --chown=0:0 /sbom /usr/share/sbom
COPY --from=wheel --chown=0:0 /wheel /wheel
RUN /opt/nvila/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
ENV PATH="/opt/nvila/bin:${PATH}" \
    HOME=/var/lib/nvila \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/nvila
USER 10001:10001
# Pipelines give every container its own command; by itself the image checks the machine it runs on.
CMD ["nvila", "doctor"]
