"""Import errors: what is wrong with a DAG file now. The last good version of its DAGs stays live."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from dflow.store.rows import all_rows, storable


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportError_:
    """One row of `import_error`; ``path`` is relative to the bundle."""

    bundle_name: str
    path: str
    message: str
    traceback: str
    created_at: datetime


def set_(tx: Connection, *, bundle_name: str, path: str, message: str, traceback: str) -> None:
    """Record what is wrong with a file, in place of what was known. Locks the row."""
    tx.execute(
        _SET,
        {
            "bundle_name": bundle_name,
            "path": path,
            "message": storable(message),
            "traceback": storable(traceback),
        },
    )


def clear(tx: Connection, *, bundle_name: str, path: str) -> bool:
    """The file is good again; return whether there was an error."""
    return tx.execute(_CLEAR, {"bundle_name": bundle_name, "path": path}).rowcount > 0


def list_(tx: Connection, bundle_name: str | None = None) -> list[ImportError_]:
    """Return import errors by bundle and path."""
    return all_rows(ImportError_, tx.execute(_LIST, {"bundle_name": bundle_name}))


_SET = text("""
    INSERT INTO import_error (bundle_name, path, message, traceback) VALUES (:bundle_name, :path, :message, :traceback)
    ON CONFLICT (bundle_name, path) DO UPDATE SET message = excluded.message, traceback = excluded.traceback,
        created_at = now()""")

_CLEAR = text("DELETE FROM import_error WHERE bundle_name = :bundle_name AND path = :path")

_LIST = text("""
    SELECT bundle_name, path, message, traceback, created_at FROM import_error
    WHERE CAST(:bundle_name AS text) IS NULL OR bundle_name = :bundle_name ORDER BY bundle_name, path""")
