"""DAGs and their versions: what the dag-processor publishes, what the scheduler and the run creator read.

A version is one structure (by hash); a DAG row points at its current version and at the bundle new runs are pinned to.
A structure seen before gets its old version back. Locks: the `dag` row comes first in the order dag -> run -> task
instance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from typing import Any, Final

from sqlalchemy import Connection, text

from dflow.core import serialization
from dflow.core.errors import NotFoundError
from dflow.core.spec import DagSpec
from dflow.core.timetable import DueRun
from dflow.store.rows import all_rows, columns, did_you_mean, first_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Dag:
    """One row of `dag`. ``next_run_after`` None: no run is due, ever, by what is known now."""

    dag_id: str
    bundle_name: str
    path: str
    is_active: bool
    is_paused: bool
    version_id: int | None
    bundle_hash: str | None
    description: str | None
    tags: list[str]
    owners: list[str]
    schedule_summary: str
    max_active_runs: int
    next_logical_date: datetime | None
    next_interval_start: datetime | None
    next_interval_end: datetime | None
    next_run_after: datetime | None
    parsed_at: datetime
    created_at: datetime
    team: str | None

    @property
    def next_run(self) -> DueRun | None:
        """The run that is due next, as the timetable knows it."""
        if self.next_run_after is None:
            return None
        return DueRun(
            logical_date=self.next_logical_date or self.next_run_after,
            interval_start=self.next_interval_start or self.next_run_after,
            interval_end=self.next_interval_end or self.next_run_after,
            run_after=self.next_run_after,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DagVersion:
    """One row of `dag_version`, without its spec."""

    id: int
    dag_id: str
    number: int
    structure_hash: str
    bundle_hash: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Upserted:
    """What `upsert` did. ``is_schedule_changed``: the caller must work out the next run and call `set_next_run`."""

    version_id: int
    number: int
    is_new_dag: bool
    is_new_version: bool
    is_schedule_changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DagCode:
    """The source of one file, kept for display (`core.store_dag_code`)."""

    dag_version_id: int
    sha256: str
    path: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """What a new run of a DAG is made of: its current version and the code it is pinned to."""

    dag_id: str
    is_active: bool
    path: str
    bundle_hash: str
    version_id: int
    spec: DagSpec


def upsert(
    tx: Connection, spec: DagSpec, *, bundle_name: str, path: str, bundle_hash: str, paused_default: bool
) -> Upserted:
    """Make ``spec`` the current version of its DAG and ``bundle_hash`` the code of its new runs; activate the DAG.

    ``paused_default`` applies to a DAG seen for the first time whose spec does not say itself. Locks the dag row until
    the end of the transaction. Costs four statements.
    """
    structure_hash = serialization.structure_hash(spec)
    is_paused = paused_default if spec.is_paused_upon_creation is None else spec.is_paused_upon_creation
    first = {"dag_id": spec.dag_id, "bundle_name": bundle_name, "path": path, "is_paused": is_paused}
    is_new_dag = tx.execute(_INSERT_DAG, first).first() is not None
    before = tx.execute(_LOCK_DAG, {"dag_id": spec.dag_id}).one()
    version = tx.execute(
        _UPSERT_VERSION,
        {
            "dag_id": spec.dag_id,
            "structure_hash": structure_hash,
            "spec": serialization.canonical(serialization.to_json(spec)),
            "bundle_hash": bundle_hash,
        },
    ).one()
    tx.execute(
        _UPDATE_DAG,
        {
            "dag_id": spec.dag_id,
            "bundle_name": bundle_name,
            "path": path,
            "version_id": version.id,
            "bundle_hash": bundle_hash,
            "description": spec.description,
            "tags": sorted(spec.tags),
            "owners": sorted({task.owner for task in spec.tasks}),
            "schedule_summary": spec.schedule.summary,
            "max_active_runs": spec.max_active_runs,
        },
    )
    return Upserted(
        version_id=version.id,
        number=version.number,
        is_new_dag=is_new_dag,
        is_new_version=version.is_new,
        is_schedule_changed=is_new_dag
        or not before.is_active
        or (before.version_id != version.id and _times(before.spec) != _times(spec)),
    )


def deactivate_missing(tx: Connection, *, bundle_name: str, paths: Sequence[str]) -> list[str]:
    """Deactivate the DAGs of a bundle whose file is not among ``paths`` and return their ids.

    Their queued runs stay queued; running ones end with the code they have. Locks the rows it changes.
    """
    rows = tx.execute(_DEACTIVATE_MISSING, {"bundle_name": bundle_name, "paths": list(paths)})
    return sorted(rows.scalars())


def deactivate_others_in_file(tx: Connection, *, bundle_name: str, path: str, keep: Sequence[str]) -> list[str]:
    """Deactivate the DAGs a file no longer defines (all but ``keep``) and return their ids."""
    rows = tx.execute(_DEACTIVATE_OTHERS, {"bundle_name": bundle_name, "path": path, "keep": list(keep)})
    return sorted(rows.scalars())


def set_bundle_hash(tx: Connection, *, bundle_name: str, bundle_hash: str, except_paths: Sequence[str] = ()) -> int:
    """Pin new runs of the active DAGs of a bundle to ``bundle_hash``; return how many DAGs changed.

    A file of a bundle may import any other, so a new bundle is new code for every DAG of it. ``except_paths`` are files
    that do not work in it: their DAGs keep the code they last worked with. Locks the changed rows in the order of their
    ids.
    """
    values = {"bundle_name": bundle_name, "bundle_hash": bundle_hash, "except_paths": list(except_paths)}
    return tx.execute(_SET_BUNDLE_HASH, values).rowcount


def locations(tx: Connection, dag_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return ``{dag_id: (bundle_name, path)}`` of those that are active; two files must not define the same DAG."""
    rows = tx.execute(_LOCATIONS, {"dag_ids": list(dag_ids)})
    return {row.dag_id: (row.bundle_name, row.path) for row in rows}


def get(tx: Connection, dag_id: str) -> Dag:
    """Return one DAG, active or not. Raises NotFoundError, with the nearest name. Locks nothing."""
    dag = first_row(Dag, tx.execute(_GET, {"dag_id": dag_id}))
    if dag is None:
        raise not_found(tx, dag_id)
    return dag


def list_(tx: Connection, *, active_only: bool = True, tag: str | None = None) -> list[Dag]:
    """Return DAGs by id. Reads the whole, small table."""
    return all_rows(Dag, tx.execute(_LIST, {"active_only": active_only, "tag": tag}))


def set_paused(tx: Connection, dag_ids: Sequence[str], paused: bool) -> list[str]:
    """Pause or unpause DAGs; return the ids that changed. Raises NotFoundError for an unknown one.

    Locks the rows in the order of their ids. Running runs of a paused DAG start no further tasks; nothing is killed.
    """
    known = {row.dag_id: row.is_paused for row in tx.execute(_LOCK_MANY, {"dag_ids": list(dag_ids)})}
    for dag_id in dag_ids:
        if dag_id not in known:
            raise not_found(tx, dag_id)
    changed = sorted(dag_id for dag_id, is_paused in known.items() if is_paused != paused)
    tx.execute(_SET_PAUSED, {"dag_ids": changed, "paused": paused})
    return changed


def lock_due(tx: Connection, limit: int) -> list[Dag]:
    """Return active, unpaused DAGs with a due run, longest due first, and lock their rows (SKIP LOCKED).

    Costs one scan of the partial index `dag_due` up to now: nothing when nothing is due.
    """
    return all_rows(Dag, tx.execute(_LOCK_DUE, {"limit": limit}))


def set_next_run(tx: Connection, dag_id: str, due: DueRun | None) -> None:
    """Store when the next run of a DAG is due (None: never). The caller holds the dag row's lock or takes it here."""
    set_next_runs(tx, {dag_id: due})


def set_next_runs(tx: Connection, due: Mapping[str, DueRun | None]) -> None:
    """Store the next runs of many DAGs in one statement."""
    dag_ids = sorted(due)
    runs = [due[dag_id] for dag_id in dag_ids]
    tx.execute(
        _SET_NEXT_RUNS,
        {
            "dag_ids": dag_ids,
            "logical_dates": [run and run.logical_date for run in runs],
            "interval_starts": [run and run.interval_start for run in runs],
            "interval_ends": [run and run.interval_end for run in runs],
            "run_afters": [run and run.run_after for run in runs],
        },
    )


def get_spec(tx: Connection, dag_version_id: int) -> DagSpec:
    """Return the spec of a version. Raises NotFoundError. Costs one index probe once this process has seen it."""
    row = tx.execute(_VERSION_KEY, {"id": dag_version_id}).first()
    if row is None:
        raise NotFoundError(f"There is no DAG version with the id {dag_version_id}.")
    return _spec(tx, dag_version_id, row.dag_id, row.structure_hash)


def current(tx: Connection, dag_id: str) -> Current:
    """Return what a new run of the DAG is made of. Raises NotFoundError. Locks nothing."""
    row = tx.execute(_CURRENT, {"dag_id": dag_id}).first()
    if row is None:
        raise not_found(tx, dag_id)
    return Current(
        dag_id=row.dag_id,
        is_active=row.is_active,
        path=row.path,
        bundle_hash=row.bundle_hash,
        version_id=row.version_id,
        spec=_spec(tx, row.version_id, row.dag_id, row.structure_hash),
    )


def versions(tx: Connection, dag_id: str) -> list[DagVersion]:
    """Return the versions of a DAG, newest first."""
    return all_rows(DagVersion, tx.execute(_VERSIONS, {"dag_id": dag_id}))


def put_code(tx: Connection, version_id: int, path: str, sha256: str, source: str) -> None:
    """Keep the source of a version's file for display; the same source twice is one row."""
    tx.execute(_PUT_CODE, {"version_id": version_id, "path": path, "sha256": sha256, "source": source})


def get_code(tx: Connection, version_id: int) -> DagCode | None:
    """Return the source kept for a version, or None when none was (`core.store_dag_code`).

    A version may have several: files change without changing the structure. The one parsed last is preferred.
    """
    return first_row(DagCode, tx.execute(_GET_CODE, {"version_id": version_id}))


def not_found(tx: Connection, dag_id: str) -> NotFoundError:
    """Return the error for a DAG that does not exist, with the nearest known id."""
    hint = did_you_mean(dag_id, tx.execute(_ALL_IDS).scalars())
    return NotFoundError(
        f"There is no DAG {dag_id!r}.{hint} `dflow dags list` shows all, `dflow dags list-import-errors` what could "
        "not be read."
    )


_CACHED_SPECS: Final = 512
_specs: OrderedDict[tuple[str, str], DagSpec] = OrderedDict()
_specs_lock = Lock()


def _spec(tx: Connection, version_id: int, dag_id: str, structure_hash: str) -> DagSpec:
    """Return a spec, cached by content: the hash makes a cached one right whatever database it came from."""
    key = (dag_id, structure_hash)
    with _specs_lock:
        if key in _specs:
            _specs.move_to_end(key)
            return _specs[key]
    spec = serialization.from_json(tx.execute(_SPEC, {"id": version_id}).scalar_one())
    with _specs_lock:
        _specs[key] = spec
        while len(_specs) > _CACHED_SPECS:
            _specs.popitem(last=False)
    return spec


def _times(spec: DagSpec | Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """Return the parts of a spec that decide when runs are due."""
    if spec is None:
        return None
    known = spec if isinstance(spec, DagSpec) else serialization.from_json(spec)
    return known.schedule, known.start_date, known.end_date, known.catchup


_COLUMNS = columns(
    "dag_id bundle_name path is_active is_paused version_id bundle_hash description tags owners schedule_summary "
    "max_active_runs next_logical_date next_interval_start next_interval_end next_run_after parsed_at created_at team",
    "d",
)

_INSERT_DAG = text("""
    INSERT INTO dag (dag_id, bundle_name, path, is_paused) VALUES (:dag_id, :bundle_name, :path, :is_paused)
    ON CONFLICT (dag_id) DO NOTHING RETURNING dag_id""")

_LOCK_DAG = text("""
    SELECT d.is_active, d.version_id, v.spec FROM dag d LEFT JOIN dag_version v ON v.id = d.version_id
    WHERE d.dag_id = :dag_id FOR NO KEY UPDATE OF d""")

# The dag row's lock makes max(number) + 1 safe.
_UPSERT_VERSION = text("""
    WITH inserted AS (
        INSERT INTO dag_version (dag_id, number, structure_hash, spec, bundle_hash)
        SELECT :dag_id, coalesce((SELECT max(number) FROM dag_version WHERE dag_id = :dag_id), 0) + 1,
               :structure_hash, CAST(:spec AS jsonb), :bundle_hash
        WHERE NOT EXISTS (SELECT 1 FROM dag_version WHERE dag_id = :dag_id AND structure_hash = :structure_hash)
        RETURNING id, number, true AS is_new)
    SELECT id, number, is_new FROM inserted
    UNION ALL
    SELECT id, number, false FROM dag_version WHERE dag_id = :dag_id AND structure_hash = :structure_hash""")

_UPDATE_DAG = text("""
    UPDATE dag SET bundle_name = :bundle_name, path = :path, is_active = true, version_id = :version_id,
        bundle_hash = :bundle_hash, description = :description, tags = CAST(:tags AS text[]),
        owners = CAST(:owners AS text[]), schedule_summary = :schedule_summary, max_active_runs = :max_active_runs,
        parsed_at = now()
    WHERE dag_id = :dag_id""")

_DEACTIVATE_MISSING = text("""
    UPDATE dag SET is_active = false
    WHERE is_active AND bundle_name = :bundle_name AND path <> ALL(CAST(:paths AS text[])) RETURNING dag_id""")

_DEACTIVATE_OTHERS = text("""
    UPDATE dag SET is_active = false
    WHERE is_active AND bundle_name = :bundle_name AND path = :path AND dag_id <> ALL(CAST(:keep AS text[]))
    RETURNING dag_id""")

_SET_BUNDLE_HASH = text("""
    WITH locked AS (
        SELECT dag_id FROM dag
        WHERE is_active AND bundle_name = :bundle_name AND bundle_hash IS DISTINCT FROM :bundle_hash
            AND path <> ALL(CAST(:except_paths AS text[]))
        ORDER BY dag_id FOR NO KEY UPDATE)
    UPDATE dag d SET bundle_hash = :bundle_hash FROM locked WHERE d.dag_id = locked.dag_id""")

_LOCATIONS = text("""
    SELECT dag_id, bundle_name, path FROM dag WHERE is_active AND dag_id = ANY(CAST(:dag_ids AS text[]))""")

_GET = text(f"SELECT {_COLUMNS} FROM dag d WHERE d.dag_id = :dag_id")

_LIST = text(f"""
    SELECT {_COLUMNS} FROM dag d
    WHERE (d.is_active OR NOT :active_only) AND (CAST(:tag AS text) IS NULL OR :tag = ANY(d.tags))
    ORDER BY d.dag_id""")

_ALL_IDS = text("SELECT dag_id FROM dag")

_LOCK_MANY = text("""
    SELECT dag_id, is_paused FROM dag WHERE dag_id = ANY(CAST(:dag_ids AS text[]))
    ORDER BY dag_id FOR NO KEY UPDATE""")

_SET_PAUSED = text("UPDATE dag SET is_paused = :paused WHERE dag_id = ANY(CAST(:dag_ids AS text[]))")

_LOCK_DUE = text(f"""
    SELECT {_COLUMNS} FROM dag d
    WHERE d.is_active AND NOT d.is_paused AND d.next_run_after IS NOT NULL AND d.next_run_after <= now()
    ORDER BY d.next_run_after LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")

_SET_NEXT_RUNS = text("""
    UPDATE dag d SET next_logical_date = n.logical_date, next_interval_start = n.interval_start,
        next_interval_end = n.interval_end, next_run_after = n.run_after
    FROM unnest(CAST(:dag_ids AS text[]), CAST(:logical_dates AS timestamptz[]),
                CAST(:interval_starts AS timestamptz[]), CAST(:interval_ends AS timestamptz[]),
                CAST(:run_afters AS timestamptz[])) AS n(dag_id, logical_date, interval_start, interval_end, run_after)
    WHERE d.dag_id = n.dag_id""")

_VERSION_KEY = text("SELECT dag_id, structure_hash FROM dag_version WHERE id = :id")
_SPEC = text("SELECT spec FROM dag_version WHERE id = :id")

_CURRENT = text("""
    SELECT d.dag_id, d.is_active, d.path, d.bundle_hash, d.version_id, v.structure_hash
    FROM dag d JOIN dag_version v ON v.id = d.version_id WHERE d.dag_id = :dag_id""")

_VERSIONS = text("""
    SELECT id, dag_id, number, structure_hash, bundle_hash, created_at FROM dag_version
    WHERE dag_id = :dag_id ORDER BY number DESC""")

_PUT_CODE = text("""
    INSERT INTO dag_code (dag_version_id, sha256, path, source) VALUES (:version_id, :sha256, :path, :source)
    ON CONFLICT DO NOTHING""")

_GET_CODE = text("""
    SELECT c.dag_version_id, c.sha256, c.path, c.source FROM dag_code c WHERE c.dag_version_id = :version_id
    ORDER BY EXISTS (SELECT 1 FROM dag_file f WHERE f.path = c.path AND f.sha256 = c.sha256) DESC, c.sha256
    LIMIT 1""")
