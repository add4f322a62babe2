"""Compile the pipeline of this image and upload it to Kubeflow Pipelines, as a version named by the package's."""

import os
import tempfile
from pathlib import Path

from kfp import Client
from kfp.client import ServiceAccountTokenVolumeCredentials

from nvila import __version__
from nvila_pipelines.compile import compile_graph

name = os.environ["PIPELINE_NAME"]
token = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
client = Client(
    host=os.environ["KFP_ENDPOINT"],
    # kfp looks into no variable for it.
    ssl_ca_cert=os.environ.get("SSL_CERT_FILE"),
    credentials=ServiceAccountTokenVolumeCredentials(path=token) if token else None,
)
with tempfile.TemporaryDirectory() as folder:
    package = str(compile_graph("lifecycle", Path(folder) / "lifecycle.yaml"))
    pipeline = client.get_pipeline_id(name)
    if pipeline is None:
        # Its first version bears the pipeline's name; the one below is what runs are compared by.
        pipeline = client.upload_pipeline(package, pipeline_name=name).pipeline_id
    versions = client.list_pipeline_versions(pipeline, page_size=100).pipeline_versions or []
    if any(version.display_name == __version__ for version in versions):
        print(f"{name} has version {__version__} already")
    else:
        client.upload_pipeline_version(package, __version__, pipeline_id=pipeline)
        print(f"uploaded version {__version__} of {name}")
