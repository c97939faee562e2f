"""Creates the runs that are due by their DAG's timetable.

What is due is an instant in the DAG's row, so an idle system with a thousand DAGs costs one probe of a small index. A
DAG never has more scheduled runs waiting than may run at once (as in Airflow): a catch-up of ten years makes a few runs
at a time, oldest first. A timetable that raises stops its own DAG only, and only for a while.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Final

from dflow.broker.doorbell import Doorbell
from dflow.core.spec import DagSpec
from dflow.core.states import RunType
from dflow.core.timetable import DueRun, next_run
from dflow.services.base import Counts
from dflow.settings import Settings
from dflow.store import dags, runs, scheduling
from dflow.store.dags import Dag
from dflow.store.engine import Store, Tx
from dflow.store.runs import NewRun

log = logging.getLogger(__name__)

_DAGS_PER_PASS: Final = 200
_QUARANTINE_SECONDS: Final = 60.0


class RunCreator:
    """One pass: create the due runs of the DAGs that are due, and work out when each is due next."""

    name = "run-creator"

    def __init__(self, store: Store, doorbell: Doorbell, settings: Settings) -> None:
        self._store = store
        self._doorbell = doorbell
        self._max_runs = settings.scheduler.max_dagruns_to_create_per_loop
        self._max_catchup = settings.scheduler.max_catchup_runs
        self._quarantine: dict[str, float] = {}  # dag_id -> monotonic seconds when to try it again

    def run_once(self) -> Counts:
        """Return ``{"dags": looked at, "runs": created}``."""
        looked_at, created = self._store.run(self._create)
        if created:
            self._doorbell.ring()
        return {"dags": looked_at, "runs": created}

    def _create(self, tx: Tx) -> tuple[int, int]:
        due = scheduling.lock_due_dags(tx, _DAGS_PER_PASS, leave_out=self._in_quarantine())
        next_runs: dict[str, DueRun | None] = {}
        left = self._max_runs
        for dag, room in due:
            if left <= 0:
                break
            try:
                with tx.begin_nested():
                    created, next_runs[dag.dag_id] = _create_for(tx, dag, min(left, self._max_catchup, room))
            except Exception:
                if tx.invalidated:
                    raise  # the database, not the DAG
                self._quarantine[dag.dag_id] = time.monotonic() + _QUARANTINE_SECONDS
                log.exception("cannot create the due runs of DAG %s; trying again in a minute", dag.dag_id)
                continue
            left -= created
        if next_runs:
            dags.set_next_runs(tx, next_runs)
        return len(due), self._max_runs - left

    def _in_quarantine(self) -> list[str]:
        now = time.monotonic()
        self._quarantine = {dag_id: until for dag_id, until in self._quarantine.items() if until > now}
        return list(self._quarantine)


def _create_for(tx: Tx, dag: Dag, room: int) -> tuple[int, DueRun | None]:
    """Create up to ``room`` due runs of one DAG; return how many, and the run that is due next."""
    if dag.version_id is None or dag.next_run is None:
        return 0, dag.next_run
    spec = dags.get_spec(tx, dag.version_id)
    now = datetime.now(UTC)
    due = _skip_missed(spec, dag.next_run, now)
    new: list[NewRun] = []
    while due is not None and due.run_after <= now and len(new) < room:
        new.append(_new_run(due))
        due = _next(spec, due, now)
        if spec.schedule.kind == "continuous":
            break  # the next one begins when this one has ended
    return len(runs.create_many(tx, dag.dag_id, new)), due


def _skip_missed(spec: DagSpec, due: DueRun | None, now: datetime) -> DueRun | None:
    """Without catchup only the latest missed run is made, also after a pause or an outage (Airflow)."""
    if spec.catchup or due is None or spec.schedule.kind == "continuous":
        return due
    later = _next(spec, due, now)
    return later if later is not None and later.run_after <= now else due


def _next(spec: DagSpec, last: DueRun, now: datetime) -> DueRun | None:
    return next_run(
        spec.schedule,
        last=last,
        start_date=spec.start_date,
        end_date=spec.end_date,
        catchup=spec.catchup,
        now=now,
    )


def _new_run(due: DueRun) -> NewRun:
    return NewRun(
        run_type=RunType.SCHEDULED,
        run_after=due.run_after,
        logical_date=due.logical_date,
        data_interval_start=due.interval_start,
        data_interval_end=due.interval_end,
        triggered_by="timetable",
    )
