"""BashOperator: a task that runs a bash script in a process group of its own.

What the script writes goes to the task's log line by line while it runs; its last line is the result. When the task is
cancelled or times out the whole group is ended, first with SIGTERM, after a grace with SIGKILL, so nothing the script
started outlives the attempt unless it left the group itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final

from dflow.authoring.exceptions import AirflowException, AirflowSkipException
from dflow.authoring.operator import BaseOperator
from dflow.authoring.refusal import refusal
from dflow.authoring.resolvable import Resolvable
from dflow.core.interrupts import shielded

if TYPE_CHECKING:
    from dflow.authoring.context import Context

# Linux takes at most 128 KiB for one argument (MAX_ARG_STRLEN); longer scripts go through a file.
_LONGEST_ARGUMENT: Final = 100_000


class BashOperator(BaseOperator):
    """Runs ``bash -c bash_command``.

    Parameters (Airflow's):
        bash_command: the script, or the path of a template file ending in .sh or .bash.
        env: the environment; None inherits that of the worker. append_env: add ``env`` to the inherited one instead.
        output_encoding: of what the script writes; bytes that do not fit are shown escaped.
        skip_on_exit_code: exit code or codes that end the task as skipped; None for no such code.
        cwd: where it runs; None is a new empty folder that is removed afterwards.
        output_processor: called with the last line; what it returns is the result.

    Any other exit code than 0 raises `AirflowException`. The script finds ``DFLOW_CTX_DAG_ID``, ``..._TASK_ID``,
    ``..._RUN_ID``, ``..._TRY_NUMBER``, ``..._ATTEMPT_ID`` and ``..._LOGICAL_DATE`` in its environment, and Airflow's
    ``AIRFLOW_CTX_...`` names for those it has.
    """

    template_fields = ("bash_command", "env", "cwd")
    template_ext = (".sh", ".bash")
    template_fields_renderers = {"bash_command": "bash", "env": "json"}
    ui_color = "#f0ede4"
    kill_grace_seconds: ClassVar[float] = 5.0

    def __init__(
        self,
        *,
        bash_command: Any,
        env: Mapping[str, str] | None = None,
        append_env: bool = False,
        output_encoding: str = "utf-8",
        skip_on_exit_code: int | Collection[int] | None = 99,
        cwd: str | None = None,
        output_processor: Callable[[str], Any] = lambda line: line,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(bash_command, str | Resolvable):
            raise refusal(f"bash_command of {self.task_id!r} must be a string, not {type(bash_command).__name__}")
        self.bash_command = bash_command
        self.env: Any = env
        self.append_env = append_env
        self.output_encoding = output_encoding
        self.skip_on_exit_code: frozenset[int] = (
            frozenset()
            if skip_on_exit_code is None
            else frozenset([skip_on_exit_code] if isinstance(skip_on_exit_code, int) else skip_on_exit_code)
        )
        self.cwd = cwd
        self.output_processor = output_processor
        self._process: subprocess.Popen[bytes] | None = None

    def execute(self, context: Context) -> Any:
        """Run the script and return its last line, processed."""
        with contextlib.ExitStack() as stack:
            folder = (
                self.cwd if self.cwd is not None else stack.enter_context(tempfile.TemporaryDirectory(prefix="dflow-"))
            )
            if not os.path.isdir(folder):
                raise AirflowException(f"cwd {folder!r} is not a folder on this machine; create it or leave cwd out")
            arguments = stack.enter_context(_arguments(str(self.bash_command)))
            last_line = self._run(arguments, folder, self._environment(context))
        return self.output_processor(last_line)

    def on_kill(self) -> None:
        """End the process group, with whatever the script started."""
        if self._process is not None:
            end_group(self._process, self.kill_grace_seconds)

    def _run(self, arguments: list[str], folder: str, environment: dict[str, str]) -> str:
        self.log.info("Running %s", " ".join(arguments) if len(arguments) < 3 else f"bash -c {arguments[2]!r}")
        process: subprocess.Popen[bytes] | None = None
        try:
            with shielded():  # interrupted in between, the process would run and nobody would know it
                self._process = process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
            assert process.stdout is not None
            last_line = self._log_lines(process.stdout)
            code = process.wait()
        except BaseException:  # a timeout or cancellation is raised right here; the group must not outlive it
            if process is not None:
                end_group(process, self.kill_grace_seconds)
            raise
        finally:
            if process is not None and process.stdout is not None:
                process.stdout.close()
            self._process = None
        self._judge(code)
        return last_line

    def _log_lines(self, output: IO[bytes]) -> str:
        line = ""
        for raw in output:
            line = raw.decode(self.output_encoding, errors="backslashreplace").rstrip("\r\n")
            self.log.info("%s", line)
        return line

    def _judge(self, code: int) -> None:
        if code in self.skip_on_exit_code:
            raise AirflowSkipException(f"the bash command returned exit code {code}; skipping")
        if code < 0:
            raise AirflowException(f"the bash command was ended by signal {-code} ({_signal_name(-code)})")
        if code:
            raise AirflowException(f"the bash command failed with exit code {code}")

    def _environment(self, context: Context) -> dict[str, str]:
        environment = dict(os.environ) if self.env is None or self.append_env else {}
        environment.update(context_variables(context))
        environment.update({str(name): str(value) for name, value in (self.env or {}).items()})
        return environment


def context_variables(context: Context) -> dict[str, str]:
    """Return the environment variables that tell a script which attempt it serves."""
    ti = context["ti"]
    logical_date = context["logical_date"].isoformat() if context.get("logical_date") else ""
    return {
        "DFLOW_CTX_DAG_ID": ti.dag_id,
        "DFLOW_CTX_TASK_ID": ti.task_id,
        "DFLOW_CTX_RUN_ID": ti.run_id,
        "DFLOW_CTX_TRY_NUMBER": str(ti.try_number),
        "DFLOW_CTX_MAP_INDEX": str(ti.map_index),
        "DFLOW_CTX_ATTEMPT_ID": ti.attempt_id,
        "DFLOW_CTX_LOGICAL_DATE": logical_date,
        "AIRFLOW_CTX_DAG_ID": ti.dag_id,
        "AIRFLOW_CTX_TASK_ID": ti.task_id,
        "AIRFLOW_CTX_DAG_RUN_ID": ti.run_id,
        "AIRFLOW_CTX_TRY_NUMBER": str(ti.try_number),
        "AIRFLOW_CTX_LOGICAL_DATE": logical_date,
    }


def end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End a process and its group: SIGTERM, and SIGKILL after the grace or when that wait is interrupted."""
    try:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    finally:
        _signal_group(process, signal.SIGKILL)  # also what outlived the leader
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # The leader's pid is the group's id; start_new_session made it so.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


@contextlib.contextmanager
def _arguments(script: str) -> Iterator[list[str]]:
    if "\0" in script:
        raise AirflowException("the bash command holds a NUL character, which no program can be given")
    if len(script.encode()) <= _LONGEST_ARGUMENT:
        yield ["bash", "-c", script]
        return
    with tempfile.NamedTemporaryFile("w", prefix="dflow-", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        yield ["bash", file.name]
