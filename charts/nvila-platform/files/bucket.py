"""Make the bucket of the S3 service when it is missing; wait until the service answers."""

import os
import sys
import time

from minio import Minio
from minio.error import S3Error
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

HOPELESS = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")

client = Minio(
    endpoint=os.environ["NVILA_S3_ENDPOINT"],
    access_key=os.environ["NVILA_S3_ACCESS_KEY"],
    secret_key=os.environ["NVILA_S3_SECRET_KEY"],
    secure=os.environ["NVILA_S3_SECURE"] == "true",
    region=os.environ["REGION"],
    http_client=PoolManager(timeout=Timeout(connect=5, read=20), retries=Retry(total=0)),
)
bucket = os.environ["BUCKET"]
deadline, reason = time.monotonic() + float(os.environ["TIMEOUT_S"]), "no attempt"
while time.monotonic() < deadline:
    try:
        if client.bucket_exists(bucket_name=bucket):
            sys.exit(0)
        client.make_bucket(bucket_name=bucket)
        sys.exit(0)
    except S3Error as error:
        if error.code in HOPELESS:
            sys.exit(f"the S3 service refuses these credentials: {error.code}")
        reason = f"{error.code}: {error.message}"
    except (HTTPError, OSError) as error:
        reason = str(error)
    time.sleep(1)
sys.exit(f"no bucket {bucket} in time; last: {reason}")
