"""The dag-processor against a real Postgres: what becomes of a folder as people change it."""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from dflow.core.states import RunType
from dflow.services import bundle_pass, retries
from dflow.services.dag_processor import DagProcessor
from dflow.settings import Settings
from dflow.store import bundles, dag_files, dags, import_errors, locks, runs
from dflow.store.engine import Store
from tests.support import Cluster, eventually

pytestmark = pytest.mark.integration


def dag_file(*dag_ids: str, tasks: str = "a", schedule: str = "None", top: str = "") -> str:
    """The source of a DAG file."""
    lines = ["from dflow import DAG, EmptyOperator", top]
    for dag_id in dag_ids:
        lines.append(f"with DAG({dag_id!r}, schedule={schedule}, catchup=False):")
        lines += [f"    EmptyOperator(task_id={task!r})" for task in tasks.split()]
    return "\n".join(lines) + "\n"


class World:
    """A DAG folder, a dag-processor over it, and what the database says."""

    def __init__(self, store: Store, make_settings: Callable[..., Settings], tmp_path: Path) -> None:
        self.store = store
        self._make_settings = make_settings
        self.folder = tmp_path / "dags"
        self.settings = make_settings()
        self.processor = DagProcessor(store, self.settings)

    def restart(self, **values: str) -> None:
        self.settings = self._make_settings({key.replace("__", "."): value for key, value in values.items()})
        self.processor = DagProcessor(self.store, self.settings)

    def write(self, path: str, source: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)

    def run(self) -> dict[str, int]:
        """Passes until nothing is left over."""
        counts = dict(self.processor.run_once())
        while counts.get("pending"):
            counts = {**counts, "pending": 0, **self.processor.run_once()}
        return counts

    def dag(self, dag_id: str) -> dags.Dag:
        return self.store.run(lambda tx: dags.get(tx, dag_id))

    def active(self) -> set[str]:
        return {dag.dag_id for dag in self.store.run(lambda tx: dags.list_(tx))}

    def errors(self) -> dict[str, str]:
        return {row.path: row.message for row in self.store.run(lambda tx: import_errors.list_(tx))}

    def versions(self, dag_id: str) -> int:
        return len(self.store.run(lambda tx: dags.versions(tx, dag_id)))

    def files(self) -> dict[str, dag_files.DagFile]:
        return {row.path: row for row in self.store.run(lambda tx: dag_files.list_(tx, "dags"))}

    def manifest(self, dag_id: str) -> dict[str, str]:
        bundle_hash = self.dag(dag_id).bundle_hash
        assert bundle_hash is not None
        return self.store.run(lambda tx: bundles.manifest(tx, bundle_hash))

    def count(self, sql: str) -> int:
        return int(self.store.run(lambda tx: tx.execute(text(sql)).scalar_one()))


@pytest.fixture
def world(store: Store, make_settings: Callable[..., Settings], tmp_path: Path) -> World:
    return World(store, make_settings, tmp_path)


def test_a_new_file_becomes_a_dag_with_its_code(world: World) -> None:
    source = dag_file("etl", tasks="a b")
    world.write("team/etl.py", source)
    world.write("sql/load.sql", "SELECT 1")
    counts = world.run()
    assert counts["parsed"] == 1
    assert counts["blobs"] == 2
    dag = world.dag("etl")
    assert (dag.is_active, dag.path, dag.bundle_name) == (True, "team/etl.py", "dags")
    assert world.manifest("etl") == {
        "sql/load.sql": hashlib.sha256(b"SELECT 1").hexdigest(),
        "team/etl.py": hashlib.sha256(source.encode()).hexdigest(),
    }
    assert dag.version_id is not None
    code = world.store.run(lambda tx: dags.get_code(tx, dag.version_id or 0))
    assert code is not None
    assert code.source == source


def test_an_idle_pass_does_nothing(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.write("broken.py", "import dflow, dag_nonsense")
    world.run()
    assert world.run() == {}


def test_a_restarted_processor_parses_only_what_failed(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.write("broken.py", "import dflow, dag_nonsense")
    world.run()
    world.restart()
    assert world.run().get("parsed") == 1
    assert world.run() == {}


def test_one_changed_file_stores_one_blob_and_parses_one_file(world: World) -> None:
    for number in range(30):
        world.write(f"dag_{number}.py", dag_file(f"d{number}"))
    assert world.run()["blobs"] == 30
    world.write("dag_7.py", dag_file("d7", tasks="a b"))
    counts = world.run()
    assert (counts["blobs"], counts["parsed"], counts["new_versions"]) == (1, 1, 1)
    hashes = {world.dag(f"d{number}").bundle_hash for number in range(30)}
    assert len(hashes) == 1, "every DAG of the bundle is pinned to the new code"


def test_a_change_that_is_not_of_the_structure_makes_no_version(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    before = world.dag("etl")
    world.write("etl.py", dag_file("etl") + "# a comment\n")
    world.run()
    after = world.dag("etl")
    assert (world.versions("etl"), after.version_id) == (1, before.version_id)
    assert after.bundle_hash != before.bundle_hash


def test_a_structure_seen_before_gets_its_version_back(world: World) -> None:
    for tasks in ("a", "a b", "a"):
        world.write("etl.py", dag_file("etl", tasks=tasks))
        world.run()
    assert world.versions("etl") == 2


def test_a_broken_file_leaves_the_last_good_version_live(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.write("other.py", dag_file("other"))
    world.run()
    good = world.dag("etl")
    world.write("etl.py", "from dflow import DAG\nraise ValueError('oops')\n")
    assert world.run()["failed"] == 1
    assert world.errors() == {"etl.py": "etl.py:2: ValueError: oops"}
    now = world.dag("etl")
    assert (now.is_active, now.version_id) == (True, good.version_id)
    assert now.bundle_hash == good.bundle_hash, "its runs keep the code that worked"
    assert world.dag("other").bundle_hash != good.bundle_hash
    world.write("etl.py", dag_file("etl", tasks="a b"))
    world.run()
    assert world.errors() == {}
    assert world.dag("etl").bundle_hash == world.dag("other").bundle_hash


def test_the_same_error_keeps_its_time(world: World) -> None:
    world.write("etl.py", "import dflow, dag_nonsense")
    world.run()
    before = world.store.run(lambda tx: import_errors.list_(tx))
    world.restart()
    world.run()
    assert world.store.run(lambda tx: import_errors.list_(tx)) == before


def test_who_imports_a_changed_module_is_parsed_again(world: World) -> None:
    world.write("lib/names.py", "TASKS = ['a']\n")
    looping = "from dflow import DAG, EmptyOperator\nfrom lib import names\nwith DAG('etl'):\n"
    world.write("etl.py", looping + "    for name in names.TASKS: EmptyOperator(task_id=name)\n")
    world.write("other.py", dag_file("other"))
    world.run()
    assert "lib/names.py" in world.files()["etl.py"].imports
    world.write("lib/names.py", "TASKS = ['a', 'b']\n")
    counts = world.run()
    assert (counts["parsed"], counts["new_versions"]) == (1, 1)
    world.write("lib/names.py", "raise RuntimeError('broken')\n")
    world.run()
    assert "RuntimeError: broken" in world.errors()["etl.py"]
    assert world.active() == {"etl", "other"}


def test_a_file_that_lacked_a_module_is_parsed_when_it_comes(world: World) -> None:
    world.write("etl.py", dag_file("etl", top="import late_module"))
    world.run()
    assert "No module named 'late_module'" in world.errors()["etl.py"]
    world.write("late_module.py", "")
    world.run()
    assert world.errors() == {}
    assert world.active() == {"etl"}


def test_a_file_that_reads_a_folder_is_parsed_when_a_file_is_added_there(world: World) -> None:
    top = "import os\nnames = os.listdir(os.path.join(os.path.dirname(__file__), 'conf'))"
    world.write("conf/one.yaml", "")
    source = dag_file(top=top) + "for name in names:\n    with DAG(name.split('.')[0]): EmptyOperator(task_id='a')\n"
    world.write("factory.py", source)
    world.run()
    world.write("conf/two.yaml", "")
    world.run()
    assert world.active() == {"one", "two"}


def test_dags_and_files_that_left_are_deactivated_and_come_back(world: World) -> None:
    world.write("both.py", dag_file("one", "two"))
    world.write("third.py", dag_file("three"))
    world.run()
    world.write("both.py", dag_file("one"))
    (world.folder / "third.py").unlink()
    assert world.run()["deactivated"] == 2
    assert world.active() == {"one"}
    assert set(world.files()) == {"both.py"}
    world.write("third.py", dag_file("three"))
    world.run()
    assert world.active() == {"one", "three"}
    assert world.versions("three") == 1


def test_a_file_that_is_no_dag_file_any_more_lets_go_of_its_dags(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    world.write("etl.py", "x = 1\n")
    world.run()
    assert world.active() == set()


def test_the_error_of_a_removed_file_goes_with_it(world: World) -> None:
    world.write("etl.py", "import dflow, dag_nonsense")
    world.run()
    assert world.errors()
    (world.folder / "etl.py").unlink()
    world.write("other.py", dag_file("other"))
    world.run()
    assert world.errors() == {}


def test_a_folder_that_is_not_there_deactivates_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    shutil.move(world.folder, world.folder.with_name("away"))
    assert world.run() == {"unavailable": 1}
    assert world.run() == {"unavailable": 1}
    assert caplog.text.count("cannot be read: No such file or directory; its DAGs stay as they are") == 1
    world.folder.mkdir()  # an empty mount point
    assert world.run() == {"unavailable": 1}
    assert "is empty; its DAGs stay as they are" in caplog.text
    world.restart()
    assert world.run() == {"unavailable": 1}
    assert world.active() == {"etl"}


def test_a_folder_that_was_emptied_is_believed(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    (world.folder / "etl.py").unlink()
    world.run()
    assert world.active() == set()


def test_an_unreadable_file_keeps_its_dags(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from dflow.services import bundle_scan

    world.write("etl.py", dag_file("etl"))
    world.write("other.py", dag_file("other"))
    world.run()
    real = bundle_scan._read

    def refuse(file: Path):
        if file.name == "etl.py":
            raise PermissionError(13, "Permission denied")
        return real(file)

    monkeypatch.setattr(bundle_scan, "_read", refuse)
    world.restart()  # it knows nothing of the file's content
    world.run()
    assert world.active() == {"etl", "other"}
    assert world.errors() == {"etl.py": "etl.py cannot be read: Permission denied"}
    monkeypatch.setattr(bundle_scan, "_read", real)
    world.run()
    assert world.errors() == {}


def test_a_dag_id_belongs_to_the_file_that_had_it_first(world: World) -> None:
    world.write("first.py", dag_file("shared"))
    world.run()
    world.write("a_second.py", dag_file("shared", "own"))
    world.run()
    assert world.dag("shared").path == "first.py"
    assert world.active() == {"shared", "own"}
    assert world.errors() == {
        "a_second.py": "a_second.py: the DAG 'shared' is defined in first.py already; "
        "give one of the two another dag_id"
    }
    (world.folder / "first.py").unlink()
    world.run()
    assert world.dag("shared").path == "a_second.py"
    assert world.errors() == {}


def test_dags_may_move_and_trade_places_in_one_pass(world: World) -> None:
    world.write("a.py", dag_file("x"))
    world.write("b.py", dag_file("y"))
    world.run()
    world.write("a.py", dag_file("y"))
    world.write("b.py", dag_file("x"))
    world.run()
    assert (world.dag("x").path, world.dag("y").path) == ("b.py", "a.py")
    assert world.active() == {"x", "y"}
    assert world.errors() == {}
    world.write("b.py", dag_file("z"))
    world.write("c.py", dag_file("x"))
    world.run()
    assert world.dag("x").path == "c.py"
    assert world.errors() == {}


def test_a_new_schedule_gives_a_new_next_run(world: World) -> None:
    world.write("etl.py", dag_file("etl", schedule="'@daily'"))
    world.run()
    daily = world.dag("etl").next_run_after
    assert daily is not None
    assert daily > datetime.now(UTC)
    world.write("etl.py", dag_file("etl", schedule="'0 3 1 1 *'"))
    world.run()
    yearly = world.dag("etl").next_run_after
    assert yearly is not None
    assert (yearly.month, yearly.day, yearly.hour) == (1, 1, 3)
    world.write("etl.py", dag_file("etl", tasks="a b", schedule="'0 3 1 1 *'"))
    world.run()
    assert world.dag("etl").next_run_after == yearly
    world.write("etl.py", dag_file("etl"))
    world.run()
    assert world.dag("etl").next_run_after is None


def test_a_reactivated_dag_goes_on_after_its_last_run(world: World) -> None:
    world.write("keep.py", dag_file("keep"))
    world.write("etl.py", dag_file("etl", schedule="'@once'"))
    world.run()
    once = world.dag("etl").next_run
    assert once is not None
    world.store.run(
        lambda tx: runs.create(
            tx,
            dag_id="etl",
            run_id=None,
            run_type=RunType.SCHEDULED,
            logical_date=once.logical_date,
            data_interval_start=once.interval_start,
            data_interval_end=once.interval_end,
            run_after=once.run_after,
            conf={},
            triggered_by="timetable",
        )
    )
    for source in (None, dag_file("etl", schedule="'@once'")):
        (world.folder / "etl.py").unlink() if source is None else world.write("etl.py", source)
        world.run()
    assert world.dag("etl").is_active
    assert world.dag("etl").next_run_after is None


@pytest.mark.parametrize(("paused", "said", "expected"), [("true", "", True), ("true", "False", False)])
def test_new_dags_start_paused_unless_they_say_otherwise(world: World, paused: str, said: str, expected: bool) -> None:
    world.restart(core__dags_are_paused_at_creation=paused)
    argument = f", is_paused_upon_creation={said}" if said else ""
    world.write("etl.py", f"from dflow import DAG\nd = DAG('etl'{argument})\n")
    world.run()
    assert world.dag("etl").is_paused is expected


def test_source_is_kept_for_display_only_when_wanted(world: World) -> None:
    world.restart(core__store_dag_code="false")
    world.write("etl.py", dag_file("etl"))
    world.run()
    assert world.count("SELECT count(*) FROM dag_code") == 0
    assert world.count("SELECT count(*) FROM code_blob") == 1, "workers need it in any case"


def test_examples_come_and_go_with_their_setting(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.restart(core__load_examples="true")
    world.run()
    assert {"etl", "tz_report", "example_hello"} <= world.active()
    assert world.errors() == {}
    assert not world.dag("tz_report").is_paused
    world.restart(core__load_examples="false")
    world.run()
    assert world.active() == {"etl"}


def test_an_example_is_no_obstacle_once_it_is_switched_off(world: World) -> None:
    world.restart(core__load_examples="true")
    world.run()
    world.write("mine.py", dag_file("example_hello"))
    world.run()
    assert "is defined in hello.py of the bundle 'examples' already" in world.errors()["mine.py"]
    world.restart(core__load_examples="false")
    world.run()
    assert world.dag("example_hello").bundle_name == "dags"
    assert world.errors() == {}


def test_rows_that_somebody_deleted_are_written_anew(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    world.store.run(lambda tx: tx.execute(text("DELETE FROM dag")))
    world.run()
    assert world.active() == {"etl"}
    tables = "dag, dag_version, dag_code, dag_file, import_error, bundle, code_blob"
    world.store.run(lambda tx: tx.execute(text(f"TRUNCATE {tables}")))
    world.run()
    assert world.active() == {"etl"}
    assert list(world.manifest("etl")) == ["etl.py"]


def test_what_was_parsed_is_what_was_stored(world: World) -> None:
    """A file that reads itself sees the stored bytes although the folder has changed meanwhile."""
    where = world.folder / "etl.py"
    world.write(
        "etl.py",
        f"from pathlib import Path\nPath({str(where)!r}).write_text('changed')\n"
        "from dflow import DAG\nd = DAG('etl', description=Path(__file__).read_text()[:12])\n",
    )
    world.run()
    spec = world.store.run(lambda tx: dags.get_spec(tx, world.dag("etl").version_id or 0))
    assert spec.description == "from pathlib"


def test_a_file_that_changes_while_it_is_stored_is_stored_as_it_is_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write("etl.py", dag_file("etl"))
    world.write("gone.py", dag_file("gone"))
    changed = dag_file("etl", tasks="a b")
    real = bundles.missing_blobs

    def missing_blobs(tx, shas):
        world.write("etl.py", changed)
        (world.folder / "gone.py").unlink(missing_ok=True)
        return real(tx, shas)

    monkeypatch.setattr(bundles, "missing_blobs", missing_blobs)
    world.run()
    assert world.manifest("etl") == {"etl.py": hashlib.sha256(changed.encode()).hexdigest()}
    assert world.active() == {"etl"}
    assert world.run() == {}


def test_other_defaults_make_other_dags_of_the_same_files(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.run()
    world.restart(operators__default_queue="heavy")
    assert world.run()["parsed"] == 1
    spec = world.store.run(lambda tx: dags.get_spec(tx, world.dag("etl").version_id or 0))
    assert spec.tasks[0].queue == "heavy"
    world.restart(operators__default_queue="heavy")
    assert world.run() == {}


def test_a_locked_bundle_is_left_to_the_other_processor(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    with locks.bundle_lock(world.store, "dags") as is_ours:
        assert is_ours
        assert world.run() == {"locked": 1}
    assert world.run()["parsed"] == 1


def test_two_processors_side_by_side_corrupt_nothing(world: World) -> None:
    for number in range(12):
        world.write(f"dag_{number}.py", dag_file(f"d{number}"))
    processors = [DagProcessor(world.store, world.settings) for _ in range(2)]
    failures: list[BaseException] = []

    def work(processor: DagProcessor) -> None:
        try:
            for number in range(6):
                processor.run_once()
                world.write(f"dag_{number}.py", dag_file(f"d{number}", tasks="a b"))
        except Exception as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(processor,)) for processor in processors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    world.run()
    assert world.active() == {f"d{number}" for number in range(12)}
    for number in range(6):
        version_id = world.dag(f"d{number}").version_id or 0
        assert [task.task_id for task in world.store.run(lambda tx, v=version_id: dags.get_spec(tx, v)).tasks] == [
            "a",
            "b",
        ]
    assert len({world.dag(f"d{number}").bundle_hash for number in range(12)}) == 1


def test_a_pass_is_bounded_and_the_next_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_pass, "BUDGET_SECONDS", 0.0)
    for number in range(8):
        world.write(f"dag_{number}.py", dag_file(f"d{number}"))
    first = world.processor.run_once()
    assert 1 <= first["parsed"] < 8
    assert first["pending"] == 8 - first["parsed"]
    world.run()
    assert len(world.active()) == 8


def test_a_failed_file_is_tried_again_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = tmp_path / "installed"
    world.write("etl.py", dag_file("etl", top=f"open({str(flag)!r})"))
    world.run()
    assert world.errors()
    flag.touch()
    assert world.run() == {}, "nothing changed in the folder, and its time has not come"
    monkeypatch.setattr(retries.Retries, "_is_due", lambda self, path: True)
    world.run()
    assert world.active() == {"etl"}
    assert world.errors() == {}


def test_no_user_module_is_in_the_processor_after_a_pass(world: World) -> None:
    world.write("etl.py", dag_file("etl", top="import user_helper_module\nimport colorsys"))
    world.write("user_helper_module.py", "")
    world.restart(core__load_examples="true")
    before = set(sys.modules)
    world.run()
    assert {"etl", "tz_report"} <= world.active()
    new = set(sys.modules) - before
    assert not {name for name in new if "etl" in name or "user_helper" in name or name == "colorsys"}
    assert not {name for name in sys.modules if name.startswith(("dflow.examples.", "dflow_dag_"))}


def test_an_outage_of_the_database_is_survived(world: World) -> None:
    world.write("etl.py", dag_file("etl"))
    world.store.close()
    world.run()
    assert world.active() == {"etl"}


HANGING = """
import os, subprocess, sys, time
from dflow import DAG
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleeper)
subprocess.Popen(sleeper, start_new_session=True)
open({flag!r}, "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_all_its_sandboxes(make_cluster: Callable[..., Cluster], tmp_path: Path, number: int) -> None:
    cluster = make_cluster({"core.dagbag_import_timeout": "500", "dag_processor.dag_file_processor_timeout": "500"})
    flag = tmp_path / "began"
    cluster.add_dag("good.py", dag_file("good"))
    cluster.add_dag("hang.py", HANGING.format(flag=str(flag)))
    processor = cluster.dag_processor()
    cluster.wait_dag("good")
    eventually(flag.exists)
    assert len(cluster.marked_processes()) >= 5
    cluster.kill(processor, signal.Signals(number))
    code = processor.process.wait(timeout=30)
    assert code == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    eventually(lambda: not cluster.marked_processes(), 15, message="nothing is left behind")


def test_the_process_tells_that_it_makes_progress(cluster: Cluster) -> None:
    cluster.add_dag("good.py", dag_file("good"))
    cluster.dag_processor()
    cluster.wait_dag("good")
    query = "SELECT health_url FROM service WHERE kind = 'dag-processor' AND ended_at IS NULL"
    url = eventually(lambda: cluster.rows(query))[0].health_url
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
        assert answer.status == 200
    cluster.add_dag("good.py", dag_file("good", tasks="a b"))
    eventually(lambda: cluster.count("SELECT count(*) FROM dag_version WHERE dag_id = 'good'") == 2)
