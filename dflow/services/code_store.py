"""Put the code of a DAG folder into the store and get back the exact copy that is parsed.

Only contents the store does not have are read and sent, in batches of bounded size: a change of one file in a
thousand stores one blob. What is parsed afterwards is written to disk from the store, so it is what every worker will
fetch, file for file, whatever happens to the folder meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dflow.runtime.bundles import BundleCache
from dflow.services import bundle_scan
from dflow.services.bundle_scan import FileEntry, Scan
from dflow.settings import Settings
from dflow.store import bundles
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

_BATCH_BYTES: Final = 8 * 1024 * 1024
_BATCH_FILES: Final = 200
_SNAPSHOTS_KEPT: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBundle:
    """A bundle as it is in the store, and the scan that describes it."""

    hash: str
    manifest: Mapping[str, str]  # path -> sha256
    scan: Scan
    new_blobs: int


def store_bundle(store: Store, name: str, scan: Scan) -> StoredBundle:
    """Store the contents that are new, and the manifest.

    A file that has changed since the scan is stored as it is now, and the scan is corrected; one that vanished or
    cannot be read any more is left out.
    """
    missing = store.run(lambda tx: bundles.missing_blobs(tx, scan.manifest.values()))
    files, unreadable = dict(scan.files), dict(scan.unreadable)
    for batch in _batches(scan, missing, files, unreadable):
        _put(store, batch)
    stored = replace(scan, files=files, unreadable=unreadable)
    bundle_hash = store.run(lambda tx: bundles.put_bundle(tx, name, stored.manifest))
    return StoredBundle(hash=bundle_hash, manifest=stored.manifest, scan=stored, new_blobs=len(missing))


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


def _batches(
    scan: Scan, missing: set[str], files: dict[str, FileEntry], unreadable: dict[str, str]
) -> Iterator[dict[str, bytes]]:
    """Read the missing contents, each once, a bounded number of bytes at a time; corrects what the scan saw."""
    read: set[str] = set()
    batch: dict[str, bytes] = {}
    size = 0
    for path, entry in scan.files.items():
        if entry.sha256 not in missing or entry.sha256 in read:
            continue
        if batch and (size + entry.size > _BATCH_BYTES or len(batch) >= _BATCH_FILES):
            yield batch
            batch, size = {}, 0
        try:
            content, files[path] = bundle_scan.read(scan.root, path, entry)
        except OSError as error:
            del files[path]
            if not isinstance(error, FileNotFoundError):
                unreadable[path] = f"cannot be read: {error.strerror or error}"
            continue
        read.add(files[path].sha256)
        batch[files[path].sha256] = content
        size += len(content)
    if batch:
        yield batch
