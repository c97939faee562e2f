"""What of a bundle has to be parsed: pure, from what is in the folder and what is on record.

A file is parsed when its own bytes changed, or when something changed that it read while it was imported: modules of
the bundle, data files it opened, directories it listed. A file whose last parse failed is parsed again whenever
anything in the bundle changed, because what it lacked may be what was added. Files that do not speak of DAGs are not
parsed.

The dependencies of a file are kept as ``{path: fingerprint}``: the sha256 of a file, the fingerprint of a listing for
a directory ("conf/", "./" for the root), and "" for something that was not there. Under `MADE_WITH` is what else the
result depends on: the defaults of settings, the versions of dflow and Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

ROOT_LISTING: Final = "./"
ABSENT: Final = ""
MADE_WITH: Final = "//made-with"  # no path of a bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What was found when a file was last parsed."""

    sha256: str
    imports: Mapping[str, str] = field(default_factory=dict)  # path -> fingerprint
    dag_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsePlan:
    """What one pass has to do for one bundle; all sorted."""

    parse: tuple[str, ...]
    gone: tuple[str, ...]  # on record, but no longer a DAG file of the bundle


def plan_parsing(
    *,
    manifest: Mapping[str, str],
    candidates: Collection[str],
    records: Mapping[str, FileRecord],
    retry: Collection[str],
) -> ParsePlan:
    """Compare the folder with the record.

    :param manifest: path -> sha256 of every file of the bundle.
    :param candidates: those that may define DAGs.
    :param records: what was found by earlier passes, by path.
    :param retry: files to parse whether anything about them changed or not.
    """
    fingerprints = Fingerprints(manifest)
    parse = {
        path
        for path in candidates
        if path not in records or path in retry or not _is_current(path, manifest, records[path], fingerprints)
    }
    gone = set(records) - set(candidates)
    return ParsePlan(parse=tuple(sorted(parse)), gone=tuple(sorted(gone)))


class Fingerprints:
    """Fingerprints of files and directory listings of one bundle, each computed once."""

    def __init__(self, manifest: Mapping[str, str]) -> None:
        self._manifest = manifest
        self._listings: dict[str, set[str]] | None = None

    def of(self, path: str) -> str:
        """Return the fingerprint of a file, or of a directory's listing when ``path`` ends with /."""
        if not path.endswith("/"):
            return self._manifest.get(path, ABSENT)
        if self._listings is None:
            self._listings = _listings(self._manifest)
        names = self._listings.get(path)
        return ABSENT if names is None else hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()

    def of_all(self, paths: Iterable[str]) -> dict[str, str]:
        """Return path -> fingerprint, sorted by path."""
        return {path: self.of(path) for path in sorted(set(paths))}


def _is_current(path: str, manifest: Mapping[str, str], record: FileRecord, fingerprints: Fingerprints) -> bool:
    return record.sha256 == manifest[path] and all(
        fingerprints.of(dependency) == fingerprint
        for dependency, fingerprint in record.imports.items()
        if dependency != MADE_WITH
    )


def _listings(manifest: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the names in each directory of the bundle."""
    listings: dict[str, set[str]] = {ROOT_LISTING: set()}
    for path in manifest:
        parts = path.split("/")
        for depth, name in enumerate(parts):
            parent = "/".join(parts[:depth]) + "/" if depth else ROOT_LISTING
            listings.setdefault(parent, set()).add(name)
    return listings
