"""What is in a store on S3, for `garbage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError
from nvila_platform.artifacts import MANIFEST_NAME
from nvila_platform.garbage import Stored
from nvila_platform.s3_client import s3_errors
from nvila_platform.s3_store import S3Store

if TYPE_CHECKING:
    from minio.datatypes import Object

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class _Group:
    """Objects that go together."""

    size_bytes: int = 0
    used_at: datetime = _LONG_AGO
    keys: list[str] = field(default_factory=list)

    def add(self, item: Object) -> None:
        """Count an object."""
        self.size_bytes += item.size or 0
        self.used_at = max(self.used_at, item.last_modified or _LONG_AGO)


class S3Inventory:
    """Objects of an `S3Store`; all keys whose results have equal bytes are one thing.

    Args:
        store: The store.
    """

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._keys: dict[str, list[str]] = {}

    def stored(self) -> Iterator[Stored]:
        """Yield every directory by digest, what was set aside, and uploads that never ended."""
        contents, damaged = self._groups()
        for digest, group in contents.items():
            yield Stored(
                kind="artifact" if group.keys else "unfinished",
                name=f"content/{digest}",
                digest=digest if group.keys else "",
                size_bytes=group.size_bytes,
                used_at=group.used_at,
            )
        for name, group in damaged.items():
            yield Stored(kind="damaged", name=f"damaged/{name}", size_bytes=group.size_bytes, used_at=group.used_at)
        for name, upload, started in self._uploads():
            yield Stored(kind="upload", name=f"{name}?uploadId={upload}", size_bytes=0, used_at=started)

    def inputs(self, digest: str) -> Mapping[str, str]:
        """Return digests of what an artifact was made of, by name."""
        found: dict[str, str] = {}
        for place in self._keys.get(digest, []):
            step, _, key = place.partition("/")
            manifest = self._store._manifest(step, key)
            if manifest is not None:
                found |= {f"{place}/{name}": value for name, value in manifest.inputs.items()}
        return found

    def remove(self, one: Stored, before: datetime) -> bool:
        """Remove objects, manifests first, so that a crash in the middle leaves nothing that can be found."""
        store = self._store
        with s3_errors(one.name):
            if one.kind == "upload":
                name, _, upload = one.name.partition("?uploadId=")
                store.client._abort_multipart_upload(store.bucket, name, upload)
                return True
            items = list(store._list(store._name(f"{one.name}/")))
            digest = one.name.removeprefix("content/")
            markers = list(store._list(store._name(f"digests/{digest}/"))) if one.kind != "damaged" else []
            if any((item.last_modified or _LONG_AGO) >= before for item in (*items, *markers)):
                return False
            places = [self._tail(item, f"digests/{digest}/") for item in markers]
            names = [store._name(f"{place}/{MANIFEST_NAME}") for place in places]
            for name in (*names, *(item.object_name or "" for item in (*markers, *items))):
                store.client.remove_object(bucket_name=store.bucket, object_name=name)
        return True

    def _groups(self) -> tuple[dict[str, _Group], dict[str, _Group]]:
        contents: dict[str, _Group] = {}
        damaged: dict[str, _Group] = {}
        self._keys = {}
        store = self._store
        with s3_errors(store._uri(store.prefix)):
            for item in store._list(store._name("content/")):
                digest = self._tail(item, "content/").partition("/")[0]
                contents.setdefault(digest, _Group()).add(item)
            for item in store._list(store._name("digests/")):
                digest, _, place = self._tail(item, "digests/").partition("/")
                group = contents.setdefault(digest, _Group())
                group.add(item)
                if self._is_finished(place):
                    group.keys.append(place)
            for item in store._list(store._name("damaged/")):
                damaged.setdefault(self._tail(item, "damaged/").partition("/")[0], _Group()).add(item)
        self._keys = {digest: group.keys for digest, group in contents.items()}
        return contents, damaged

    def _is_finished(self, place: str) -> bool:
        step, _, key = place.partition("/")
        try:
            return self._store.lookup(step, key) is not None
        except ArtifactError:
            return False

    def _uploads(self) -> Iterator[tuple[str, str, datetime]]:
        store = self._store
        key_marker = upload_marker = None
        with s3_errors(store._uri(store.prefix)):
            while True:
                page = store.client._list_multipart_uploads(
                    store.bucket,
                    prefix=store._name("content/"),
                    key_marker=key_marker,
                    upload_id_marker=upload_marker,
                )
                for upload in page.uploads:
                    yield upload.object_name, upload.upload_id or "", upload.initiated_time or _LONG_AGO
                key_marker, upload_marker = page.next_key_marker, page.next_upload_id_marker
                if not page.is_truncated or not key_marker:
                    return

    def _tail(self, item: Object, folder: str) -> str:
        return (item.object_name or "").removeprefix(self._store._name(folder))
