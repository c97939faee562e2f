"""DAGs and versions: what makes a version, what changes with each parse, what is due."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text

from dflow.core.errors import NotFoundError
from dflow.core.spec import ScheduleSpec
from dflow.core.timetable import DueRun
from dflow.store import dag_files, dags, import_errors

from .world import T0, add_dag, day, spec

pytestmark = pytest.mark.integration
DAILY = ScheduleSpec(kind="cron", expression="0 0 * * *", summary="@daily")


@pytest.fixture
def tx(store):
    with store.begin() as tx:
        yield tx


def due(at):
    return DueRun(logical_date=at, interval_start=at, interval_end=at, run_after=at)


def test_a_first_parse_makes_dag_and_version(tx):
    dag = spec(tags=("x", "b"), schedule=DAILY, description="says", max_active_runs=3)
    made = add_dag(tx, dag, path="sub/d.py", bundle_hash="h1", paused=True)
    assert (made.number, made.is_new_dag, made.is_new_version, made.is_schedule_changed) == (1, True, True, True)
    row = dags.get(tx, "d")
    assert (row.version_id, row.bundle_hash, row.path, row.bundle_name) == (made.version_id, "h1", "sub/d.py", "dags")
    assert (row.tags, row.owners, row.schedule_summary, row.max_active_runs) == (["b", "x"], ["airflow"], "@daily", 3)
    assert row.is_active
    assert row.is_paused
    assert row.description == "says"
    assert row.next_run is None
    assert dags.get_spec(tx, made.version_id) == dag


def test_the_dag_says_itself_whether_it_starts_paused(tx):
    add_dag(tx, spec("p", is_paused_upon_creation=False), paused=True)
    assert not dags.get(tx, "p").is_paused


def test_a_parse_never_unpauses(tx):
    add_dag(tx, paused=False)
    dags.set_paused(tx, ["d"], True)
    add_dag(tx, spec(tags=("new",)), paused=False)
    assert dags.get(tx, "d").is_paused


def test_the_same_structure_is_the_same_version_with_newer_code(tx):
    first = add_dag(tx, bundle_hash="h1")
    again = add_dag(tx, bundle_hash="h2")
    assert (again.version_id, again.is_new_version, again.is_schedule_changed) == (first.version_id, False, False)
    assert dags.get(tx, "d").bundle_hash == "h2"
    assert [version.number for version in dags.versions(tx, "d")] == [1]


def test_an_old_structure_gets_its_version_back(tx):
    first = add_dag(tx, spec())
    second = add_dag(tx, spec(task_ids=("a", "b", "c")))
    third = add_dag(tx, spec())
    assert (first.number, second.number, third.number) == (1, 2, 1)
    assert third.version_id == first.version_id == dags.get(tx, "d").version_id
    assert [version.number for version in dags.versions(tx, "d")] == [2, 1]


def test_only_times_change_the_schedule(tx):
    add_dag(tx, spec(schedule=DAILY))
    assert not add_dag(tx, spec(schedule=DAILY, tags=("t",))).is_schedule_changed
    assert add_dag(tx, spec(schedule=replace(DAILY, expression="0 1 * * *"))).is_schedule_changed
    assert add_dag(tx, spec(schedule=replace(DAILY, expression="0 1 * * *"), start_date=T0)).is_schedule_changed


def test_removed_files_deactivate_and_a_new_parse_activates(tx):
    add_dag(tx, spec("one"), path="one.py")
    add_dag(tx, spec("two"), path="two.py")
    assert dags.deactivate_missing(tx, bundle_name="other", paths=[]) == []
    assert dags.deactivate_missing(tx, bundle_name="dags", paths=["two.py"]) == ["one"]
    assert dags.deactivate_missing(tx, bundle_name="dags", paths=["two.py"]) == []
    assert [dag.dag_id for dag in dags.list_(tx)] == ["two"]
    assert [dag.dag_id for dag in dags.list_(tx, active_only=False)] == ["one", "two"]
    assert add_dag(tx, spec("one"), path="one.py").is_schedule_changed
    assert dags.get(tx, "one").is_active
    assert dags.deactivate_missing(tx, bundle_name="dags", paths=[]) == ["one", "two"]


def test_a_dag_that_left_its_file_is_deactivated(tx):
    for dag_id in ("one", "two", "elsewhere"):
        add_dag(tx, spec(dag_id), path="e.py" if dag_id == "elsewhere" else "f.py")
    assert dags.deactivate_others_in_file(tx, bundle_name="dags", path="f.py", keep=["two"]) == ["one"]
    assert dags.locations(tx, ["one", "two", "elsewhere", "never"]) == {
        "two": ("dags", "f.py"),
        "elsewhere": ("dags", "e.py"),
    }


def test_a_new_bundle_is_new_code_for_all(tx):
    add_dag(tx, spec("one"))
    add_dag(tx, spec("two"), bundle_hash="h2")
    assert dags.set_bundle_hash(tx, bundle_name="dags", bundle_hash="h2") == 1
    assert {dag.bundle_hash for dag in dags.list_(tx)} == {"h2"}


def test_unknown_dags_get_a_suggestion(tx):
    add_dag(tx, spec("tz_report"))
    with pytest.raises(NotFoundError, match="Did you mean 'tz_report'"):
        dags.get(tx, "tz_reprot")
    with pytest.raises(NotFoundError, match="Did you mean 'tz_report'"):
        dags.set_paused(tx, ["tz_reports"], True)
    with pytest.raises(NotFoundError):
        dags.get_spec(tx, 4711)


def test_pausing_tells_what_changed(tx):
    add_dag(tx, spec("one"))
    add_dag(tx, spec("two"))
    assert dags.set_paused(tx, ["one", "two"], True) == ["one", "two"]
    assert dags.set_paused(tx, ["one", "two"], True) == []
    assert dags.set_paused(tx, ["two"], False) == ["two"]


def test_list_by_tag(tx):
    add_dag(tx, spec("one", tags=("x",)))
    add_dag(tx, spec("two"))
    assert [dag.dag_id for dag in dags.list_(tx, tag="x")] == ["one"]


def test_due_dags_longest_due_first(tx):
    for number, dag_id in enumerate(("late", "later", "paused", "gone", "future", "never")):
        add_dag(tx, spec(dag_id), path=f"{dag_id}.py")
        dags.set_next_run(tx, dag_id, due(day(-number)))
    dags.set_next_runs(tx, {"future": due(day(36_500)), "never": None})
    dags.set_paused(tx, ["paused"], True)
    dags.deactivate_missing(tx, bundle_name="dags", paths=["late.py", "later.py", "paused.py", "future.py", "never.py"])
    found = dags.lock_due(tx, 10)
    assert [dag.dag_id for dag in found] == ["later", "late"]
    assert found[0].next_run == due(day(-1))
    assert [dag.dag_id for dag in dags.lock_due(tx, 1)] == ["later"]


def test_due_dags_go_to_one_scheduler(store):
    with store.begin() as tx:
        add_dag(tx)
        dags.set_next_run(tx, "d", due(day(0)))
    with store.begin() as one, store.begin() as other:
        assert len(dags.lock_due(one, 10)) == 1
        assert dags.lock_due(other, 10) == []


def test_source_is_kept_once_and_the_last_parsed_is_shown(tx):
    version = add_dag(tx).version_id
    assert dags.get_code(tx, version) is None
    for sha in ("aa", "bb", "bb", "cc"):
        dags.put_code(tx, version, "d.py", sha, f"# {sha}")
    dag_files.put(
        tx, bundle_name="dags", path="d.py", sha256="bb", imports={"x.py": "1"}, dag_ids=["d"], duration_seconds=0.1
    )
    assert dags.get_code(tx, version).source == "# bb"
    assert tx.execute(text("SELECT count(*) FROM dag_code")).scalar_one() == 3


def test_files_and_import_errors(tx):
    for path in ("a.py", "b.py"):
        dag_files.put(
            tx, bundle_name="dags", path=path, sha256="1", imports={"x.py": "1"}, dag_ids=["d"], duration_seconds=0.1
        )
        import_errors.set_(tx, bundle_name="dags", path=path, message="bad\x00", traceback="tb")
    import_errors.set_(tx, bundle_name="dags", path="a.py", message="worse", traceback="tb2")
    errors = import_errors.list_(tx)
    assert [(error.path, error.message, error.traceback) for error in errors] == [
        ("a.py", "worse", "tb2"),
        ("b.py", "bad\ufffd", "tb"),
    ]
    assert import_errors.clear(tx, bundle_name="dags", path="b.py")
    assert not import_errors.clear(tx, bundle_name="dags", path="b.py")
    assert [(file.path, file.imports, file.dag_ids) for file in dag_files.list_(tx, "dags")] == [
        ("a.py", {"x.py": "1"}, ["d"]),
        ("b.py", {"x.py": "1"}, ["d"]),
    ]
    assert dag_files.forget_missing(tx, bundle_name="dags", paths=["b.py"]) == ["a.py"]
    assert import_errors.list_(tx, "dags") == []
