"""Look at a DAG folder: which files belong to its bundle, and what is in them.

A scan walks the folder and compares each file's size, times and inode with the previous scan; only files where one of
them differs are read and hashed. So a folder in which nothing happened costs one `stat` per file.

What belongs to the bundle: every regular file (modules, templates, SQL, CSV) up to `MAX_FILE_BYTES`, except hidden
ones, `__pycache__`, compiled Python, what `.dflowignore` names, and symbolic links that lead out of the folder. Links
that stay inside are followed, as Kubernetes mounts ConfigMaps in this way.

Promises: a hash is always the hash of bytes that were read in one piece from a file that did not change meanwhile, or
the file is read again in the next scan. A file that cannot be read keeps its last known hash and is reported in
``unreadable``. A file that is no module and changes all the time (somebody's log) keeps its hash until it is quiet, so
that it does not fill the database. A folder that cannot be read raises `FolderUnavailableError` and says nothing about
its files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dflow.core.errors import DflowError
from dflow.services import dflowignore

MAX_FILE_BYTES: Final = 10 * 1024 * 1024
_READ_ATTEMPTS: Final = 3
# A file written twice within one tick of the file system's clock has the same times both times (FAT: 2 s), so times
# as young as this prove nothing yet; git calls such entries racy.
_RACY_SECONDS: Final = 2.5
_RESTLESS_CHANGES: Final = 10
_QUIET_SECONDS: Final = 30.0
_IGNORED_NAMES: Final = frozenset({"__pycache__"})
_IGNORED_SUFFIXES: Final = (".pyc", ".pyo", "~")


class FolderUnavailableError(DflowError):
    """The folder does not exist or cannot be listed; a mount may be missing, so nothing is concluded from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a bundle as last seen. ``signature`` is None when it has to be read again in the next scan."""

    sha256: str
    size: int
    is_dag_candidate: bool  # its bytes speak of DAGs, see `mentions_dags`
    signature: tuple[int, ...] | None
    changed_at: float = 0.0  # when a scan found other content than the scan before, seconds since the epoch
    restless: int = 0  # how often that happened without a quiet time in between


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A folder at one moment. Paths are relative to the folder, with /."""

    root: Path
    identity: tuple[int, int]  # device and inode of the folder: differs when something else is mounted there
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)  # path -> why
    warnings: tuple[str, ...] = ()

    @property
    def manifest(self) -> dict[str, str]:
        """The bundle: path -> sha256."""
        return {path: entry.sha256 for path, entry in self.files.items()}


def scan(folder: Path, previous: Scan | None = None) -> Scan:
    """Walk ``folder`` and hash what changed since ``previous``."""
    try:
        root = folder.resolve(strict=True)
        info = root.stat()
        os.scandir(root).close()
    except OSError as error:
        raise FolderUnavailableError(f"the DAG folder {folder} cannot be read: {error.strerror or error}") from error
    known = previous.files if previous is not None and previous.root == root else {}
    walk = _Walk(root=root, known=known)
    files = dict(walk.run())
    return Scan(
        root=root,
        identity=(info.st_dev, info.st_ino),
        files={path: files[path] for path in sorted(files)},
        unreadable=walk.unreadable,
        warnings=tuple(walk.warnings),
    )


def read(root: Path, path: str, known: FileEntry | None = None) -> tuple[bytes, FileEntry]:
    """Return the content of a file as it is now, and its entry. Raises OSError."""
    content, signature = _read(root / path)
    sha256 = hashlib.sha256(content).hexdigest()
    changed_at, restless = time.time(), 0
    if known is not None:
        is_quiet = changed_at - known.changed_at > _QUIET_SECONDS
        restless = 0 if is_quiet else known.restless + (known.sha256 != sha256)
        changed_at = changed_at if known.sha256 != sha256 else known.changed_at
    entry = FileEntry(
        sha256=sha256,
        size=len(content),
        is_dag_candidate=path.endswith(".py") and mentions_dags(content),
        signature=signature,
        changed_at=changed_at,
        restless=restless,
    )
    return content, entry


def mentions_dags(content: bytes) -> bool:
    """Return whether a module may define DAGs: it speaks of "dag" and of "dflow" or "airflow" (Airflow's safe mode)."""
    lowered = content.lower()
    return b"dag" in lowered and (b"dflow" in lowered or b"airflow" in lowered)


class _Walk:
    """One walk over a folder; collects what is worth a warning on the way."""

    def __init__(self, *, root: Path, known: Mapping[str, FileEntry]) -> None:
        self._root, self._known = root, known
        self.unreadable: dict[str, str] = {}
        self.warnings: list[str] = []

    def run(self) -> Iterator[tuple[str, FileEntry]]:
        return self._directory(self._root, "", (), (self._root,))

    def _directory(
        self, directory: Path, relative: str, rules: tuple[dflowignore.Rule, ...], ancestors: tuple[Path, ...]
    ) -> Iterator[tuple[str, FileEntry]]:
        try:
            with os.scandir(directory) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            return  # removed since its parent was listed
        except OSError as error:
            yield from self._keep_all_below(relative, f"cannot be listed: {error.strerror or error}")
            return
        rules += self._rules_in(directory, relative)
        for child in children:
            path = f"{relative}/{child.name}" if relative else child.name
            if child.name.startswith(".") or child.name in _IGNORED_NAMES or child.name.endswith(_IGNORED_SUFFIXES):
                continue
            yield from self._child(directory / child.name, path, rules, ancestors)

    def _child(
        self, file: Path, path: str, rules: tuple[dflowignore.Rule, ...], ancestors: tuple[Path, ...]
    ) -> Iterator[tuple[str, FileEntry]]:
        try:
            info = file.lstat()
            if stat.S_ISLNK(info.st_mode):
                target = file.resolve(strict=True)
                if not target.is_relative_to(self._root):
                    self.warnings.append(f"{path} is left out: it is a link that leads out of the folder")
                    return
                info = file.stat()
        except FileNotFoundError:
            return  # removed meanwhile, or a dangling link
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            yield from self._keep(path, f"cannot be looked at: {error}")
            return
        is_directory = stat.S_ISDIR(info.st_mode)
        if dflowignore.is_ignored(rules, path, is_directory=is_directory):
            return
        if not _is_utf8(path):
            self.warnings.append(f"{path!r} is left out: rename it, its name is not UTF-8")
        elif is_directory:
            real = file.resolve()
            if real not in ancestors:  # a link to a directory above would never end
                yield from self._directory(file, path, rules, (*ancestors, real))
        elif stat.S_ISREG(info.st_mode):
            yield from self._file(file, path, info)

    def _file(self, file: Path, path: str, info: os.stat_result) -> Iterator[tuple[str, FileEntry]]:
        if info.st_size > MAX_FILE_BYTES:
            what = f"is left out of the bundle: {info.st_size:,} bytes, over the limit of {MAX_FILE_BYTES:,}"
            self.warnings.append(
                f"{path} {what}; keep data outside the DAG folder or name it in {dflowignore.FILE_NAME}"
            )
            if path.endswith(".py"):
                self.unreadable[path] = what
            return
        known = self._known.get(path)
        if known is not None and known.signature == _signature(info):
            yield path, known
            return
        if known is not None and _is_restless(path, known, info):
            self.warnings.append(
                f"{path} changes all the time; what is stored stays as it was until it has not changed for "
                f"{_QUIET_SECONDS:g} s. Keep data outside the DAG folder or name it in {dflowignore.FILE_NAME}"
            )
            yield path, known
            return
        try:
            _, entry = read(self._root, path, known)
        except FileNotFoundError:
            return
        except OSError as error:
            yield from self._keep(path, f"cannot be read: {error.strerror or error}")
            return
        yield path, entry

    def _rules_in(self, directory: Path, relative: str) -> tuple[dflowignore.Rule, ...]:
        try:
            text = (directory / dflowignore.FILE_NAME).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ()
        except OSError as error:
            self.warnings.append(f"{relative or '.'}/{dflowignore.FILE_NAME} cannot be read: {error.strerror or error}")
            return ()
        return dflowignore.parse(text, base=relative)

    def _keep(self, path: str, why: str) -> Iterator[tuple[str, FileEntry]]:
        """Report a file that cannot be read; what was known of it stays true."""
        self.unreadable[path] = why
        known = self._known.get(path)
        if known is not None:
            yield path, known

    def _keep_all_below(self, relative: str, why: str) -> Iterator[tuple[str, FileEntry]]:
        self.warnings.append(f"the directory {relative} {why}")
        self.unreadable[relative + "/"] = why
        for path, entry in self._known.items():
            if path.startswith(relative + "/"):
                yield path, entry


def _read(file: Path) -> tuple[bytes, tuple[int, ...] | None]:
    """Read a file in one piece; a file that changes under the reader is read again, and in the next scan once more."""
    content, signature = b"", None
    for _ in range(_READ_ATTEMPTS):
        # O_NONBLOCK: should the name have become a FIFO meanwhile, opening it must not wait for a writer.
        with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as handle:
            before = os.fstat(handle.fileno())
            content = handle.read(MAX_FILE_BYTES + 1)
            after = os.fstat(handle.fileno())
        if _signature(before) == _signature(after) and after.st_size == len(content):
            is_racy = time.time() - max(after.st_mtime, after.st_ctime) < _RACY_SECONDS
            signature = None if is_racy else _signature(after)
            break
    return content, signature


def _is_restless(path: str, known: FileEntry, info: os.stat_result) -> bool:
    """Has the file changed so often lately that its content is not looked at for now?"""
    is_young = time.time() - info.st_mtime < _QUIET_SECONDS
    return known.restless >= _RESTLESS_CHANGES and is_young and not path.endswith(".py")


def _signature(info: os.stat_result) -> tuple[int, ...]:
    # The change time too: `cp -p` and `rsync -t` can put the modification time back.
    return (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino, info.st_dev)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
