"""One attempt: what goes in, what comes out, and every way it can end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dflow import (
    DAG,
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    BaseOperator,
    BashOperator,
    Param,
    PythonOperator,
    get_current_context,
    task,
)
from dflow.core.interrupts import interrupt
from dflow.core.states import Reason
from dflow.runtime.protocol import Outcome
from dflow.runtime.runner import TaskCancelled
from tests.unit.runtime.support_attempts import WHEN, Client, attempt


def run(
    function: Any, client: Client | None = None, *, operator: dict[str, Any] | None = None, **changes: Any
) -> Outcome:
    """Run a function as a PythonOperator."""
    with DAG("d") as dag:
        PythonOperator(task_id="t", python_callable=function, **(operator or {}))
    return attempt(dag, "t", client, **changes)


def raising(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


# ---- ends ----


@pytest.mark.parametrize(
    ("error", "reason", "cause"),
    [
        (ValueError("bad zone\nmore"), Reason.RAISED, "ValueError: bad zone"),
        (ValueError(), Reason.RAISED, "ValueError"),
        (AirflowSkipException("not today"), Reason.SKIP_RAISED, "AirflowSkipException: not today"),
        (AirflowFailException("no"), Reason.FAIL_RAISED, "AirflowFailException: no"),
        (TaskCancelled("by Ada"), Reason.CANCELLED, "by Ada"),
        (KeyboardInterrupt(), Reason.RAISED, "KeyboardInterrupt"),
        (GeneratorExit(), Reason.RAISED, "GeneratorExit"),
        (SystemExit(3), Reason.EXITED, "exit code 3"),
        (SystemExit(), Reason.EXITED, "exit code 0"),
        (SystemExit("text"), Reason.EXITED, "exit code 1"),
    ],
)
def test_ends(error: BaseException, reason: Reason, cause: str) -> None:
    outcome = run(raising(error))
    assert (outcome.reason, outcome.cause, outcome.retry_delay_seconds) == (reason, cause, None)
    assert outcome.exit_code == (int(cause[-1]) if reason is Reason.EXITED else None)


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3)])
def test_user_failures_are_tried_again_while_tries_are_left(error: BaseException) -> None:
    delay = {"retry_delay": timedelta(seconds=7)}
    assert run(raising(error), operator=delay, retries=2, user_failures=1).retry_delay_seconds == 7
    assert run(raising(error), operator=delay, retries=2, user_failures=2).retry_delay_seconds is None


def test_retry_delay_of_the_settings_and_backoff() -> None:
    config = {"CORE__DEFAULT_TASK_RETRY_DELAY": "12"}
    assert run(raising(ValueError()), retries=1, config=config).retry_delay_seconds == 12
    backoff = {"retry_delay": 10, "retry_exponential_backoff": 2.0, "max_retry_delay": 30}
    delays = [
        run(raising(ValueError()), operator=backoff, retries=9, user_failures=n).retry_delay_seconds for n in range(4)
    ]
    assert 10 <= delays[0] < 20  # type: ignore[operator]
    assert delays[3] == 30


@pytest.mark.parametrize("error", [AirflowFailException(), AirflowSkipException(), TaskCancelled()])
def test_no_retry_for_fail_skip_and_cancel(error: BaseException) -> None:
    assert run(raising(error), retries=5).retry_delay_seconds is None


def test_unknown_task_is_a_load_failure() -> None:
    with DAG("d") as dag:
        PythonOperator(task_id="load", python_callable=dict)
    outcome = attempt(dag, "loda")
    assert (outcome.reason, outcome.cause) == (Reason.LOAD_FAILED, "DAG 'd' has no task 'loda', did you mean \"load\"?")


def test_the_log_shows_the_user_s_part_of_the_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def divide() -> None:
        1 / 0  # noqa: B018

    with caplog.at_level(logging.ERROR):
        run(divide)
    (record,) = caplog.records
    assert record.getMessage() == "Failed: ZeroDivisionError: division by zero"
    text = caplog.text
    assert "in divide" in text
    assert "dflow/runtime" not in text
    assert "dflow/authoring" not in text


def test_a_broken_exception_is_no_problem() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert run(raising(Broken())).cause == "Broken: (its message cannot be shown)"


# ---- timeouts and cancellation ----


def test_execution_timeout() -> None:
    killed = []

    class Sleeper(BaseOperator):
        def execute(self, context: Any) -> None:
            try:
                threading.Event().wait(60)
            except Exception:  # noqa: BLE001 -- a timeout is none
                pass

        def on_kill(self) -> None:
            killed.append(True)

    with DAG("d") as dag:
        Sleeper(task_id="t", execution_timeout=timedelta(milliseconds=50), retry_delay=1)
    before = signal.getsignal(signal.SIGALRM)
    outcome = attempt(dag, "t", retries=1)
    assert outcome.reason is Reason.TIMEOUT
    assert outcome.cause == "AirflowTaskTimeout: took longer than execution_timeout = 0:00:00.050000"
    assert outcome.retry_delay_seconds == 1
    assert killed == [True]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_execution_timeout_of_the_settings() -> None:
    config = {"CORE__DEFAULT_TASK_EXECUTION_TIMEOUT": "0.05"}
    assert run(lambda: threading.Event().wait(60), config=config).reason is Reason.TIMEOUT


def test_execution_timeout_of_coroutines() -> None:
    async def waits() -> None:
        await asyncio.sleep(60)

    async def works() -> None:
        while True:
            await asyncio.sleep(0)

    async def waits_for_another() -> None:
        await asyncio.gather(waits(), works())

    for function in (waits, works, waits_for_another):
        outcome = run(function, operator={"execution_timeout": timedelta(milliseconds=50)})
        assert outcome.reason is Reason.TIMEOUT


def test_a_timeout_between_the_callbacks_of_an_event_loop_is_not_lost() -> None:
    async def waits() -> None:
        # The loop catches what is raised in a callback and would go on waiting.
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGALRM)
        await asyncio.sleep(60)

    outcome = run(waits, operator={"execution_timeout": timedelta(seconds=50)})
    assert outcome.reason is Reason.TIMEOUT


def test_time_limit_is_lifted_afterwards() -> None:
    assert run(dict, operator={"execution_timeout": timedelta(seconds=30)}).reason is Reason.SUCCEEDED
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def cancel_when(path: Path) -> None:
    """Raise `TaskCancelled` in the main thread, by a signal, once the file is there."""
    before = signal.signal(signal.SIGUSR1, lambda *_: interrupt(TaskCancelled("by Ada")))
    assert before is not None

    def watch() -> None:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture
def sigusr1() -> Any:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_cancelled_bash_leaves_nothing_behind(
    tmp_path: Path, sigusr1: None, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BashOperator, "kill_grace_seconds", 0.2)
    note = f"echo $! > {tmp_path}/child; echo $$ > {tmp_path}/leader; touch {tmp_path}/up"
    script = f"{trap}sleep 300 & {note}; wait; sleep 300"
    with DAG("d") as dag:
        BashOperator(task_id="t", bash_command=script)
    cancel_when(tmp_path / "up")
    outcome = attempt(dag, "t", retries=3)
    assert (outcome.reason, outcome.cause) == (Reason.CANCELLED, "by Ada")
    pids = [int((tmp_path / name).read_text()) for name in ("child", "leader")]
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [is_running(pid) for pid in pids] == [False, False]


def test_on_kill_is_called_and_may_fail() -> None:
    class Bad(BaseOperator):
        def execute(self, context: Any) -> None:
            raise TaskCancelled("x")

        def on_kill(self) -> None:
            raise RuntimeError("on_kill is broken")

    with DAG("d") as dag:
        Bad(task_id="t")
    assert attempt(dag, "t").reason is Reason.CANCELLED


# ---- results ----


def test_results_are_kept() -> None:
    assert run(lambda: {"a": 1}).xcoms == {"return_value": {"a": 1}}
    assert run(lambda: None).xcoms == {}
    assert run(lambda: 1, operator={"do_xcom_push": False}).xcoms == {}


def test_multiple_outputs() -> None:
    with DAG("d") as dag:

        @task
        def split() -> dict[str, int]:
            return {"a": 1, "b": 2}

        @task(multiple_outputs=True)
        def wrong():
            return [1]

        split(), wrong()
    assert attempt(dag, "split").xcoms == {"return_value": {"a": 1, "b": 2}, "a": 1, "b": 2}
    assert "must be a dict because of multiple_outputs, not list" in (attempt(dag, "wrong").cause or "")


def test_what_cannot_be_kept_fails_the_attempt() -> None:
    outcome = run(lambda: object())
    assert outcome.reason is Reason.RAISED
    assert (outcome.cause or "").startswith("TypeError: the result of task 't' cannot be kept: builtins.object")
    outcome = run(lambda: "x" * 300, config={"CORE__XCOM_MAX_BYTES": "100"})
    assert "core.xcom_max_bytes = 100" in (outcome.cause or "")


def test_results_of_other_tasks_are_pulled_once_for_each_key() -> None:
    with DAG("d") as dag:

        @task
        def make(n):
            return n

        @task
        def gather(values, again, part):
            values[0].append(9)
            return [values, again, part]

        parts = [make.override(task_id=f"m{i}")(i) for i in range(3)]
        gather(parts, parts[0], parts[1]["k"])
    client = Client(m0=[0], m1=[1], m2=None)
    client.xcoms["m1", "k"] = {"__type__": "tuple", "value": [1]}
    outcome = attempt(dag, "gather", client)
    assert outcome.xcoms["return_value"][0] == [[0, 9], [1], None]
    assert outcome.xcoms["return_value"][1] == [0]  # a value of its own, not the one that was changed
    assert sorted((p["key"], p["task_ids"]) for p in client.pulls) == [
        ("k", ["m1"]), ("return_value", ["m0", "m1", "m2"]),
    ]  # fmt: skip


def test_a_key_that_was_not_pushed_fails_the_attempt() -> None:
    with DAG("d") as dag:

        @task
        def make():
            return {"a": 1}

        @task
        def use(x): ...

        use(make()["a"])
    assert "task 'make' has kept nothing under 'a'" in (attempt(dag, "use", Client()).cause or "")


# ---- context and arguments ----


def test_functions_get_what_they_name() -> None:
    def function(x, ds, ti, y=2, *, params=None, run_id=None):
        return [x, y, ds, ti.task_id, params, run_id]

    outcome = run(function, operator={"op_args": ["{{ ds }}"], "op_kwargs": {"y": "{{ run_id }}"}})
    assert outcome.xcoms["return_value"] == ["2026-03-29", "run", "2026-03-29", "t", {}, "run"]


def test_functions_with_kwargs_get_everything() -> None:
    seen: dict[str, Any] = {}

    def function(**kwargs):
        seen.update(kwargs)

    outcome = run(function, operator={"op_kwargs": {"own": 1, "ds": "mine"}, "templates_dict": {"q": "{{ ds }}"}})
    assert outcome.reason is Reason.SUCCEEDED
    assert seen["own"] == 1
    assert seen["ds"] == "mine"
    assert seen["templates_dict"] == {"q": "2026-03-29"}
    assert seen["logical_date"] == seen["dag_run"].logical_date == WHEN
    assert "prev_start_date_success" not in seen
    assert seen["ti"] is seen["task_instance"]


def test_op_kwargs_the_function_does_not_take_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert run(lambda: 1, operator={"op_kwargs": {"x": 1}}).reason is Reason.SUCCEEDED
    assert "does not take ['x'] of op_kwargs" in caplog.text


def test_positional_argument_on_a_context_name_fails() -> None:
    assert "name of a context variable" in (run(lambda ds: 1, operator={"op_args": ["x"]}).cause or "")


def test_coroutine_functions() -> None:
    async def function():
        return 5

    assert run(function).xcoms == {"return_value": 5}


def test_get_current_context() -> None:
    assert run(lambda: get_current_context()["ds"]).xcoms == {"return_value": "2026-03-29"}
    with pytest.raises(AirflowException, match="only while a task runs"):
        get_current_context()


def test_xcom_pull_and_push_arguments() -> None:
    client = Client(a=1, b={"__type__": "set", "value": [2]})
    client.xcoms["t", "mine"] = 5

    def function(ti):
        ti.xcom_push("k", (1, 2))
        ti.xcom_push(key="j", value=3)
        return [
            ti.xcom_pull("a"), list(ti.xcom_pull(task_ids=["b", "none", "a"])), ti.xcom_pull(key="mine"),
            ti.xcom_pull("none", default=4), ti.xcom_pull("a", dag_id="x", run_id="y", include_prior_dates=True),
            ti.xcom_pull("a", map_indexes=[0]), ti.get_task_states(["a"]),
        ]  # fmt: skip

    outcome = run(function, client)
    result = outcome.xcoms["return_value"]
    assert result[0] == 1
    assert result[1][1:] == [None, 1]
    assert result[2:5] == [5, 4, 1]
    assert result[6] == {"a": "success"}
    assert client.pushed == {"k": {"__type__": "tuple", "value": [1, 2]}, "j": 3}
    assert client.pulls[2]["task_ids"] == ["t"]
    assert {k: client.pulls[4][k] for k in ("dag_id", "run_id", "include_prior_dates")} == {
        "dag_id": "x", "run_id": "y", "include_prior_dates": True,
    }  # fmt: skip


def test_params_of_dag_task_and_conf() -> None:
    with DAG("d", params={"a": 1, "b": Param(2, type="integer"), "c": 3}) as dag:
        PythonOperator(task_id="t", python_callable=lambda params: dict(params), params={"c": 4})
    assert attempt(dag, "t", conf={"b": 9, "x": 1}).xcoms["return_value"] == {"a": 1, "b": 9, "c": 4, "x": 1}
    config = {"CORE__DAG_RUN_CONF_OVERRIDES_PARAMS": "false"}
    assert attempt(dag, "t", conf={"b": 9}, config=config).xcoms["return_value"] == {"a": 1, "b": 2, "c": 4}
    assert "param 'b' has the value 'no'" in (attempt(dag, "t", conf={"b": "no"}).cause or "")


# ---- operators ----


def test_hooks_run_in_order_and_a_subclass_works() -> None:
    seen: list[Any] = []

    class Greet(BaseOperator):
        template_fields = ("name",)

        def __init__(self, *, name: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.name = name
            self.rows: list[str] = []

        def execute(self, context: Any) -> str:
            self.rows.append(self.name)
            seen.append(len(self.rows))
            return f"hello {self.name}"

    with DAG("d") as dag:
        made = Greet(
            task_id="t",
            name="{{ run_id }}",
            pre_execute=lambda context: seen.append("pre"),
            post_execute=lambda context, result: seen.append(result),
        )
    assert attempt(dag, "t").xcoms == {"return_value": "hello run"}
    assert attempt(dag, "t").xcoms == {"return_value": "hello run"}
    assert seen == ["pre", 1, "hello run"] * 2
    assert made.name == "{{ run_id }}"  # the operator of the DAG file is as it was


def test_operator_without_execute() -> None:
    with DAG("d") as dag:
        BaseOperator(task_id="t")
    assert "does not define execute" in (attempt(dag, "t").cause or "")


def bash(command: str, **arguments: Any) -> Outcome:
    with DAG("d") as dag:
        BashOperator(task_id="t", bash_command=command, **arguments)
    return attempt(dag, "t")


def test_bash_result_is_the_last_line() -> None:
    assert bash("echo a; echo b").xcoms == {"return_value": "b"}
    assert bash("true").xcoms == {"return_value": ""}
    assert bash("echo '[1, 2]'", output_processor=lambda line: line.split(",")).xcoms == {"return_value": ["[1", " 2]"]}
    assert bash(r"printf '\xff\n'").xcoms == {"return_value": "\\xff"}


@pytest.mark.parametrize(
    ("command", "arguments", "reason", "cause"),
    [
        ("exit 3", {}, Reason.RAISED, "AirflowException: the bash command failed with exit code 3"),
        ("kill -9 $$", {}, Reason.RAISED, "AirflowException: the bash command was ended by signal 9 (SIGKILL)"),
        ("exit 99", {}, Reason.SKIP_RAISED, "AirflowSkipException: the bash command returned exit code 99; skipping"),
        ("exit 4", {"skip_on_exit_code": [4, 5]}, Reason.SKIP_RAISED, None),
        ("exit 99", {"skip_on_exit_code": None}, Reason.RAISED, None),
        ("true", {"cwd": "/nonexistent"}, Reason.RAISED, None),
    ],
)
def test_bash_exit_codes(command: str, arguments: dict[str, Any], reason: Reason, cause: str | None) -> None:
    outcome = bash(command, **arguments)
    assert outcome.reason is reason
    assert cause is None or outcome.cause == cause


def test_bash_environment_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    show = 'echo "$INHERITED $OWN $DFLOW_CTX_TASK_ID $AIRFLOW_CTX_DAG_RUN_ID"'
    assert bash(show).xcoms["return_value"] == "yes  t run"
    path = {"PATH": os.environ["PATH"]}
    assert bash(show, env={"OWN": "{{ ds }}", **path}).xcoms["return_value"] == " 2026-03-29 t run"
    assert bash(show, env={"OWN": "1"}, append_env=True).xcoms["return_value"] == "yes 1 t run"
    assert bash("pwd", cwd=str(tmp_path)).xcoms["return_value"] == str(tmp_path)
    fresh = bash("pwd; ls -A | wc -l")
    assert fresh.xcoms["return_value"].strip() == "0"


def test_bash_takes_scripts_longer_than_an_argument_may_be() -> None:
    assert bash("true " + "x" * 300_000 + "\necho done").xcoms == {"return_value": "done"}


def test_task_bash(caplog: pytest.LogCaptureFixture) -> None:
    with DAG("d") as dag:

        @task.bash(env={"WHO": "{{ run_id }}"}, append_env=True)
        def greet(word):
            return f"echo {word} $WHO {{{{ ds }}}}"

        @task.bash
        def nothing():
            return ""

        greet("hello"), nothing()
    assert attempt(dag, "greet").xcoms == {"return_value": "hello run 2026-03-29"}
    assert "must return a script" in (attempt(dag, "nothing").cause or "")
    assert dag.task_ids == ["greet", "nothing"]


def test_timeout_outside_the_main_thread_is_told(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(run(dict, operator={"execution_timeout": timedelta(seconds=5)}))
    )
    thread.start()
    thread.join()
    assert outcomes[0].reason is Reason.SUCCEEDED
    assert "is not enforced" in caplog.text


def test_no_operation_imports_no_jinja_and_no_jsonschema() -> None:
    code = """
import sys
from tests.unit.runtime.support_attempts import attempt
from dflow import DAG, PythonOperator
with DAG("d") as dag:
    PythonOperator(task_id="t", python_callable=dict)
assert attempt(dag, "t").reason == "succeeded"
print([name for name in ("jinja2", "jsonschema", "yaml", "sqlalchemy") if name in sys.modules])
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_subclasses_may_use_common_names_of_their_own() -> None:
    class Query(BaseOperator):
        def __init__(self, *, location: str, code: str, sql: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.location, self.code, self.sql = location, code, sql

        def execute(self, context: Any) -> str:
            return self.location

    with DAG("d") as dag:
        Query(task_id="t", location="EU", code="c", sql="select 1")
    dag.to_spec()
    assert attempt(dag, "t").xcoms == {"return_value": "EU"}
