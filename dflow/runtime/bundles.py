"""The code a worker machine has fetched: one read-only folder for each bundle hash, complete or not there at all.

A folder appears by rename, so two agents may share the directory. Content is verified: each blob by its sha256 when it
is written, the whole folder by the bundle's own hash before this process first uses it, so damage on disk means
fetching anew. Nothing here is truth; the directory may be deleted at any time between attempts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dflow.core.errors import ConflictError, StoreUnavailableError
from dflow.settings import Settings
from dflow.store import bundles
from dflow.store.engine import Store

log = logging.getLogger(__name__)

_DRAFT: Final = ".draft-"
_CACHED: Final = "__pycache__"  # what Python leaves in a folder, where it may, is not part of the bundle
_READ_ONLY: Final = 0o555
_BLOBS_AT_ONCE: Final = 50
_RETRY_SECONDS: Final = 1.0


class BundleCache:
    """The folders under one directory. Not for several threads at once."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._verified: set[str] = set()

    def path(self, bundle_hash: str) -> Path | None:
        """Return the folder of a bundle when it is there and sound."""
        folder = self._folder(bundle_hash)
        if bundle_hash in self._verified:
            if folder.is_dir():
                return folder
            self._verified.discard(bundle_hash)
            return None
        if not folder.is_dir():
            return None
        if _hash_of_folder(folder) != bundle_hash:
            log.warning("the folder of bundle %s in the cache is damaged; fetching it anew", bundle_hash[:12])
            _remove(folder)
            return None
        self._verified.add(bundle_hash)
        os.utime(folder)
        return folder

    def put(self, bundle_hash: str, files: Mapping[str, str], read: Callable[[list[str]], Mapping[str, bytes]]) -> Path:
        """Materialise a bundle and return its folder. ``files`` maps paths to sha256; ``read`` gives blobs by sha256.

        Raises ConflictError for content that is not what its hash says, or for a path outside the folder.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        draft = self._directory / f"{_DRAFT}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        draft.mkdir(mode=0o755)
        try:
            self._write(draft, files, read)
            folder = self._folder(bundle_hash)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():  # another agent was quicker
                    raise
        finally:
            if draft.exists():
                _remove(draft)
        self._verified.add(bundle_hash)
        return folder

    def prune(self, in_use: Iterable[str]) -> None:
        """Remove the least recently fetched or first used folders beyond those to keep; never one in use."""
        try:
            entries = [entry for entry in self._directory.iterdir() if entry.is_dir()]
        except OSError:
            return
        kept = set(in_use)
        folders = sorted((one for one in entries if not one.name.startswith(_DRAFT)), key=_used_at, reverse=True)
        for folder in folders[self._keep :]:
            if folder.name not in kept:
                self._verified.discard(folder.name)
                _remove(folder)
        for draft in (one for one in entries if one.name.startswith(_DRAFT)):
            pid = draft.name.removeprefix(_DRAFT).partition("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                _remove(draft)

    def _folder(self, bundle_hash: str) -> Path:
        if not bundle_hash.isalnum():
            raise ConflictError(f"{bundle_hash!r} is no bundle hash")
        return self._directory / bundle_hash

    def _write(self, draft: Path, files: Mapping[str, str], read: Callable[[list[str]], Mapping[str, bytes]]) -> None:
        paths = sorted(files)
        for start in range(0, len(paths), _BLOBS_AT_ONCE):
            some = paths[start : start + _BLOBS_AT_ONCE]
            contents = read([files[path] for path in some])
            for path in some:
                _write_file(draft, path, files[path], contents.get(files[path]))
        for folder, _, _ in os.walk(draft, topdown=False):
            if folder != str(draft):
                os.chmod(folder, _READ_ONLY)
        os.chmod(draft, _READ_ONLY)


class BundleFetcher:
    """Fetches bundles in a thread of its own, one after the other, over a connection it opens only when it needs one.

    ``on_done(hash, folder, error)`` is called from that thread, once for every `fetch`.
    """

    def __init__(self, settings: Settings, on_done: Callable[[str, str | None, str | None], None]) -> None:
        self._settings = settings
        self._on_done = on_done
        self._wanted: queue.SimpleQueue[tuple[str, frozenset[str]]] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._cache = BundleCache(settings.worker.bundle_cache_dir, settings.worker.bundle_cache_keep)
        self._thread: threading.Thread | None = None

    def fetch(self, bundle_hash: str, in_use: Iterable[str]) -> None:
        """Fetch a bundle unless it is there; afterwards remove old ones but those in use."""
        self._wanted.put((bundle_hash, frozenset({bundle_hash, *in_use})))
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="dflow-bundles", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Give up waiting for a database that is away."""
        self._is_stopped.set()

    def _serve(self) -> None:
        while True:
            bundle_hash, in_use = self._wanted.get()
            try:
                folder = self._fetch(bundle_hash)
                self._on_done(bundle_hash, str(folder), None)
                self._cache.prune(in_use)
            except Exception as error:  # noqa: BLE001 whatever it is, the waiting tasks must hear of it
                log.warning("bundle %s could not be fetched: %s", bundle_hash[:12], error)
                self._on_done(bundle_hash, None, f"bundle {bundle_hash[:12]} could not be fetched: {error}")

    def _fetch(self, bundle_hash: str) -> Path:
        if (folder := self._cache.path(bundle_hash)) is not None:
            return folder
        while True:
            store = Store.from_settings(self._settings, "bundles", pool_size=1)
            try:
                with store.begin() as tx:
                    files = bundles.manifest(tx, bundle_hash)
                    return self._cache.put(bundle_hash, files, lambda shas: bundles.blobs(tx, shas))
            except StoreUnavailableError:
                if self._is_stopped.wait(_RETRY_SECONDS):
                    raise
            finally:
                store.close()


class Shelf:
    """Where the loop of an agent gets folders from: at once when they are known, else answered once they are fetched.

    ``fileno`` turns readable when there are answers; the loop then calls `deliver`.
    """

    def __init__(self, settings: Settings) -> None:
        self._folders: dict[str, str] = {}
        self._waiting: dict[str, list[Callable[[dict[str, Any]], None]]] = {}
        self._fetched: queue.SimpleQueue[tuple[str, str | None, str | None]] = queue.SimpleQueue()
        self._fetcher = BundleFetcher(settings, self._on_done)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._reader

    def folder(self, bundle_hash: str) -> str | None:
        """Return the folder of a bundle that was fetched before and is still there."""
        folder = self._folders.get(bundle_hash)
        if folder is not None and not os.path.isdir(folder):
            del self._folders[bundle_hash]
            return None
        return folder

    def ask(self, bundle_hash: str, in_use: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
        """Have a bundle fetched; ``answer`` is given ``{"path": ...}`` or ``{"error": ...}`` by `deliver`."""
        self._waiting.setdefault(bundle_hash, []).append(answer)
        self._fetcher.fetch(bundle_hash, in_use)

    def deliver(self) -> None:
        """Give the answers that are there."""
        os.read(self._reader, 4096)
        while not self._fetched.empty():
            bundle_hash, folder, error = self._fetched.get()
            if folder is not None:
                self._folders[bundle_hash] = folder
            for answer in self._waiting.pop(bundle_hash, []):
                answer({"error": error} if error else {"path": folder})

    def close(self) -> None:
        """Give up waiting for a database that is away."""
        self._fetcher.stop()

    def _on_done(self, bundle_hash: str, folder: str | None, error: str | None) -> None:
        """In the fetcher's thread."""
        self._fetched.put((bundle_hash, folder, error))
        os.write(self._writer, b"!")


def _write_file(root: Path, path: str, sha256: str, content: bytes | None) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ConflictError(f"the bundle names the path {path!r}, which is outside of it")
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise ConflictError(f"the content of {path} in the database is missing or has another sha256")
    target = root.joinpath(*pure.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(0o444)


def _hash_of_folder(folder: Path) -> str:
    files = {}
    for parent, directories, names in os.walk(folder):
        if _CACHED in directories:
            directories.remove(_CACHED)
        for name in names:
            file = Path(parent, name)
            files[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return bundles.hash_of(files)


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path) -> None:
    """Remove a read-only tree."""
    for parent, _, _ in os.walk(folder):
        try:
            os.chmod(parent, stat.S_IRWXU)
        except OSError:
            continue
    shutil.rmtree(folder, ignore_errors=True)
