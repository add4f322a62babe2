# The MLflow server of charts/nvila-platform: MLflow's own image has neither the Postgres driver nor the S3 client.
#
#   docker build -f docker/mlflow.Dockerfile -t nvila/mlflow:0.1.0 --build-arg VERSION=0.1.0 .

# Of 2026-11-26, as several public projects pin this tag; renewed by make pin-images.
ARG BASE_IMAGE=python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7

FROM ${BASE_IMAGE} AS dependencies
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/mlflow \
    && /opt/mlflow/bin/pip install --no-cache-dir \
        mlflow==3.17.2 \
        boto3==1.44.8 \
        prometheus-flask-exporter==0.23.2 \
        psycopg2-binary==2.9.13

# ---- What is inside, package by package, for scanners.
FROM dependencies AS sbom
RUN python3 -m venv /opt/cyclonedx \
    && PIP_CONSTRAINT="" /opt/cyclonedx/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && mkdir /sbom \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-reproducible --output-file /sbom/mlflow.cdx.json \
        /opt/mlflow/bin/python

# ---- What runs.
FROM ${BASE_IMAGE} AS runtime
ARG BASE_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nvila-mlflow" \
      org.opencontainers.image.description="MLflow on Postgres and S3" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
RUN groupadd --gid 10001 nvila \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin nvila
# Owned by root: the server cannot change its own code.
COPY --from=dependencies --chown=0:0 /opt/mlflow /opt/mlflow
COPY --from=sbom --chown=0:0 /sbom /usr/share/sbom
ENV PATH="/opt/mlflow/bin:${PATH}" \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
# For Docker and Compose; Kubernetes has the chart's probes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow"]
CMD ["server", "--help"]
