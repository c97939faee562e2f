"""Bundles: the code of a DAG folder, content-addressed.

A file is one blob by the sha256 of its content; a bundle is a manifest of paths and blobs, named by a hash over it.
Same source, same hash; a change of one file in a thousand adds one blob and one manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from dflow.core.errors import ConflictError, NotFoundError
from dflow.store.rows import all_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One row of `bundle`, without its manifest."""

    hash: str
    name: str
    created_at: datetime


def hash_of(files: Mapping[str, str]) -> str:
    """Return the hash of a bundle with these files (``{path: sha256}``): sha256 over the sorted pairs as JSON."""
    pairs = json.dumps(sorted(files.items()), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(pairs.encode()).hexdigest()


def missing_blobs(tx: Connection, shas: Iterable[str]) -> set[str]:
    """Return which of the blobs are not stored yet. One index probe each."""
    return set(tx.execute(_MISSING, {"shas": sorted(set(shas))}).scalars())


def put_blobs(tx: Connection, contents: Mapping[str, bytes]) -> None:
    """Store blobs (``{sha256: content}``); those that exist are left alone. Raises ConflictError for a wrong sha256."""
    for sha256, content in contents.items():
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConflictError(f"The content given for blob {sha256} has another sha256; read the file again.")
    shas = sorted(contents)  # in one order, so that two processors storing the same blobs never wait for each other
    tx.execute(_PUT_BLOBS, {"shas": shas, "contents": [contents[sha] for sha in shas]})


def put_bundle(tx: Connection, name: str, files: Mapping[str, str]) -> str:
    """Store a bundle of files whose blobs are stored already and return its hash; the same files twice are one bundle.

    Raises NotFoundError when a blob is missing: a bundle that exists can always be fetched.
    """
    if missing := missing_blobs(tx, files.values()):
        paths = sorted(path for path, sha256 in files.items() if sha256 in missing)
        raise NotFoundError(f"The content of {', '.join(paths[:5])} is not stored; store the blobs first.")
    bundle_hash = hash_of(files)
    tx.execute(_PUT_BUNDLE, {"hash": bundle_hash, "name": name, "manifest": json.dumps({"files": dict(files)})})
    return bundle_hash


def manifest(tx: Connection, bundle_hash: str) -> dict[str, str]:
    """Return the files of a bundle, ``{path: sha256}``. Raises NotFoundError."""
    row = tx.execute(_MANIFEST, {"hash": bundle_hash}).first()
    if row is None:
        raise NotFoundError(f"There is no bundle {bundle_hash} in the database.")
    files: dict[str, str] = row.manifest["files"]
    return files


def blobs(tx: Connection, shas: Iterable[str]) -> dict[str, bytes]:
    """Return the contents of blobs by sha256; unknown ones are absent. The answer is as large as the blobs are."""
    return {row.sha256: bytes(row.content) for row in tx.execute(_BLOBS, {"shas": sorted(set(shas))})}


def list_(tx: Connection, limit: int = 50) -> list[Bundle]:
    """Return the newest bundles."""
    return all_rows(Bundle, tx.execute(_LIST, {"limit": limit}))


_MISSING = text("""
    SELECT wanted.sha256 FROM unnest(CAST(:shas AS text[])) AS wanted(sha256)
    WHERE NOT EXISTS (SELECT 1 FROM code_blob b WHERE b.sha256 = wanted.sha256)""")

_PUT_BLOBS = text("""
    INSERT INTO code_blob (sha256, content)
    SELECT * FROM unnest(CAST(:shas AS text[]), CAST(:contents AS bytea[])) ON CONFLICT DO NOTHING""")

_PUT_BUNDLE = text("""
    INSERT INTO bundle (hash, name, manifest) VALUES (:hash, :name, CAST(:manifest AS jsonb)) ON CONFLICT DO NOTHING""")

_MANIFEST = text("SELECT manifest FROM bundle WHERE hash = :hash")
_BLOBS = text("SELECT sha256, content FROM code_blob WHERE sha256 = ANY(CAST(:shas AS text[]))")
_LIST = text("SELECT hash, name, created_at FROM bundle ORDER BY created_at DESC, hash LIMIT :limit")
