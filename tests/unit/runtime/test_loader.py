"""Importing DAG files by path: what is found, what is left behind, what an error says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dflow.core.errors import DagImportError
from dflow.core.states import Reason
from dflow.runtime.loader import LoadedFile, load_dags
from tests.unit.runtime.support_attempts import attempt


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def load(root: Path, name: str = "my_dag") -> LoadedFile:
    return load_dags(root / f"{name}.py", bundle_root=root)


def test_finds_dags_of_variables_blocks_and_calls(tmp_path: Path) -> None:
    write(
        tmp_path,
        my_dag="""
from dflow import DAG, dag, EmptyOperator
variable = DAG("variable")
with DAG("block"): EmptyOperator(task_id="a")
with DAG("hidden", auto_register=False): EmptyOperator(task_id="a")
def make():
    with DAG("made"): EmptyOperator(task_id="a")
make()
@dag
def called(): EmptyOperator(task_id="a")
called()
@dag
def not_called(): EmptyOperator(task_id="a")
for n in range(2):
    with DAG(f"loop_{n}"): EmptyOperator(task_id="a")
""",
    )
    loaded = load(tmp_path)
    assert sorted(loaded.dags) == ["block", "called", "loop_0", "loop_1", "made", "variable"]
    assert {d.fileloc for d in loaded.dags.values()} == {str(tmp_path / "my_dag.py")}


def test_dags_made_while_importing_another_module_are_not_this_file_s(tmp_path: Path) -> None:
    write(
        tmp_path,
        other="from dflow import DAG\nwith DAG('other'): pass\nshared = DAG('shared')\n"
        "def factory(name):\n    with DAG(name): pass\n",
        my_dag="from other import factory, shared\nfactory('mine')\n",
    )
    assert sorted(load(tmp_path).dags) == ["mine", "shared"]


def test_nothing_leaks_and_imports_are_known(tmp_path: Path) -> None:
    write(
        tmp_path,
        my_dag="import helper, pkg.deep, json, sys\nfrom dflow import DAG\ndag = DAG(helper.NAME)\n"
        "sys.path.append('/x')\n",
        helper="NAME = 'd'\n",
        pkg__deep="import helper\n",
        unused="",
    )
    modules, path = set(sys.modules), list(sys.path)
    loaded = load(tmp_path)
    assert sys.path == path
    assert not {
        name for name in set(sys.modules) - modules if name in ("helper", "pkg", "pkg.deep", "dflow_dag_my_dag")
    }
    assert loaded.imports == {tmp_path / name for name in ("my_dag.py", "helper.py", "pkg/deep.py")}
    with loaded.active():
        assert "helper" in sys.modules
        assert sys.path[:2] == [str(tmp_path), path[0]]
        assert sys.path[-1] == "/x"
        inside = list(sys.path)
        with loaded.active():
            assert sys.path == inside
        assert "helper" in sys.modules
        assert sys.path == inside
    assert "helper" not in sys.modules
    assert sys.path == path
    assert not list(tmp_path.rglob("__pycache__"))
    loaded.unload()
    assert not loaded.dags


def test_two_versions_of_a_bundle_live_side_by_side(tmp_path: Path) -> None:
    source = """
import helper
from dflow import DAG, task
with DAG("d"):
    @task
    def early(): return helper.VERSION
    @task
    def late():
        import later
        return later.VERSION
    early(), late()
"""
    for version in ("one", "two"):
        write(tmp_path / version, my_dag=source, helper=f"VERSION = {version!r}", later=f"VERSION = {version!r}")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for _ in range(2):
        for loaded, version in ((one, "one"), (two, "two")):
            for task_id in ("early", "late"):
                assert attempt(loaded.dags["d"], task_id).xcoms == {"return_value": version}
    assert "later" not in sys.modules


def test_module_of_the_bundle_wins_over_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    outer = types.ModuleType("my_helper")
    monkeypatch.setitem(sys.modules, "my_helper", outer)
    write(tmp_path, my_dag="import my_helper\nfrom dflow import DAG\ndag = DAG(my_helper.NAME)", my_helper="NAME = 'd'")
    assert list(load(tmp_path).dags) == ["d"]
    assert sys.modules["my_helper"] is outer


def test_file_in_a_folder_sees_its_neighbours_and_the_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        sub__my_dag="import near, far\nfrom dflow import DAG\ndag = DAG(near.A + far.B)",
        sub__near="A = 'a'",
        far="B = 'b'",
    )
    assert list(load(tmp_path, "sub/my_dag").dags) == ["ab"]


def test_a_changed_file_is_read_again_at_once(tmp_path: Path) -> None:
    write(tmp_path, my_dag="import helper\nfrom dflow import DAG\ndag = DAG(helper.A)", helper="A = 'a'")
    assert list(load(tmp_path).dags) == ["a"]
    write(tmp_path, helper="A = 'b'")
    assert list(load(tmp_path).dags) == ["b"]


def test_dataclasses_and_annotations_of_the_file_work_in_tasks(tmp_path: Path) -> None:
    write(
        tmp_path,
        my_dag="""
from __future__ import annotations
import dataclasses, pickle, typing
from dflow import DAG, task
@dataclasses.dataclass
class Row:
    a: int
    b: Row | None = None
with DAG("d"):
    @task
    def use(x=Row(1)):
        assert typing.get_type_hints(Row)["a"] is int
        return [dataclasses.asdict(pickle.loads(pickle.dumps(x))), __name__]
    use()
""",
    )
    assert attempt(load(tmp_path).dags["d"], "use").xcoms["return_value"] == [{"a": 1, "b": None}, "dflow_dag_my_dag"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (\n", "my_dag.py:1: SyntaxError"),
        (
            "\nimport nothing_like_this\n",
            "my_dag.py:2: ModuleNotFoundError: No module named 'nothing_like_this'; put the",
        ),
        ("import sys\nsys.exit(3)\n", "my_dag.py:2: the file called sys.exit(3)"),
        ("def f():\n    raise ValueError('bad')\nf()\n", "my_dag.py:2: ValueError: bad"),
        ("import helper\n", "my_dag.py:1: ZeroDivisionError"),
    ],
)
def test_errors_say_where_and_why(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path, my_dag=source, helper="1 / 0\n")
    path = list(sys.path)
    with pytest.raises(DagImportError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "dflow/runtime" not in caught.value.traceback
    assert "importlib" not in caught.value.traceback
    assert sys.path == path
    assert "helper" not in sys.modules


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DagImportError, match="the file does not exist"):
        load(tmp_path)


def test_interrupts_and_lack_of_memory_pass_through(tmp_path: Path) -> None:
    for name in ("KeyboardInterrupt", "MemoryError"):
        write(tmp_path, my_dag=f"raise {name}\n")
        with pytest.raises((KeyboardInterrupt, MemoryError)):
            load(tmp_path)


def test_an_open_block_of_a_broken_file_is_closed(tmp_path: Path) -> None:
    from dflow.authoring import blocks

    write(tmp_path, my_dag="from dflow import DAG\nDAG('d').__enter__()\nraise ValueError\n")
    with pytest.raises(DagImportError):
        load(tmp_path)
    assert blocks.current_dag() is None


def test_tasks_of_a_loaded_file_fail_with_clean_tracebacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, my_dag="from dflow import DAG, task\nwith DAG('d'):\n    @task\n    def t(): 1 / 0\n    t()\n")
    assert attempt(load(tmp_path).dags["d"], "t").reason is Reason.RAISED
    assert "1 / 0" in caplog.text
