"""Ask MLflow whether it works and the S3 service whether the bucket is there, with the pipelines' own addresses."""

import os
import sys
import time
import urllib.request

from minio import Minio
from minio.error import S3Error
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

client = Minio(
    endpoint=os.environ["NVILA_S3_ENDPOINT"],
    access_key=os.environ["NVILA_S3_ACCESS_KEY"],
    secret_key=os.environ["NVILA_S3_SECRET_KEY"],
    secure=os.environ["NVILA_S3_SECURE"] == "true",
    http_client=PoolManager(timeout=Timeout(connect=5, read=20), retries=Retry(total=0)),
)
bucket, mlflow = os.environ["BUCKET"], os.environ["MLFLOW_URI"].rstrip("/")


def missing() -> list[str]:
    """Return what does not work, with the reason."""
    found = []
    try:
        if not client.bucket_exists(bucket_name=bucket):
            found.append(f"S3: no bucket {bucket}")
    except (S3Error, HTTPError, OSError) as error:
        found.append(f"S3: {error}")
    # Not only /health, which answers whatever the Host header says and whatever the database does.
    for path in ("/health", "/api/2.0/mlflow/experiments/search?max_results=1"):
        try:
            urllib.request.urlopen(mlflow + path, timeout=5).close()  # noqa: S310 - the chart names the address
        except OSError as error:
            found.append(f"MLflow {path}: {error}")
    return found


deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
while problems := missing():
    if time.monotonic() > deadline:
        sys.exit("; ".join(problems))
    time.sleep(1)
