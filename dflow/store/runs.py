"""DAG runs: creating them with all their task instances, starting, planning under a lock, cancelling, ending.

A run row is the unit the schedulers share by SKIP LOCKED; its ``version`` validates in-memory copies of its states.
Locks follow the one order dag -> run -> task instance, by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from dflow.core.errors import ConflictError, NotFoundError
from dflow.core.ids import run_id_for
from dflow.core.spec import TaskSpec
from dflow.core.states import RUN_TERMINAL, Reason, RunState, RunType, TaskState
from dflow.core.timetable import DueRun
from dflow.store import dags
from dflow.store.apply import Change, apply
from dflow.store.rows import all_rows, columns, did_you_mean, first_row, json_document


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of `dag_run`. ``id`` is what other tables call run_pk; ``run_id`` names it inside its DAG."""

    id: int
    dag_id: str
    run_id: str
    run_type: str
    state: str
    logical_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    run_after: datetime
    conf: dict[str, Any]
    dag_version_id: int
    bundle_hash: str
    path: str
    max_active_tasks: int
    version: int
    triggered_by: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    timeout_at: datetime | None
    timeout_seconds: float | None
    cancel_requested_at: datetime | None
    cancelled_by: str | None
    cause: str | None
    note: str | None

    @property
    def is_ended(self) -> bool:
        """Whether the run has ended, well or badly."""
        return self.state in RUN_TERMINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run to be created; instants are aware. ``run_id`` None: made of type and ``run_after``."""

    run_type: RunType
    run_after: datetime
    run_id: str | None = None
    logical_date: datetime | None = None
    data_interval_start: datetime | None = None
    data_interval_end: datetime | None = None
    conf: Mapping[str, Any] = field(default_factory=dict)
    triggered_by: str


class InboxRow(NamedTuple):
    """An end the scheduler has not accounted yet."""

    run_pk: int
    ti_id: int
    state: str


class ViewRow(NamedTuple):
    """The state of one task instance, as the planner needs it."""

    ti_id: int
    task_id: str
    map_index: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """Which runs a scheduler prefers: it is number ``index`` of ``count``.

    It takes its share (run_pk modulo count) at once, and the runs of the others only when their oldest unaccounted end
    is older than ``grace_seconds``. So each run's states stay in the memory of one scheduler, and one that is gone is
    made up for.
    """

    index: int = 0
    count: int = 1
    grace_seconds: float = 0.25


class Unfinished(NamedTuple):
    """A task instance of a run that is being stopped, locked; ``attempt_id`` is the fence for `apply`."""

    ti_id: int
    state: TaskState
    attempt_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """What `request_cancel` found. ``unstarted`` are to be skipped through `apply`; ``running`` ends by its agent."""

    run: Run
    unstarted: list[Unfinished]
    running: list[Unfinished]


def create(
    tx: Connection,
    *,
    dag_id: str,
    run_id: str | None,
    run_type: RunType,
    logical_date: datetime | None,
    data_interval_start: datetime | None,
    data_interval_end: datetime | None,
    run_after: datetime,
    conf: Mapping[str, Any] | None,
    triggered_by: str,
) -> Run:
    """Create a run in `queued` with all its task instances in `none`, from the DAG's current version and code.

    Raises NotFoundError (unknown DAG, nearest name), ConflictError (DAG not active, run id or logical date taken) and
    SerializationError (``conf`` is no JSON). A conflict leaves the transaction usable. Locks nothing; costs two
    statements.
    """
    new = NewRun(
        run_type=run_type,
        run_after=run_after,
        run_id=run_id,
        logical_date=logical_date,
        data_interval_start=data_interval_start,
        data_interval_end=data_interval_end,
        conf=conf or {},
        triggered_by=triggered_by,
    )
    created = create_many(tx, dag_id, [new])
    if not created:
        raise _taken(tx, dag_id, new)
    return created[0]


def create_many(tx: Connection, dag_id: str, new: Sequence[NewRun]) -> list[Run]:
    """Create runs of one DAG; those whose run id or logical date is taken are absent from the result.

    Raises NotFoundError and ConflictError as `create`, the latter for an inactive DAG only. Two statements for any
    number of runs and tasks.
    """
    if not new:
        return []
    dag = dags.current(tx, dag_id)
    if not dag.is_active:
        raise ConflictError(
            f"The DAG {dag_id!r} is not active: its file is gone from the DAG folder. Put the file back to run it."
        )
    rows = tx.execute(
        _CREATE,
        {
            "dag_id": dag_id,
            "version_id": dag.version_id,
            "bundle_hash": dag.bundle_hash,
            "path": dag.path,
            "max_active_tasks": dag.spec.max_active_tasks,
            "timeout_seconds": dag.spec.dagrun_timeout_seconds,
            **_run_arrays(new),
            **_task_arrays(dag.spec.tasks),
        },
    )
    return all_rows(Run, rows)


def start_queued(tx: Connection, limit: int) -> list[Run]:
    """Start due runs (`queued` -> `running`), oldest ``run_after`` first, within each DAG's ``max_active_runs``.

    Runs of paused or inactive DAGs stay queued, manual ones too (Airflow). The caller plans the returned runs in the
    same transaction, or nothing would. Locks the rows of the DAGs that have a due run and a free place (SKIP LOCKED),
    then starts what fits in a second statement: only a snapshot taken after the lock shows what another scheduler has
    just started. Costs one index probe for each DAG with queued runs, however many runs wait.
    """
    dag_ids = list(tx.execute(_LOCK_STARTABLE, {"limit": limit}).scalars())
    if not dag_ids:
        return []
    return all_rows(Run, tx.execute(_START, {"dag_ids": dag_ids, "limit": limit}))


def lock_for_planning(tx: Connection, limit: int, affinity: Affinity | None = None) -> list[Run]:
    """Lock (FOR NO KEY UPDATE SKIP LOCKED) and return the runs that have unaccounted ends, by id.

    A run whose row another scheduler holds is left to that one. Costs one scan of the inbox, which holds only what has
    happened since the last pass.
    """
    share = affinity or Affinity()
    parameters = {"limit": limit, "index": share.index, "count": share.count, "grace_seconds": share.grace_seconds}
    return all_rows(Run, tx.execute(_LOCK_FOR_PLANNING, parameters))


def lock(tx: Connection, run_pks: Iterable[int]) -> list[Run]:
    """Lock (FOR NO KEY UPDATE SKIP LOCKED) and return runs by id, for planning them for another reason than ends."""
    return all_rows(Run, tx.execute(_LOCK, {"run_pks": list(run_pks)}))


def take_inbox(tx: Connection, run_pks: Iterable[int]) -> list[InboxRow]:
    """Remove and return the unaccounted ends of runs the caller has locked, in the order they happened.

    Each end is returned to exactly one committed transaction. One DELETE by index.
    """
    return [InboxRow(*row) for row in tx.execute(_TAKE_INBOX, {"run_pks": list(run_pks)})]


def inbox_size(tx: Connection) -> int:
    """Return how many ends wait to be accounted. Scans the inbox."""
    return int(tx.execute(_INBOX_SIZE).scalar_one())


def load_view(tx: Connection, run_pk: int) -> list[ViewRow]:
    """Return the states of all task instances of a run, by id. One index range of the run's size."""
    return [ViewRow(*row) for row in tx.execute(_LOAD_VIEW, {"run_pk": run_pk})]


def bump_version(tx: Connection, run_pks: Iterable[int]) -> dict[int, int]:
    """Add one to the version of runs the caller has locked; return the new versions."""
    rows = tx.execute(_BUMP_VERSION, {"run_pks": list(run_pks)})
    return {row.id: row.version for row in rows}


def end(tx: Connection, run_pk: int, state: RunState, cause: str | None) -> RunState | None:
    """End a run that is queued or running; return the state it ended in, or None when it had ended before.

    A run that was cancelled or ran out of time ends `failed` with that cause, whatever is given here: its skipped
    leaves alone would look like a success. Locks the row.
    """
    ended = tx.execute(_END, {"run_pk": run_pk, "state": state.value, "cause": cause}).scalar_one_or_none()
    return None if ended is None else RunState(ended)


def get(tx: Connection, dag_id: str, run_id: str) -> Run:
    """Return one run. Raises NotFoundError, naming the nearest DAG or run. Locks nothing."""
    run = first_row(Run, tx.execute(_GET, {"dag_id": dag_id, "run_id": run_id}))
    if run is None:
        dags.get(tx, dag_id)
        hint = did_you_mean(run_id, [known.run_id for known in list_(tx, dag_id=dag_id)])
        raise NotFoundError(f"The DAG {dag_id!r} has no run {run_id!r}.{hint} `dflow runs list {dag_id}` shows them.")
    return run


def get_by_id(tx: Connection, run_pk: int) -> Run | None:
    """Return the run with a primary key, or None."""
    return first_row(Run, tx.execute(_GET_BY_ID, {"run_pk": run_pk}))


def list_(
    tx: Connection, dag_id: str | None = None, states: Sequence[RunState] | None = None, limit: int = 50
) -> list[Run]:
    """Return the newest runs, of one DAG and in some states where given.

    Reads an index from its end until there are enough; runs that are not over yet have indexes of their own.
    """
    wanted = None if states is None else [RunState(state).value for state in states]
    if dag_id is not None:
        query = _LIST_OF_DAG
    else:
        query = _LIST if states is None or RUN_TERMINAL.intersection(states) else _LIST_UNFINISHED
    return all_rows(Run, tx.execute(query, {"dag_id": dag_id, "states": wanted, "limit": limit}))


def last_scheduled(tx: Connection, dag_id: str) -> DueRun | None:
    """Return the last run the DAG's timetable made, None when it made none yet. Reads the DAG's runs; not for loops."""
    row = tx.execute(_LAST_SCHEDULED, {"dag_id": dag_id}).first()
    if row is None:
        return None
    return DueRun(
        logical_date=row.logical_date or row.run_after,
        interval_start=row.data_interval_start or row.run_after,
        interval_end=row.data_interval_end or row.run_after,
        run_after=row.run_after,
    )


def state_counts(tx: Connection, run_pk: int) -> dict[str, int]:
    """Return how many task instances of a run are in each state (states with none are absent)."""
    return state_counts_of(tx, [run_pk])[run_pk]


def state_counts_of(tx: Connection, run_pks: Iterable[int]) -> dict[int, dict[str, int]]:
    """Return `state_counts` of several runs in one statement."""
    counts: dict[int, dict[str, int]] = {run_pk: {} for run_pk in run_pks}
    for row in tx.execute(_STATE_COUNTS, {"run_pks": list(counts)}):
        counts[row.run_pk][row.state] = row.total
    return counts


def request_cancel(tx: Connection, dag_id: str, run_id: str, by: str) -> StopRequest:
    """Record on a run and its running task instances that it is cancelled, and lock all that have not ended.

    Raises NotFoundError, and ConflictError when the run has ended. Waits for the run's row and then, in the order of
    their ids, for its task instances, so that none is claimed meanwhile. `cancel` does the whole thing.
    """
    run = get(tx, dag_id, run_id)
    return _request_stop(tx, run.id, by=by, cause=f"cancelled by {by}")


def cancel(tx: Connection, dag_id: str, run_id: str, by: str) -> Run:
    """Cancel a run: what has not started is skipped, what runs is ended by its agent within lease/4, the run fails.

    Errors and locks as `request_cancel`. With nothing running the run ends here; else with its last task.
    """
    request = request_cancel(tx, dag_id, run_id, by)
    return _stop(tx, request, reason=Reason.CANCELLED, actor=f"user {by}", cause=f"cancelled by {by}")


def stop(tx: Connection, run: Run, *, actor: str, reason: Reason, cause: str) -> Run:
    """Stop a run that is not over for another reason than a person's wish, as `cancel` does."""
    request = _request_stop(tx, run.id, by=actor, cause=cause)
    return _stop(tx, request, reason=reason, actor=actor, cause=cause)


def timed_out(tx: Connection, limit: int = 100) -> list[Run]:
    """Lock (SKIP LOCKED) and return running runs past their ``timeout_at`` that nobody has stopped yet.

    Costs a scan of the partial index `dag_run_timeout` up to now. Give each to `stop`.
    """
    return all_rows(Run, tx.execute(_TIMED_OUT, {"limit": limit}))


def _request_stop(tx: Connection, run_pk: int, *, by: str, cause: str) -> StopRequest:
    run = all_rows(Run, tx.execute(_LOCK_ONE, {"run_pk": run_pk}))[0]
    if run.is_ended:
        raise ConflictError(f"The run {run.run_id!r} of {run.dag_id!r} has ended already ({run.state}).")
    rows = tx.execute(_LOCK_UNFINISHED, {"run_pk": run_pk}).all()
    found = [Unfinished(row.id, TaskState(row.state), row.attempt_id) for row in rows]
    running = [ti for ti in found if ti.state is TaskState.RUNNING]
    unstarted = [ti for ti in found if ti.state is not TaskState.RUNNING]
    request = {"run_pk": run_pk, "by": by, "cause": cause, "ti_ids": [ti.ti_id for ti in running]}
    stopping = all_rows(Run, tx.execute(_REQUEST_STOP, request))[0]
    return StopRequest(run=stopping, unstarted=unstarted, running=running)


def _stop(tx: Connection, request: StopRequest, *, reason: Reason, actor: str, cause: str) -> Run:
    apply(
        tx,
        [
            Change(
                ti_id=ti.ti_id,
                from_state=ti.state,
                to_state=TaskState.SKIPPED,
                reason=reason,
                attempt_id=ti.attempt_id,
                actor=actor,
                cause=cause,
            )
            for ti in request.unstarted
        ],
    )
    if not request.running:
        end(tx, request.run.id, RunState.FAILED, cause)
    return all_rows(Run, tx.execute(_GET_BY_ID, {"run_pk": request.run.id}))[0]


def _run_arrays(new: Sequence[NewRun]) -> dict[str, list[Any]]:
    return {
        "run_ids": [run.run_id or run_id_for(run.run_type, run.run_after) for run in new],
        "run_types": [run.run_type.value for run in new],
        "logical_dates": [run.logical_date for run in new],
        "interval_starts": [run.data_interval_start for run in new],
        "interval_ends": [run.data_interval_end for run in new],
        "run_afters": [run.run_after for run in new],
        "confs": [json_document(dict(run.conf), "The conf of the run") for run in new],
        "triggered_bys": [run.triggered_by for run in new],
    }


def _task_arrays(tasks: Sequence[TaskSpec]) -> dict[str, list[Any]]:
    return {
        "task_ids": [task.task_id for task in tasks],
        "retries": [task.retries for task in tasks],
        "pools": [task.pool for task in tasks],
        "pool_slots": [task.pool_slots for task in tasks],
        "queues": [task.queue for task in tasks],
        "executors": [task.executor for task in tasks],
        "priorities": [task.effective_priority for task in tasks],
    }


def _taken(tx: Connection, dag_id: str, new: NewRun) -> ConflictError:
    run_id = new.run_id or run_id_for(new.run_type, new.run_after)
    row = tx.execute(_TAKEN, {"dag_id": dag_id, "run_id": run_id, "logical_date": new.logical_date}).first()
    if row is not None and row.run_id != run_id:
        return ConflictError(
            f"The DAG {dag_id!r} already has a run for the logical date {new.logical_date}: {row.run_id!r} "
            f"({row.state}). Choose another logical date, or none."
        )
    return ConflictError(f"The DAG {dag_id!r} already has a run {run_id!r}. Choose another run id.")


_COLUMNS = columns(
    "id dag_id run_id run_type state logical_date data_interval_start data_interval_end run_after conf dag_version_id "
    "bundle_hash path max_active_tasks version triggered_by created_at started_at ended_at timeout_at timeout_seconds "
    "cancel_requested_at cancelled_by cause note",
    "r",
)

# ON CONFLICT waits for a concurrent creator of the same run and then leaves it out, without spoiling the transaction.
_CREATE = text(f"""
    WITH r AS (
        INSERT INTO dag_run (dag_id, run_id, run_type, state, logical_date, data_interval_start, data_interval_end,
                             run_after, conf, dag_version_id, bundle_hash, path, max_active_tasks, timeout_seconds,
                             triggered_by)
        SELECT :dag_id, n.run_id, n.run_type, 'queued', n.logical_date, n.interval_start, n.interval_end, n.run_after,
               n.conf, :version_id, :bundle_hash, :path, :max_active_tasks, :timeout_seconds, n.triggered_by
        FROM unnest(CAST(:run_ids AS text[]), CAST(:run_types AS text[]), CAST(:logical_dates AS timestamptz[]),
                    CAST(:interval_starts AS timestamptz[]), CAST(:interval_ends AS timestamptz[]),
                    CAST(:run_afters AS timestamptz[]), CAST(:confs AS jsonb[]), CAST(:triggered_bys AS text[]))
             WITH ORDINALITY AS n(run_id, run_type, logical_date, interval_start, interval_end, run_after, conf,
                                  triggered_by, position)
        ORDER BY n.position
        ON CONFLICT DO NOTHING
        RETURNING *
    ), instances AS (
        INSERT INTO task_instance (run_pk, dag_id, task_id, retries, pool, pool_slots, queue, executor, priority_weight)
        SELECT r.id, :dag_id, t.task_id, t.retries, t.pool, t.pool_slots, t.queue, t.executor, t.priority
        FROM r CROSS JOIN unnest(
            CAST(:task_ids AS text[]), CAST(:retries AS integer[]), CAST(:pools AS text[]),
            CAST(:pool_slots AS integer[]), CAST(:queues AS text[]), CAST(:executors AS text[]),
            CAST(:priorities AS integer[])
        ) WITH ORDINALITY AS t(task_id, retries, pool, pool_slots, queue, executor, priority, position)
        ORDER BY r.id, t.position
    )
    SELECT {_COLUMNS} FROM r ORDER BY r.id""")

_TAKEN = text("""
    SELECT run_id, state FROM dag_run
    WHERE dag_id = :dag_id AND (run_id = :run_id OR logical_date = CAST(:logical_date AS timestamptz))
    ORDER BY (run_id = :run_id) DESC LIMIT 1""")

# A walk over the index `dag_run_queued` that touches one entry for each DAG, not one for each waiting run. The count
# of running runs is only a first sieve here; what counts is read again under the lock.
_LOCK_STARTABLE = text("""
    WITH RECURSIVE waiting AS (
        (SELECT dag_id, run_after FROM dag_run WHERE state = 'queued' ORDER BY dag_id, run_after LIMIT 1)
        UNION ALL
        SELECT n.dag_id, n.run_after FROM waiting w CROSS JOIN LATERAL (
            SELECT q.dag_id, q.run_after FROM dag_run q WHERE q.state = 'queued' AND q.dag_id > w.dag_id
            ORDER BY q.dag_id, q.run_after LIMIT 1) n
    )
    SELECT d.dag_id FROM waiting w JOIN dag d ON d.dag_id = w.dag_id
    WHERE w.run_after <= now() AND d.is_active AND NOT d.is_paused
      AND (SELECT count(*) FROM dag_run x WHERE x.dag_id = d.dag_id AND x.state = 'running') < d.max_active_runs
    ORDER BY w.run_after, d.dag_id LIMIT :limit
    FOR NO KEY UPDATE OF d SKIP LOCKED""")

_START = text(f"""
    WITH due AS MATERIALIZED (
        SELECT q.id, q.run_after FROM dag d CROSS JOIN LATERAL (
            SELECT w.id, w.run_after FROM dag_run w
            WHERE w.dag_id = d.dag_id AND w.state = 'queued' AND w.run_after <= now()
            ORDER BY w.run_after, w.id
            LIMIT greatest(0, d.max_active_runs - (
                SELECT count(*) FROM dag_run x WHERE x.dag_id = d.dag_id AND x.state = 'running'))
        ) q
        WHERE d.dag_id = ANY(CAST(:dag_ids AS text[]))
        ORDER BY q.run_after, q.id LIMIT :limit
    ), r AS (
        UPDATE dag_run u SET state = 'running', started_at = now(), version = u.version + 1,
            timeout_at = now() + make_interval(secs => u.timeout_seconds)
        FROM due WHERE u.id = due.id AND u.state = 'queued'
        RETURNING u.*
    )
    SELECT {_COLUMNS} FROM r ORDER BY r.run_after, r.id""")

_LOCK_FOR_PLANNING = text(f"""
    SELECT {_COLUMNS} FROM dag_run r
    WHERE r.id IN (
        SELECT u.run_pk FROM unaccounted u GROUP BY u.run_pk
        HAVING u.run_pk % :count = :index OR min(u.at) < clock_timestamp() - make_interval(secs => :grace_seconds))
    ORDER BY r.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")

_LOCK = text(f"""
    SELECT {_COLUMNS} FROM dag_run r WHERE r.id = ANY(CAST(:run_pks AS bigint[]))
    ORDER BY r.id FOR NO KEY UPDATE SKIP LOCKED""")

_LOCK_ONE = text(f"SELECT {_COLUMNS} FROM dag_run r WHERE r.id = :run_pk FOR NO KEY UPDATE")

_TAKE_INBOX = text("""
    WITH taken AS (
        DELETE FROM unaccounted WHERE run_pk = ANY(CAST(:run_pks AS bigint[])) RETURNING run_pk, ti_id, state, at)
    SELECT run_pk, ti_id, state FROM taken ORDER BY at, ti_id""")

_INBOX_SIZE = text("SELECT count(*) FROM unaccounted")

_LOAD_VIEW = text("SELECT id, task_id, map_index, state FROM task_instance WHERE run_pk = :run_pk ORDER BY id")

_BUMP_VERSION = text("""
    UPDATE dag_run SET version = version + 1 WHERE id = ANY(CAST(:run_pks AS bigint[])) RETURNING id, version""")

_END = text("""
    UPDATE dag_run SET
        state = CASE WHEN cancel_requested_at IS NULL THEN :state ELSE 'failed' END,
        cause = CASE WHEN cancel_requested_at IS NULL THEN :cause ELSE coalesce(cause, :cause) END,
        started_at = coalesce(started_at, now()), ended_at = clock_timestamp(), version = version + 1
    WHERE id = :run_pk AND state IN ('queued', 'running') RETURNING state""")

_GET = text(f"SELECT {_COLUMNS} FROM dag_run r WHERE r.dag_id = :dag_id AND r.run_id = :run_id")
_GET_BY_ID = text(f"SELECT {_COLUMNS} FROM dag_run r WHERE r.id = :run_pk")

_LIST = text(f"""
    SELECT {_COLUMNS} FROM dag_run r
    WHERE (CAST(:states AS text[]) IS NULL OR r.state = ANY(CAST(:states AS text[])))
    ORDER BY r.id DESC LIMIT :limit""")

_LIST_UNFINISHED = text(f"""
    SELECT {_COLUMNS} FROM dag_run r
    WHERE (r.state = 'queued' OR r.state = 'running') AND r.state = ANY(CAST(:states AS text[]))
    ORDER BY r.id DESC LIMIT :limit""")

_LIST_OF_DAG = text(f"""
    SELECT {_COLUMNS} FROM dag_run r
    WHERE r.dag_id = :dag_id AND (CAST(:states AS text[]) IS NULL OR r.state = ANY(CAST(:states AS text[])))
    ORDER BY r.id DESC LIMIT :limit""")

_LAST_SCHEDULED = text("""
    SELECT logical_date, data_interval_start, data_interval_end, run_after FROM dag_run
    WHERE dag_id = :dag_id AND run_type = 'scheduled' ORDER BY run_after DESC LIMIT 1""")

_STATE_COUNTS = text("""
    SELECT run_pk, state, count(*) AS total FROM task_instance
    WHERE run_pk = ANY(CAST(:run_pks AS bigint[])) GROUP BY run_pk, state""")

_LOCK_UNFINISHED = text("""
    SELECT id, state, CAST(attempt_id AS text) AS attempt_id FROM task_instance
    WHERE run_pk = :run_pk AND state NOT IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed')
    ORDER BY id FOR NO KEY UPDATE""")

_REQUEST_STOP = text(f"""
    WITH told AS (
        UPDATE task_instance SET cancel_requested_at = coalesce(cancel_requested_at, now()),
            cancelled_by = coalesce(cancelled_by, :by)
        WHERE id = ANY(CAST(:ti_ids AS bigint[]))
    ), r AS (
        UPDATE dag_run SET cancel_requested_at = coalesce(cancel_requested_at, now()),
            cancelled_by = coalesce(cancelled_by, :by), cause = coalesce(cause, :cause), version = version + 1
        WHERE id = :run_pk RETURNING *
    )
    SELECT {_COLUMNS} FROM r""")

_TIMED_OUT = text(f"""
    SELECT {_COLUMNS} FROM dag_run r
    WHERE r.state = 'running' AND r.timeout_at IS NOT NULL AND r.timeout_at <= now() AND r.cancel_requested_at IS NULL
    ORDER BY r.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")
