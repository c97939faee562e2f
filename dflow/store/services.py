"""Services: which schedulers and dag-processors exist, and when each last finished a pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from dflow.store.rows import all_rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One row of `service`; ``ended_at`` is set when it left in good order."""

    id: str
    kind: str
    hostname: str
    pid: int
    health_url: str | None
    version: str
    started_at: datetime
    heartbeat_at: datetime
    ended_at: datetime | None
    info: dict[str, Any]


def register(
    tx: Connection,
    *,
    service_id: str,
    kind: str,
    hostname: str,
    pid: int,
    version: str,
    health_url: str | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Announce a service, with a first heartbeat; repeated, it updates the row. Locks the row."""
    tx.execute(
        _REGISTER,
        {
            "id": service_id,
            "kind": kind,
            "hostname": hostname,
            "pid": pid,
            "version": version,
            "health_url": health_url,
            "info": json.dumps(dict(info or {})),
        },
    )


def heartbeat(tx: Connection, service_id: str, info: Mapping[str, Any] | None = None) -> bool:
    """Record that a pass has finished; ``info`` (JSON) replaces what was there. Return False when there is no row.

    Locks the row.
    """
    document = None if info is None else json.dumps(dict(info))
    return tx.execute(_HEARTBEAT, {"id": service_id, "info": document}).first() is not None


def deregister(tx: Connection, service_id: str) -> None:
    """Record that a service left in good order."""
    tx.execute(_DEREGISTER, {"id": service_id})


def list_live(tx: Connection, kind: str | None = None, *, within_seconds: float = 30.0) -> list[Service]:
    """Return the services that have not left and whose heartbeat is younger than so many seconds, by kind and id.

    The order is the same for everybody who asks, so a scheduler's position in it can be its share of the runs.
    """
    return all_rows(Service, tx.execute(_LIST_LIVE, {"kind": kind, "within_seconds": within_seconds}))


def list_(tx: Connection, limit: int = 100) -> list[Service]:
    """Return services, newest first, the ended ones too."""
    return all_rows(Service, tx.execute(_LIST, {"limit": limit}))


def prune(tx: Connection, older_than_seconds: float) -> int:
    """Delete the rows of services without a heartbeat for so long; return how many."""
    return tx.execute(_PRUNE, {"older_than_seconds": older_than_seconds}).rowcount


_COLUMNS = columns("id::text kind hostname pid health_url version started_at heartbeat_at ended_at info", "s")

_REGISTER = text("""
    INSERT INTO service (id, kind, hostname, pid, health_url, version, info)
    VALUES (CAST(:id AS uuid), :kind, :hostname, :pid, :health_url, :version, CAST(:info AS jsonb))
    ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, hostname = excluded.hostname, pid = excluded.pid,
        health_url = excluded.health_url, version = excluded.version, info = excluded.info,
        heartbeat_at = now(), ended_at = NULL""")

_HEARTBEAT = text("""
    UPDATE service SET heartbeat_at = clock_timestamp(), info = coalesce(CAST(:info AS jsonb), info)
    WHERE id = CAST(:id AS uuid) RETURNING id""")

_DEREGISTER = text("UPDATE service SET ended_at = now() WHERE id = CAST(:id AS uuid) AND ended_at IS NULL")

_LIST_LIVE = text(f"""
    SELECT {_COLUMNS} FROM service s
    WHERE s.ended_at IS NULL AND s.heartbeat_at > clock_timestamp() - make_interval(secs => :within_seconds)
      AND (CAST(:kind AS text) IS NULL OR s.kind = :kind)
    ORDER BY s.kind, s.id""")

_LIST = text(f"SELECT {_COLUMNS} FROM service s ORDER BY s.started_at DESC, s.id LIMIT :limit")

_PRUNE = text("DELETE FROM service WHERE heartbeat_at < now() - make_interval(secs => :older_than_seconds)")
