"""The connection to an S3 service that the settings name, and what its failures mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError, CapabilityError, ConfigError, InfrastructureError, NvilaError, ResourceError
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from minio import Minio

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_CONNECTIONS = 16  # kept open
_REFUSED = frozenset({"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_MISSING = frozenset({"NoSuchKey", "NoSuchObject"})
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})


def connect(settings: Settings, where: str) -> Minio:
    """Return a client; nothing is sent yet.

    Args:
        settings: Name the service and the identity.
        where: What needs it, for messages.

    Raises:
        CapabilityError: The SDK is not installed.
        ConfigError: A setting is missing or is no address.
    """
    for name in ("s3_endpoint", "s3_access_key", "s3_secret_key"):
        if not getattr(settings, name):
            raise ConfigError(f"NVILA_{name.upper()} is not set, {where} needs it", "set the variable")
    try:
        import certifi
        import urllib3
        from minio import Minio
    except ImportError as e:
        raise CapabilityError(f"{where} needs the minio SDK", "pip install 'nvila[pipelines]'") from e
    http = urllib3.PoolManager(
        maxsize=_CONNECTIONS,
        timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S),
        retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        cert_reqs="CERT_REQUIRED",
        ca_certs=certifi.where(),
    )
    try:
        return Minio(
            endpoint=settings.s3_endpoint,
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key,
            secure=settings.s3_secure,
            http_client=http,
        )
    except ValueError as e:
        raise ConfigError(f"NVILA_S3_ENDPOINT={settings.s3_endpoint!r}: {e}", "use host:port") from e


@contextmanager
def s3_errors(
    where: str, *, missing: type[NvilaError] = ArtifactError, fix: str = "run the step again"
) -> Iterator[None]:
    """Turn what the SDK raises into errors of ours.

    Args:
        where: The address that is read or written.
        missing: Raised when the object is not there.
        fix: What to do then.
    """
    from minio.error import MinioException, S3Error
    from urllib3.exceptions import HTTPError

    try:
        yield
    except S3Error as e:
        if e.code in _REFUSED:
            rights = " and what this identity may do (read, list, write)" if e.code == "AccessDenied" else ""
            raise ConfigError(
                f"{where}: the S3 service refused: {e.code}",
                f"check NVILA_S3_ACCESS_KEY and NVILA_S3_SECRET_KEY{rights}",
            ) from e
        if e.code == "NoSuchBucket":
            raise ConfigError(f"{where}: no such bucket", "create the bucket or correct its name") from e
        if e.code in _MISSING:
            raise missing(f"{where}: the object is missing", fix) from e
        if e.code == "PreconditionFailed":
            raise missing(f"{where}: the object changed while it was read", fix) from e
        if e.code in _FULL:
            raise ResourceError(
                f"{where}: the S3 service has no space left", "free some there, then run it again"
            ) from e
        raise InfrastructureError(f"{where}: S3 error {e.code}", "try again later") from e
    except (MinioException, HTTPError) as e:
        raise InfrastructureError(
            f"{where}: the S3 service cannot be reached: {type(e).__name__}", "check NVILA_S3_ENDPOINT and the service"
        ) from e
