"""The command line as a program: exit codes, where text goes, no escape sequences, a quick start. Needs no service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Dflow = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dflow(tmp_path: Path) -> Dflow:
    """Run `dflow ARGUMENTS` with a home of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DFLOW")}

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dflow", *arguments],
            env={**inherited, "DFLOW_HOME": str(tmp_path / "home"), **(env or {})},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    return run


def test_version(dflow: Dflow) -> None:
    import dflow as package

    done = dflow("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{package.__version__}\n", "")
    assert dflow("--version").stdout == done.stdout


@pytest.mark.parametrize("noun", ["", "dags", "runs", "tasks", "pools", "config", "db", "worker", "dags trigger"])
def test_help_is_text_off_a_terminal(dflow: Dflow, noun: str) -> None:
    done = dflow(*noun.split(), "--help")
    assert done.returncode == 0
    assert "Usage: dflow" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_help_groups_every_command(dflow: Dflow) -> None:
    out = dflow("--help").stdout
    nouns = "standalone scheduler dag-processor worker flower dags runs tasks pools config db version info"
    for noun in nouns.split():
        assert f"│ {noun} " in out
    for part in ("Run dflow", "Work with DAGs", "Set up and look after", "Examples"):
        assert part in out


def test_starting_imports_nothing_heavy() -> None:
    code = (
        "import sys, dflow.cli.main\n"
        "heavy = {'sqlalchemy', 'celery', 'kombu', 'redis', 'rich', 'alembic', 'psycopg2', 'jsonschema', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_usage(dflow: Dflow) -> None:
    done = dflow("dgas")
    assert done.returncode == 2
    assert "Did you mean 'dags'" in done.stderr
    assert done.stdout == ""


def test_problems_of_settings_are_one_message_and_exit_2(dflow: Dflow) -> None:
    env = {"DFLOW__CORE__PARALLELISM": "many", "DFLOW__CORE__EXECUTER": "x"}
    done = dflow("config", "check", env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: 2 problems with the settings:\n  - ")
    assert "Traceback" not in done.stderr
    assert dflow("config", "check").returncode == 0


def test_debug_shows_the_traceback(dflow: Dflow) -> None:
    done = dflow("--debug", "config", "explain", "core.executer")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "did you mean executor" in done.stderr.splitlines()[-1]


def test_no_database_is_told_with_what_to_do(dflow: Dflow) -> None:
    done = dflow("dags", "list")
    assert done.returncode == 69
    assert done.stderr.startswith("Error: No database: none is set, and no `dflow standalone` runs with the home")
    assert "DFLOW__DATABASE__SQL_ALCHEMY_CONN" in done.stderr
    away = dflow("dags", "list", env={"DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://a:hunter2@127.0.0.1:1/x"})
    assert away.returncode == 69
    assert "127.0.0.1:1" in away.stderr
    assert "hunter2" not in away.stderr


def test_config_shows_values_without_secrets(dflow: Dflow) -> None:
    env = {"DFLOW__CELERY__BROKER_URL_CMD": "echo redis://:hunter2@cache", "DFLOW__CELERY__FLOWER_PORT": "6000"}
    rows = json.loads(dflow("config", "list", "--section", "celery", "--sources", "-o", "json", env=env).stdout)
    values = {row["key"]: row for row in rows}
    assert values["broker_url"]["value"] == "redis://:***@cache"
    assert values["broker_url"]["source"] == "environment variable DFLOW__CELERY__BROKER_URL_CMD"
    assert values["flower_port"]["value"] == "6000"
    explained = dflow("config", "explain", "celery.broker_url", env=env)
    assert "hunter2" not in explained.stdout + explained.stderr
    assert "redis://:***@cache" in explained.stdout
    assert dflow("config", "get-value", "celery", "broker_url", env=env).stdout == "redis://:hunter2@cache\n"


def test_one_broken_setting_does_not_hide_the_others(dflow: Dflow) -> None:
    env = {"DFLOW__CORE__PARALLELISM": "many"}
    assert dflow("config", "get-value", "core", "executor", env=env).stdout == "CeleryExecutor\n"
    assert dflow("config", "get-value", "core", "parallelism", env=env).returncode == 2
    listed = dflow("config", "list", env=env)
    assert listed.returncode == 2
    assert "CeleryExecutor" in listed.stdout
    assert "(invalid)" in listed.stdout


def test_the_generated_file_is_not_written_over_another(dflow: Dflow, tmp_path: Path) -> None:
    target = tmp_path / "home" / "dflow.cfg"
    assert dflow("config", "generate", "--file", str(target)).returncode == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert dflow("config", "check").returncode == 0
    again = dflow("config", "generate", "--file", str(target))
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "dflow", "config", "generate"],
            env={**os.environ, "DFLOW_HOME": str(tmp_path)},
            stdout=gone,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.stderr == b""
    assert done.returncode in {1, 141}


def test_completion(dflow: Dflow) -> None:
    env = {"_DFLOW_COMPLETE": "complete_bash", "COMP_WORDS": "dflow dags tr", "COMP_CWORD": "2"}
    assert dflow(env=env).stdout.split() == ["trigger"]


def test_sql_needs_no_database(dflow: Dflow) -> None:
    done = dflow("db", "sql")
    assert done.returncode == 0
    assert "CREATE TABLE task_instance" in done.stdout


def test_what_loses_data_is_not_done_without_a_yes(dflow: Dflow) -> None:
    done = dflow("db", "reset", env={"DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://a@127.0.0.1:1/x"})
    assert done.returncode == 1
    assert "Add --yes" in done.stderr


FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$@"
env | grep -E '^(DFLOW_|FLOWER_)' | sort
"""


@pytest.mark.parametrize("noun", ["worker", "flower"])
def test_worker_and_flower_become_celery(noun: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    arguments = {
        "worker": ["-q", "a,b", "-c", "3", "-n", "w1", "--autoscale", "4,2", "--without-gossip", "--pool=solo"],
        "flower": ["--max_tasks=10"],
    }[noun]
    code = f"import sys; sys.executable = {str(fake)!r}; sys.argv = ['dflow', {noun!r}, *{arguments!r}]\n"
    code += "from dflow.cli.main import run; run()"
    env = {
        **os.environ,
        "DFLOW_HOME": str(tmp_path),
        "DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://a@b/c",
        "DFLOW__CELERY__BROKER_URL_CMD": "echo redis://:hunter2@cache",
        "DFLOW__CELERY__FLOWER_BASIC_AUTH": "ann:hunter3",
        "DFLOW__CELERY__FLOWER_URL_PREFIX": "/flower/",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    argv = [line for line in lines if not line.startswith(("DFLOW_", "FLOWER_"))]
    assert argv[:5] == ["-m", "celery", "-A", "worker", noun]
    assert "hunter" not in " ".join(argv)
    assert "DFLOW__CELERY__BROKER_URL=redis://:hunter2@cache" in lines
    if noun == "worker":
        assert {"--queues=a,b", "--concurrency=3", "--hostname=w1@%h", "--autoscale=4,2"} < set(argv)
        assert argv[-2:] == ["--without-gossip", "--pool=solo"]
    else:
        assert {"--address=127.0.0.1", "--port=5555", "--url_prefix=flower", "--max_tasks=10"} < set(argv)
        assert "FLOWER_BASIC_AUTH=ann:hunter3" in lines
