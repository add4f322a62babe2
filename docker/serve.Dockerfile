# The model server, as the ServingRuntime of charts/nvila-serving starts it.
#
#   docker build -f docker/serve.Dockerfile -t nvila/serve:0.1.0 --build-arg VERSION=0.1.0 .
#
# PyPI's torch for Linux brings CUDA along. For a small image without it, tagged 0.1.0-cpu (scripts/images.py --cpu):
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# Of 2026-11-26, as several public projects pin this tag; renewed by make pin-images.
ARG BASE_IMAGE=python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7

# ---- Dependencies alone. This stage does not see the source, so its large layer changes only with the pins.
FROM ${BASE_IMAGE} AS dependencies
ARG EXTRAS=serve
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# Empty packages are enough for pip to resolve the project's extras.
RUN mkdir -p model/nvila pipelines/nvila_pipelines platform/nvila_platform \
    && touch README.md LICENSE \
        model/nvila/__init__.py pipelines/nvila_pipelines/__init__.py platform/nvila_platform/__init__.py \
    && echo '__version__ = "0"' > model/nvila/_version.py \
    && python3 -m venv /opt/nvila \
    && /opt/nvila/bin/pip install --no-cache-dir ".[${EXTRAS}]" \
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
LABEL org.opencontainers.image.title="nvila-serve" \
      org.opencontainers.image.description="NVILA behind the OpenAI and Open Inference protocols" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
RUN groupadd --gid 10001 nvila \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin nvila
# Owned by root: the server cannot change its own code.
COPY --from=dependencies --chown=0:0 /opt/nvila /opt/nvila
COPY --from=sbom --chown=0:0 /sbom /usr/share/sbom
COPY --from=wheel --chown=0:0 /wheel /wheel
RUN /opt/nvila/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
ENV PATH="/opt/nvila/bin:${PATH}" \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8080
# For Docker and Compose; Kubernetes has the chart's probes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]
ENTRYPOINT ["nvila"]
CMD ["serve", "--model-dir", "/mnt/models", "--host", "0.0.0.0", "--port", "8080"]
