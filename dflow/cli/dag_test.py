"""`dflow dags test`: one run of a DAG file in this process, through the planner and runner of the real thing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflow.cli.conf import check_conf
from dflow.cli.output import Output, out, show_list, show_record, styled_state
from dflow.core.errors import ConflictError, NotFoundError
from dflow.core.states import RunState

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.runtime.inline import InlineRun
    from dflow.settings import Settings


def run_file(file: Path, dag_id: str | None, conf: Mapping[str, Any], form: Output) -> int:
    """Run a DAG of a file and show how it ended; return the exit code: 0 success, 1 failed.

    Raises DagImportError, NotFoundError, ConflictError (which of several DAGs?), typer.BadParameter (conf).
    """
    from dflow.authoring.defaults import Defaults
    from dflow.runtime.inline import run_dag
    from dflow.runtime.loader import load_dags
    from dflow.settings import load

    settings = load()
    file = file.resolve()
    loaded = load_dags(file, bundle_root=_bundle_root(file, settings))
    dag = _choose(loaded.dags, dag_id, file)
    params = dag.to_spec(Defaults.from_settings(settings)).params
    check_conf(params, conf, overrides=settings.core.dag_run_conf_overrides_params)
    with loaded.active(), _stdout_on_stderr():
        ended = run_dag(dag, conf=conf, settings=settings)
    _show(ended, form)
    return 0 if ended.state is RunState.SUCCESS else 1


def _bundle_root(file: Path, settings: Settings) -> Path:
    """Local modules come from the DAG folder when the file lies in it, as on a worker; else from beside the file."""
    folder = settings.core.dags_folder.resolve()
    return folder if file.is_relative_to(folder) else file.parent


def _choose(dags: Mapping[str, DAG], dag_id: str | None, file: Path) -> DAG:
    from dflow.settings.suggest import did_you_mean

    if not dags:
        raise NotFoundError(f"{file} defines no DAG; is it assigned to a variable, or made in a `with DAG(...)` block?")
    if dag_id is None and len(dags) > 1:
        raise ConflictError(f"{file} defines several DAGs; choose one with --dag-id: {', '.join(sorted(dags))}")
    if dag_id is None:
        return next(iter(dags.values()))
    if dag_id not in dags:
        raise NotFoundError(f"{file} defines no DAG {dag_id!r}{did_you_mean(dag_id, dags)}")
    return dags[dag_id]


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Let what tasks and their subprocesses print go to standard error: standard output is for the result."""
    sys.stdout.flush()
    ours = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


def _show(ended: InlineRun, form: Output) -> None:
    rows = [
        {"task_id": task_id, "state": str(state), "cause": _cause(ended, task_id)}
        for task_id, state in ended.states.items()
    ]
    if form in {Output.JSON, Output.YAML}:
        record = {"dag_id": ended.dag_id, "run_id": ended.run_id, "state": str(ended.state), "cause": ended.cause}
        show_record(record | {"tasks": rows}, form)
        return
    show_list(rows, form, columns=("task_id", "state", "cause"), empty="The DAG has no tasks.")
    if form is Output.TABLE:
        cause = f": {ended.cause}" if ended.cause else ""
        out().print(f"\n{ended.dag_id}", styled_state(str(ended.state)), end="")
        out().print(cause, markup=False, soft_wrap=True)


def _cause(ended: InlineRun, task_id: str) -> str | None:
    outcome = ended.outcomes.get(task_id)
    return outcome.cause if outcome else None
