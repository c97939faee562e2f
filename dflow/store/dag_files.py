"""What the dag-processor remembers of each file of a bundle, so that it parses changed files only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from dflow.store.rows import all_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class DagFile:
    """One row of `dag_file`; ``imports`` are the other files of the bundle it imported, ``{path: sha256}``."""

    bundle_name: str
    path: str
    sha256: str
    imports: dict[str, str]
    dag_ids: list[str]
    parsed_at: datetime
    duration_seconds: float


def put(
    tx: Connection,
    *,
    bundle_name: str,
    path: str,
    sha256: str,
    imports: Mapping[str, str],
    dag_ids: Sequence[str],
    duration_seconds: float,
) -> None:
    """Record a parse (good or bad) of a file's content. Locks the row."""
    tx.execute(
        _PUT,
        {
            "bundle_name": bundle_name,
            "path": path,
            "sha256": sha256,
            "imports": json.dumps(dict(imports)),
            "dag_ids": list(dag_ids),
            "duration_seconds": duration_seconds,
        },
    )


def list_(tx: Connection, bundle_name: str) -> list[DagFile]:
    """Return the files of a bundle by path."""
    return all_rows(DagFile, tx.execute(_LIST, {"bundle_name": bundle_name}))


def mark(tx: Connection, bundle_name: str) -> str:
    """Return a text that differs when the files, errors or active DAGs of a bundle are not those of an earlier mark.

    For a dag-processor to see, for the price of one statement, that another one or a person changed something.
    """
    return str(tx.execute(_MARK, {"bundle_name": bundle_name}).scalar_one())


def forget_missing(tx: Connection, *, bundle_name: str, paths: Sequence[str]) -> list[str]:
    """Delete the files of a bundle that are not among ``paths``, with their import errors; return their paths."""
    return sorted(tx.execute(_FORGET, {"bundle_name": bundle_name, "paths": list(paths)}).scalars())


_PUT = text("""
    INSERT INTO dag_file (bundle_name, path, sha256, imports, dag_ids, parsed_at, duration_seconds)
    VALUES (:bundle_name, :path, :sha256, CAST(:imports AS jsonb), CAST(:dag_ids AS text[]), now(), :duration_seconds)
    ON CONFLICT (bundle_name, path) DO UPDATE SET sha256 = excluded.sha256, imports = excluded.imports,
        dag_ids = excluded.dag_ids, parsed_at = excluded.parsed_at, duration_seconds = excluded.duration_seconds""")

_LIST = text("""
    SELECT bundle_name, path, sha256, imports, dag_ids, parsed_at, duration_seconds FROM dag_file
    WHERE bundle_name = :bundle_name ORDER BY path""")

_MARK = text("""
    SELECT concat_ws(' ',
        (SELECT concat_ws(' ', count(*), max(parsed_at)) FROM dag_file WHERE bundle_name = :bundle_name),
        (SELECT concat_ws(' ', count(*), max(created_at)) FROM import_error WHERE bundle_name = :bundle_name),
        (SELECT count(*) FROM dag WHERE bundle_name = :bundle_name AND is_active))""")

_FORGET = text("""
    WITH errors AS (
        DELETE FROM import_error WHERE bundle_name = :bundle_name AND path <> ALL(CAST(:paths AS text[])))
    DELETE FROM dag_file WHERE bundle_name = :bundle_name AND path <> ALL(CAST(:paths AS text[])) RETURNING path""")
