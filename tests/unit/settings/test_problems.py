"""Everything that can be wrong is found in one go, names its place, says what was meant, and shows no secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from dflow.core.errors import SettingsError
from dflow.settings import command, load

NAME = "DFLOW__DATABASE__SQL_ALCHEMY_CONN"


def _problems(home: Path, env: dict[str, str] | None = None, text: str | None = None) -> list[str]:
    home.mkdir(exist_ok=True)
    if text is not None:
        (home / "dflow.cfg").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(home, env or {})
    return caught.value.problems


def _one(home: Path, env: dict[str, str] | None = None, text: str | None = None) -> str:
    problems = _problems(home, env, text)
    assert len(problems) == 1, problems
    return problems[0]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = "[core]\nparallelism = 99\nexecuter = LocalExecutor\n\n[databas]\nx = 1\n\n[worker]\nlease_seconds = 3\n"
    env = {"DFLOW__CORE__STORE_DAG_CODE": "maybe", "DFLOW__CORE__DEFAULT_TIMEZONE": "Europe/Berlni", "DFLOW__X": "1"}
    problems = "\n".join(_problems(tmp_path, env, text))
    for part in (
        "dflow.cfg:3: [core] has no setting executer; did you mean executor?",
        "dflow.cfg:5: there is no section [databas]; did you mean [database]?",
        "DFLOW__X: there is no section 'x'",
        "core.parallelism: 99 is out of range, it must be between 1 and 32 processes",
        "core.store_dag_code: 'maybe' is neither true nor false",
        "worker.lease_seconds: 3 is out of range, it must be at least 4 seconds",
        "core.default_timezone: 'Europe/Berlni' is not an IANA time zone; did you mean Europe/Berlin",
    ):
        assert part in problems
    assert len(problems.splitlines()) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DFLOW__CORE__EXECUTER", "did you mean DFLOW__CORE__EXECUTOR?"),
        ("DFLOW__CORE__SQL_ALCHEMY_CONN", "did you mean DFLOW__DATABASE__SQL_ALCHEMY_CONN?"),
        ("DFLOW__WORKR__LEASE_SECONDS", "did you mean DFLOW__WORKER__LEASE_SECONDS?"),
        ("dflow__core__executor", "capital letters: DFLOW__CORE__EXECUTOR"),
        ("DFLOW__CORE__EXECUTOR_CMD", "cannot come from a command; set DFLOW__CORE__EXECUTOR"),
        ("DFLOW__QQQQ", "`dflow config list`"),
    ],
)
def test_unknown_variables(tmp_path: Path, name: str, message: str) -> None:
    assert message in _one(tmp_path, {name: "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("executor = x\n", "dflow.cfg:1: a [section] must come before the first setting"),
        ("[core]\nparallelism 3 hunter2\n", "dflow.cfg:2: this line is neither"),
        ("[core]\nparallelism = 1\nparallelism = 2\n", "dflow.cfg:3: parallelism is there twice in section [core]"),
        ("[core]\n[core]\n", "dflow.cfg:2: section [core] is there twice"),
        ("[core]\nexecutor_cmd = hunter2\n", "dflow.cfg:2: [core] executor cannot come from a command"),
        ("[core]\nbroker_url = hunter2\n", "did you mean [celery] broker_url?"),
        ("[Core]\n", "did you mean [core]?"),
        ("[core]\nparallelism = 3 # three\n", "a comment needs a line of its own"),
        ("[core]\nexecutor = CeleryExecutr\n", "did you mean CeleryExecutor?"),
        ("[core]\ndags_folder =\n", "a path is expected"),
        ("[core]\ndags_folder = a\n  b\n", "several lines"),
        ("[core]\ndefault_task_retry_delay = nan\n", "'nan' is not a number of seconds"),
        ("[core]\ndefault_task_execution_timeout = 0\n", "write none"),
    ],
)
def test_problems_of_the_file(tmp_path: Path, text: str, message: str) -> None:
    problem = _one(tmp_path, text=text)
    assert message in problem
    assert "hunter2" not in problem


def test_the_file_itself(tmp_path: Path) -> None:
    assert "there is no such file" in _one(tmp_path, {"DFLOW_CONFIG": str(tmp_path / "gone.cfg")})
    (tmp_path / "dflow.cfg").write_bytes(b"[core]\nexecutor = \xff\n")
    assert "not UTF-8" in _one(tmp_path)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DFLOW__WORKER__KILL_GRACE": "30"}, "worker.kill_grace: must be less than worker.lease_seconds"),
        ({"DFLOW__SCHEDULER__HEALTH_CHECK_PORT": "5555"}, "port 5555 is already that of scheduler.health_check_port"),
        ({"DFLOW__CORE__MAX_TASK_RETRY_DELAY": "1"}, "must not be less than core.default_task_retry_delay"),
        ({"DFLOW__CELERY__QUEUE_PREFIX": "a b"}, "celery.queue_prefix: only letters"),
        ({"DFLOW__CELERY__FLOWER_BASIC_AUTH": "hunter2"}, "celery.flower_basic_auth: expected user:password"),
        ({"DFLOW__CELERY__BROKER_URL": "amqp://u:hunter2@h"}, "'amqp' is not supported"),
        ({NAME: "sqlite:///hunter2.db"}, "'sqlite' is not supported"),
        ({NAME: "hunter2"}, "this is not an address"),
        ({NAME: "postgresql://ann:hunter2@db:port/x"}, "the address cannot be read"),
    ],
)
def test_checks_between_settings_and_of_addresses(tmp_path: Path, env: dict[str, str], message: str) -> None:
    problem = _one(tmp_path, env)
    assert message in problem
    assert "hunter2" not in problem


PYTHON = f"{sys.executable} -c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{PYTHON} \"import sys; print('hunter2'); print('hunter2', file=sys.stderr); sys.exit(7)\"", "exit code 7"),
        (f'{PYTHON} "import os; os.kill(os.getpid(), 9)"', "killed by signal 9 (SIGKILL)"),
        ("/nowhere/hunt --token hunter2", "'/nowhere/hunt' cannot be started: No such file"),
        (f"{PYTHON} \"print('hunter2\\nhunter2')\"", "more than one line"),
        (f'{PYTHON} "pass"', "printed nothing"),
        (f"{PYTHON} \"import os; os.write(1, b'hunter2' * 100000)\"", "more than 65536 bytes"),
        (f"{PYTHON} \"import os; os.write(1, b'hunter2' + bytes([255]))\"", "not UTF-8"),
        ("", "the command is empty"),
        ("echo 'hunter2", "cannot be split into words"),
        ("echo hunter2", "this is not an address"),
    ],
)
def test_a_failing_command_names_the_setting_and_never_shows_anything(tmp_path: Path, text: str, message: str) -> None:
    problem = _one(tmp_path, {f"{NAME}_CMD": text})
    assert "database.sql_alchemy_conn" in problem
    assert message in problem
    assert "hunter2" not in problem


def test_a_slow_command_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", 0.5)
    pid_file = tmp_path / "pid"  # of a child of the command
    env = {"PATH": os.environ["PATH"], f"{NAME}_CMD": f"sh -c 'sleep 1000 & echo $! > {pid_file}; sleep 1000'"}
    problem = _one(tmp_path, env)
    assert "database.sql_alchemy_conn: the command 'sh' took longer than 0.5 seconds" in problem
    try:
        child = psutil.Process(int(pid_file.read_text()))
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE  # nobody may be there to reap it
    except psutil.NoSuchProcess:
        pass


def test_a_command_that_closes_its_output_and_stays_is_slow_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", 0.5)
    text = f'{PYTHON} "import os, time; os.close(1); time.sleep(1000)"'
    assert "took longer" in _one(tmp_path, {f"{NAME}_CMD": text})


def test_a_command_that_asks_for_itself_ends(tmp_path: Path) -> None:
    ask = f'{PYTHON} "import dflow.settings; print(dflow.settings.load().database.sql_alchemy_conn)"'
    env = {"DFLOW_HOME": str(tmp_path), f"{NAME}_CMD": ask}
    assert "exit code 1" in _one(tmp_path, env)


def test_a_command_gets_its_output_without_the_line_break(tmp_path: Path) -> None:
    env = {"DFLOW__CELERY__FLOWER_BASIC_AUTH_CMD": "echo 'ann:p%w $HOME;x'"}
    assert load(tmp_path, env).celery.flower_basic_auth == "ann:p%w $HOME;x"
