"""The five steps, in their order, for every combination of sources."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from dflow.core.errors import NotFoundError, SettingsError
from dflow.settings import load

URL = "postgresql://ann:{}@db/dflow"
PRINT = f"{sys.executable} -c \"print('{URL}')\""
NAME = "DFLOW__DATABASE__SQL_ALCHEMY_CONN"


def _write(home: Path, text: str) -> None:
    home.mkdir(exist_ok=True)
    (home / "dflow.cfg").write_text(text)


@pytest.mark.parametrize(
    "present", [set(c) for n in range(5) for c in itertools.combinations((1, 2, 3, 4), n)], ids=str
)
def test_the_first_source_present_wins_and_the_others_are_remembered(tmp_path: Path, present: set[int]) -> None:
    env = {}
    if 1 in present:
        env[NAME] = URL.format(1)
    if 2 in present:
        env[f"{NAME}_CMD"] = PRINT.format(2)
    lines = ["[database]"]
    if 3 in present:
        lines.append(f"sql_alchemy_conn = {URL.format(3)}")
    if 4 in present:
        lines.append(f"sql_alchemy_conn_cmd = {PRINT.format(4)}")
    _write(tmp_path, "\n".join(lines))

    settings = load(tmp_path, env)

    first = min(present | {5})
    assert settings.database.sql_alchemy_conn == (URL.format(first) if first < 5 else "")
    explained = settings.explain("database", "sql_alchemy_conn")
    assert [explained.winner.step, *(loser.step for loser in explained.losers)] == sorted(present | {5})
    assert explained.shown == (URL.format("***") if first < 5 else "")


def test_a_losing_command_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    settings = load(tmp_path, {NAME: URL.format(1), f"{NAME}_CMD": f"touch {trace}"})
    assert settings.database.sql_alchemy_conn == URL.format(1)
    assert not trace.exists()


def test_an_empty_variable_counts_as_set(tmp_path: Path) -> None:
    _write(tmp_path, "[celery]\nqueue_prefix = blue.\n")
    assert load(tmp_path, {}).celery.queue_prefix == "blue."
    assert load(tmp_path, {"DFLOW__CELERY__QUEUE_PREFIX": ""}).celery.queue_prefix == ""


def test_an_empty_number_is_an_error_that_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"core\.parallelism: an empty value .*DFLOW__CORE__PARALLELISM"):
        load(tmp_path, {"DFLOW__CORE__PARALLELISM": ""})


def test_children_see_the_same_values_without_running_commands(tmp_path: Path) -> None:
    env = {f"{NAME}_CMD": PRINT.format("pw"), "DFLOW__WORKER__LEASE_SECONDS": "12.5"}
    settings = load(tmp_path, env)
    child_env = settings.as_env()
    assert not any(name.endswith("_CMD") for name in child_env)
    assert load(env={**child_env, f"{NAME}_CMD": "false"}) == settings


def test_home_and_file_come_from_the_environment(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.cfg"
    elsewhere.write_text("[core]\nparallelism = 3\n")
    settings = load(env={"DFLOW_HOME": str(tmp_path / "home"), "DFLOW_CONFIG": str(elsewhere)})
    assert (settings.home, settings.config_file) == (tmp_path / "home", elsewhere)
    assert settings.core.parallelism == 3
    assert settings.explain("core", "parallelism").winner.source == f"{elsewhere}:2"


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert load(tmp_path, {}).core.dags_folder == tmp_path / "dags"
    assert load(tmp_path, {"DFLOW__CORE__DAGS_FOLDER": "~/dags"}).core.dags_folder == Path("/home/ann/dags")
    assert load(tmp_path, {"DFLOW__CORE__DAGS_FOLDER": "{home}/../x"}).core.dags_folder == tmp_path.parent / "x"
    assert load(tmp_path, {"DFLOW__CORE__DAGS_FOLDER": "sub"}).core.dags_folder == tmp_path / "sub"
    assert load(env={}).home == Path("/home/ann/.dflow")


def test_values_given_in_the_program_are_checked_and_remembered(tmp_path: Path) -> None:
    settings = load(tmp_path, {})
    changed = settings.with_values(
        {"core.executor": "localexecutor", "celery.flower_port": 6000}, source="option --executor"
    )
    assert (changed.core.executor, changed.celery.flower_port) == ("LocalExecutor", 6000)
    assert changed.explain("core", "executor").winner.source == "option --executor"
    assert changed.explain("core", "executor").losers[0].step == 5
    assert settings.core.executor == "CeleryExecutor"
    with pytest.raises(SettingsError, match="flower_port"):
        settings.with_values({"celery.flower_port": 0}, source="test")


def test_unknown_names_asked_for(tmp_path: Path) -> None:
    settings = load(tmp_path, {})
    assert settings.value("CORE", "Executor") == "CeleryExecutor"
    with pytest.raises(NotFoundError, match="did you mean executor"):
        settings.explain("core", "executer")
    with pytest.raises(NotFoundError, match="did you mean core"):
        settings.value("cores", "executor")
