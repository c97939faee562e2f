"""Put the code of a DAG folder into the store and get back the exact copy that is parsed.

Only contents the store does not have are read and sent, in batches of bounded size: a change of one file in a
thousand stores one blob. What is parsed afterwards is written to disk from the store, so it is what every worker will
fetch, file for file, whatever happens to the folder meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dflow.runtime.bundles import BundleCache
from dflow.services import bundle_scan
from dflow.services.bundle_scan import Scan
from dflow.settings import Settings
from dflow.store import bundles
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

_BATCH_BYTES: Final = 8 * 1024 * 1024
_BATCH_FILES: Final = 200
_SNAPSHOTS_KEPT: Final = 4


class FolderChanged(Exception):
    """A file is no longer what the scan saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBundle:
    """A bundle as it is in the store."""

    hash: str
    manifest: Mapping[str, str]  # path -> sha256
    new_blobs: int


def store_bundle(store: Store, name: str, scan: Scan) -> StoredBundle:
    """Store the contents that are new, and the manifest. Raises FolderChanged when a file changed since the scan."""
    missing = store.run(lambda tx: bundles.missing_blobs(tx, scan.manifest.values()))
    # A file that cannot be read now and was never stored cannot be part of it.
    manifest = {p: sha for p, sha in scan.manifest.items() if p not in scan.unreadable or sha not in missing}
    missing.intersection_update(manifest.values())
    for batch in _batches(scan, missing):
        _put(store, batch)
    bundle_hash = store.run(lambda tx: bundles.put_bundle(tx, name, manifest))
    return StoredBundle(hash=bundle_hash, manifest=manifest, new_blobs=len(missing))


class Snapshots:
    """The copies on disk that files are parsed from, one folder for each bundle hash. One thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._store = store
        self._cache = BundleCache(settings.home / "parse-cache", _SNAPSHOTS_KEPT)
        self._current: dict[str, str] = {}  # bundle name -> hash

    def of(self, name: str, bundle_hash: str, manifest: Mapping[str, str]) -> Path:
        """Return the folder with exactly the files of a stored bundle; folders of older ones are removed."""
        folder = self._cache.path(bundle_hash) or self._cache.put(bundle_hash, manifest, self._read)
        if self._current.get(name) != bundle_hash:
            self._current[name] = bundle_hash
            self._cache.prune(self._current.values())
        return folder

    def _read(self, shas: list[str]) -> dict[str, bytes]:
        def read(tx: Tx) -> dict[str, bytes]:
            return bundles.blobs(tx, shas)

        return self._store.run(read)


def _put(store: Store, batch: Mapping[str, bytes]) -> None:
    store.run(lambda tx: bundles.put_blobs(tx, batch))


def _batches(scan: Scan, missing: set[str]) -> Iterator[dict[str, bytes]]:
    """Read the missing contents, each once, a bounded number of bytes at a time."""
    left = set(missing)
    batch: dict[str, bytes] = {}
    size = 0
    for path, entry in scan.files.items():
        if entry.sha256 not in left:
            continue
        if batch and (size + entry.size > _BATCH_BYTES or len(batch) >= _BATCH_FILES):
            yield batch
            batch, size = {}, 0
        content = bundle_scan.read_as(scan.root, path, entry.sha256)
        if content is None:
            raise FolderChanged(path)
        left.discard(entry.sha256)
        batch[entry.sha256] = content
        size += entry.size
    if batch:
        yield batch
