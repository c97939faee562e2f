"""``ti`` and ``dag_run`` of a running task: what it is, and its way to the XComs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring.exceptions import XComNotFound
from dflow.authoring.xcom_arg import RETURN_KEY, XComArg
from dflow.runtime import xcom_codec

if TYPE_CHECKING:
    from dflow.authoring.context import Context
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator
    from dflow.runtime.protocol import AttemptClient, Work

ALL: Final[Any] = object()  # map_indexes not given: every instance of the task


@dataclass(frozen=True, slots=True, kw_only=True)
class DagRunInfo:
    """``dag_run``: the run that a task belongs to. Instants are aware UTC."""

    id: int
    dag_id: str
    run_id: str
    run_type: str
    logical_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    run_after: datetime
    start_date: datetime | None
    conf: dict[str, Any]
    end_date: datetime | None = None
    state: str = "running"


class TaskInstance:
    """``ti``: one attempt of a task, seen from inside.

    Read: ``task_id, dag_id, run_id, map_index, try_number, max_tries, attempt_id, hostname, start_date, queue, pool,
    priority_weight, operator, state``. `attempt_id` is unique to the attempt; hand it to other systems as a fencing
    token.
    """

    def __init__(self, work: Work, task: BaseOperator, client: AttemptClient, *, xcom_max_bytes: int) -> None:
        self._work = work
        self._client = client
        self._xcom_max_bytes = xcom_max_bytes
        self._pulled: dict[tuple[str, str], list[Any]] = {}
        self._context: Context | None = None
        self.task = task
        self.task_id, self.dag_id, self.run_id = work.task_id, work.dag_id, work.run_id
        self.map_index = work.map_index
        self.try_number = work.try_number
        self.max_tries = work.retries
        self.attempt_id = work.attempt_id
        self.hostname = work.hostname
        self.start_date = work.started_at
        self.end_date: datetime | None = None
        self.queue, self.pool, self.priority_weight = work.queue, work.pool, work.priority_weight
        self.state = "running"
        self.operator = task.operator_name

    @property
    def dag(self) -> DAG:
        """The DAG."""
        return self.task.dag

    @property
    def dag_run(self) -> DagRunInfo:
        """The run."""
        run: DagRunInfo = self.get_template_context()["dag_run"]
        return run

    @property
    def logical_date(self) -> datetime | None:
        """The logical date of the run."""
        return self._work.logical_date

    @property
    def log(self) -> logging.Logger:
        """The logger of the task."""
        return self.task.log

    def get_template_context(self) -> Context:
        """Return the context of the attempt."""
        assert self._context is not None
        return self._context

    def render(self, value: Any, *, template_ext: Sequence[str] = ()) -> Any:
        """Return ``value`` with its templates rendered in the context of the attempt."""
        from dflow.runtime import templates

        return templates.render(value, self.get_template_context(), self.task, template_ext=template_ext)

    def get_task_states(self, task_ids: Iterable[str]) -> dict[str, str]:
        """Return the states of other tasks of the run."""
        return self._client.task_states(list(task_ids))

    # ---- XCom ----

    def xcom_push(self, key: str, value: Any) -> None:
        """Keep ``value`` under ``key`` for other tasks, at once.

        Raises TypeError or ValueError when it cannot be kept (see `dflow.runtime.xcom_codec`), `StaleAttemptError` when
        the attempt is no longer the current one.
        """
        if not isinstance(key, str) or not key:
            raise TypeError(f"the key of an XCom must be a string, not {key!r}")
        self._client.push_xcom(key, self.encode_xcom(value, f"XCom {key!r} of task {self.task_id!r}"))

    def encode_xcom(self, value: Any, what: str) -> Any:
        """Return a value as the JSON that is stored, within the size limit."""
        data = xcom_codec.encode(value, what)
        xcom_codec.check_size(data, self._xcom_max_bytes, what)
        return data

    def xcom_pull(
        self,
        task_ids: str | Iterable[str] | None = None,
        dag_id: str | None = None,
        key: str = RETURN_KEY,
        include_prior_dates: bool = False,
        *,
        map_indexes: int | Iterable[int] | None = ALL,
        default: Any = None,
        run_id: str | None = None,
    ) -> Any:
        """Return what other tasks kept under ``key`` (Airflow 3's rules).

        Parameters:
            task_ids: one id gives one value, several a list in their order; None is this task itself.
            map_indexes: of a mapped task: one index or several; left out, all in order.
            default: stands for what was not kept.
            dag_id, run_id: of another run; by default this one.
            include_prior_dates: also look into earlier runs when this one has no value.
        """
        names = _names(task_ids, self.task_id)
        indexes = None if map_indexes is ALL or map_indexes is None else _indexes(map_indexes)
        rows = self._client.pull_xcoms(
            task_ids=names,
            key=key,
            map_indexes=indexes,
            dag_id=dag_id,
            run_id=run_id,
            include_prior_dates=include_prior_dates,
        )
        found: dict[str, list[Any]] = {}
        for task_id, _, data in rows:
            found.setdefault(task_id, []).append(xcom_codec.decode(data))
        values = [value for name in names for value in found.get(name, [default])]
        is_single = task_ids is None or isinstance(task_ids, str)
        if is_single and (len(values) == 1 and (map_indexes is ALL or map_indexes is None or _is_one(map_indexes))):
            return values[0]
        return values

    def prefetch(self, args: Iterable[XComArg]) -> None:
        """Pull the given results with one request for each key, whatever their number."""
        wanted: dict[str, dict[str, None]] = {}
        for arg in args:
            if (arg.operator.task_id, arg.key) not in self._pulled:
                wanted.setdefault(arg.key, {})[arg.operator.task_id] = None
        for key, names in wanted.items():
            for name in names:
                self._pulled[name, key] = []
            for task_id, _, data in self._client.pull_xcoms(task_ids=list(names), key=key):
                self._pulled[task_id, key].append(data)

    def resolve_xcom_arg(self, arg: XComArg) -> Any:
        """Return the value a task result stands for; each use gets an object of its own."""
        self.prefetch([arg])
        values = self._pulled[arg.operator.task_id, arg.key]
        if values:
            return xcom_codec.decode(values[0])
        if arg.key == RETURN_KEY:
            return None
        raise XComNotFound(
            f"task {arg.operator.task_id!r} has kept nothing under {arg.key!r}; return a dict with that key from a "
            "@task(multiple_outputs=True) function, or push it with ti.xcom_push"
        )

    def __repr__(self) -> str:
        return f"<TaskInstance: {self.dag_id}.{self.task_id} {self.run_id} try {self.try_number}>"


def run_info(work: Work) -> DagRunInfo:
    """Return ``dag_run`` of an attempt."""
    return DagRunInfo(
        id=work.run_pk,
        dag_id=work.dag_id,
        run_id=work.run_id,
        run_type=work.run_type,
        logical_date=work.logical_date,
        data_interval_start=work.data_interval_start,
        data_interval_end=work.data_interval_end,
        run_after=work.run_after,
        start_date=work.run_started_at,
        conf=_plain(work.conf),
    )


def _plain(conf: Mapping[str, Any]) -> dict[str, Any]:
    return dict(conf)


def _names(task_ids: str | Iterable[str] | None, own: str) -> list[str]:
    if task_ids is None:
        return [own]
    return [task_ids] if isinstance(task_ids, str) else list(task_ids)


def _is_one(map_indexes: int | Iterable[int] | None) -> bool:
    return isinstance(map_indexes, int)


def _indexes(map_indexes: int | Iterable[int]) -> list[int]:
    return [map_indexes] if isinstance(map_indexes, int) else list(map_indexes)
