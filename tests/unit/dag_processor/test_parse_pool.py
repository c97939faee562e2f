"""Sandboxes: what a DAG file may do to its parser, and what always comes of it: one clear answer."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dflow import settings as settings_module
from dflow.services.parse_pool import Parsed, ParseOptions, ParsePool, user_code_env
from tests.support import eventually

GOOD = """
from dflow import DAG, EmptyOperator
with DAG("good", schedule="@daily"):
    EmptyOperator(task_id="a") >> EmptyOperator(task_id="b")
"""


@pytest.fixture
def parse(tmp_path: Path) -> Iterator:
    """Return a function that parses {path: source} and gives {path: Parsed}."""

    def run(files: dict[str, str], *, size: int = 2, env: dict[str, str] | None = None, **options) -> dict[str, Parsed]:
        root = tmp_path / "bundle"
        for path, source in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(source)
        todo = [path for path in files if path.endswith(".py")]
        before = set(psutil.Process().children())  # the session's servers, when other tests needed them
        with ParsePool(
            size=size, options=ParseOptions(**options), env=env or dict(os.environ), stop=threading.Event()
        ) as pool:
            results = {parsed.path: parsed for parsed in pool.parse(root, todo)}
        assert not set(psutil.Process().children()) - before, "a host was left behind"
        return results

    return run


def failure(parsed: Parsed) -> str:
    assert parsed.failure is not None
    assert parsed.specs == ()
    return parsed.failure.message


def test_a_good_file_gives_its_dags_as_data(parse) -> None:
    parsed = parse({"etl.py": GOOD})["etl.py"]
    assert parsed.failure is None
    assert [spec.dag_id for spec in parsed.specs] == ["good"]
    assert parsed.specs[0].tasks[1].upstream == ("a",)
    assert parsed.duration_seconds > 0
    assert parsed.peak_rss_bytes > 0


def test_nothing_of_a_file_gets_into_this_process(parse) -> None:
    before = set(sys.modules)
    parse({"etl.py": "import helper_of_etl\n" + GOOD, "helper_of_etl.py": "import colorsys"})
    assert not {name for name in set(sys.modules) - before if "etl" in name or name == "colorsys"}


def test_a_file_knows_nothing_of_the_one_before(parse) -> None:
    files = {
        "a.py": "import sys, os\nsys.leftover = 1\nos.environ['LEFTOVER'] = '1'\nimport shared\n" + GOOD,
        "b/shared.py": "import sys, os\nassert not hasattr(sys, 'leftover')\nassert 'LEFTOVER' not in os.environ\n",
        "b/b.py": "import shared\nassert 'b' in shared.__file__.split('/')\n" + GOOD,
        "shared.py": "",
    }
    results = parse(files, size=1)
    assert [results[path].failure for path in ("a.py", "b/b.py")] == [None, None]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\nraise ValueError('no zone')", "bad.py:2: ValueError: no zone"),
        ("def f(:\n", "bad.py:1: SyntaxError"),
        ("import no_such_module_anywhere", "bad.py:1: ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("import sys\nsys.exit(3)", "bad.py:2: the file called sys.exit(3)"),
        ("import os\nos._exit(7)", "bad.py: the process ended with exit code 7"),
        ("import os\nos.kill(os.getpid(), 11)", "bad.py: the process was killed by signal 11 (SIGSEGV)"),
        ("import os\nos.abort()", "bad.py: the process was killed by signal 6 (SIGABRT)"),
        ("import ctypes\nctypes.string_at(0)", "signal 11 (SIGSEGV)"),
        ("raise KeyboardInterrupt", "bad.py:1: KeyboardInterrupt"),
        ("raise BaseException('x')", "bad.py:1: BaseException: x"),
        ("def f():\n  f()\nf()", "RecursionError"),
        ("from dflow import DAG, EmptyOperator\nwith DAG('d'):\n  a = EmptyOperator(task_id='a')\n  a >> a", "bad.py:"),
        ("x = '\\x00\\ud800'\nraise ValueError(x)", "ValueError: \ufffd?"),
    ],
)
def test_whatever_a_file_does_ends_as_a_clear_failure(parse, source: str, expected: str) -> None:
    parsed = parse({"bad.py": source, "good.py": GOOD})
    assert expected in failure(parsed["bad.py"])
    assert parsed["good.py"].failure is None


def test_a_failure_shows_the_users_frames_with_paths_of_the_bundle(parse) -> None:
    files = {
        "lib/__init__.py": "",
        "lib/deep.py": "def f():\n    return {}['key']\n",
        "bad.py": "from lib import deep\ndeep.f()\n",
    }
    parsed = parse(files)["bad.py"]
    assert failure(parsed) == "bad.py:2: KeyError: 'key'"
    assert parsed.failure is not None
    assert 'File "bad.py", line 2' in parsed.failure.traceback
    assert 'File "lib/deep.py", line 2' in parsed.failure.traceback
    assert "dflow/" not in parsed.failure.traceback


def test_an_import_that_takes_too_long_shows_where_it_hung(parse) -> None:
    source = "import time\ntry:\n    time.sleep(60)\nexcept Exception:\n    pass\n"
    parsed = parse({"slow.py": source}, import_timeout_seconds=0.3)["slow.py"]
    assert failure(parsed).startswith("slow.py:3: the import took longer than 0.3 s (core.dagbag_import_timeout)")
    assert "time.sleep(60)" in parsed.failure.traceback


def test_what_does_not_end_is_killed(parse) -> None:
    source = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: time.sleep(1)\n"
    parsed = parse({"hang.py": source}, import_timeout_seconds=0.1, timeout_seconds=0.7)["hang.py"]
    assert "did not end within 0.7 s (dag_processor.dag_file_processor_timeout) and was killed" in failure(parsed)


def test_memory_is_limited(parse) -> None:
    parsed = parse({"big.py": "x = 1\nx = bytearray(2_000_000_000)"}, memory_limit_mb=600)["big.py"]
    assert failure(parsed) == (
        "big.py:2: MemoryError: the import needs more than 600 MiB (dag_processor.memory_limit_mb)"
    )


def test_output_is_kept_up_to_a_limit(parse) -> None:
    source = "import os\nprint('hello from the file')\nos.write(1, b'x' * 10_000_000)\n" + GOOD
    parsed = parse({"loud.py": source})["loud.py"]
    assert parsed.failure is None
    assert parsed.output.startswith("hello from the file")
    assert len(parsed.output) < 70_000
    assert "more bytes were dropped" in parsed.output


def test_an_endless_printer_is_a_timeout(parse) -> None:
    source = "import os\nwhile True: os.write(1, b'x' * 1_000_000)\n"
    parsed = parse({"loud.py": source}, import_timeout_seconds=60, timeout_seconds=0.5)["loud.py"]
    assert "did not end within 0.5 s" in failure(parsed)


SPAWN = """
import os, subprocess, sys
code = "import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code, "{marker}"])
subprocess.Popen([sys.executable, "-c", code, "{marker}"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.environ.clear()
        os.execv(sys.executable, [sys.executable, "-c", code, "{marker}"])
    os._exit(0)
{end}
"""


@pytest.mark.parametrize("end", ["", "os._exit(3)", "import time; time.sleep(600)"])
def test_no_process_is_left_behind(parse, end: str, tmp_path: Path) -> None:
    marker = f"left-behind-{tmp_path.name}-{os.getpid()}"
    parse({"spawn.py": SPAWN.format(marker=marker, end=end)}, timeout_seconds=2.0, import_timeout_seconds=60)

    def marked() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]

    assert marked() == []


def test_a_thread_that_runs_on_delays_nothing(parse) -> None:
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n" + GOOD
    assert parse({"t.py": source})["t.py"].failure is None


def test_the_sandbox_has_no_stdin_and_no_open_files(parse) -> None:
    source = (
        "import os, sys\nassert sys.stdin.read() == ''\n"
        "fds = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))\n"
        "open_fds = [fd for fd in fds if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "assert len(open_fds) <= 4, open_fds\nassert os.getsid(0) == os.getpid()\n" + GOOD
    )
    assert parse({"a.py": source})["a.py"].failure is None


def test_what_is_read_during_the_import_is_a_dependency(parse) -> None:
    source = (
        "import json, os\nfrom pathlib import Path\nfrom lib.util import x\nhere = Path(__file__).parent\n"
        "json.loads((here / 'conf/a.json').read_text())\nos.listdir(here / 'conf')\nlist(here.glob('*.sql'))\n"
        "try: open(here / 'conf/missing.json')\nexcept FileNotFoundError: pass\n" + GOOD
    )
    files = {"a.py": source, "lib/__init__.py": "", "lib/util.py": "x = 1", "conf/a.json": "{}", "unused.py": ""}
    parsed = parse(files)["a.py"]
    assert parsed.failure is None
    assert set(parsed.touched) == {
        "a.py",
        "lib/__init__.py",
        "lib/util.py",
        "conf/a.json",
        "conf/missing.json",
        "conf/",
        "./",
    }


def test_imports_alone_list_no_directory(parse) -> None:
    files = {"a.py": "import lib.util\n" + GOOD, "lib/util.py": ""}
    assert set(parse(files)["a.py"].touched) == {"a.py", "lib/util.py"}


def test_a_failed_file_has_dependencies_too(parse) -> None:
    parsed = parse({"a.py": "import helper", "helper.py": "raise ValueError"})["a.py"]
    assert failure(parsed)
    assert set(parsed.touched) == {"a.py", "helper.py"}


def test_too_many_dags_are_refused(parse) -> None:
    source = "from dflow import DAG\nbig = DAG('big', doc_md='x' * 17_000_000)\n"
    assert "over the limit of" in failure(parse({"a.py": source})["a.py"])


def test_a_lost_host_is_a_failure_and_the_next_file_gets_a_new_one(parse) -> None:
    kill_parent = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(60)\n"
    results = parse({"a.py": kill_parent, "b.py": GOOD}, size=1)
    assert "the process that parses DAG files was lost" in failure(results["a.py"])
    assert results["b.py"].failure is None


def test_a_stop_ends_what_hangs(tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    flag = tmp_path / "began"
    (root / "hang.py").write_text(f"import time\nopen({str(flag)!r}, 'w').close()\ntime.sleep(600)\n")
    stop = threading.Event()
    threading.Thread(target=lambda: (eventually(flag.exists), stop.set())).start()
    options = ParseOptions(import_timeout_seconds=500, timeout_seconds=500)
    with ParsePool(size=1, options=options, env=dict(os.environ), stop=stop) as pool:
        assert list(pool.parse(root, ["hang.py"])) == []
    assert not psutil.Process().children()


def test_a_finished_pool_begins_no_further_file(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(GOOD)
    with ParsePool(size=1, options=ParseOptions(), env=dict(os.environ), stop=threading.Event()) as pool:
        results = []
        for parsed in pool.parse(tmp_path, ["a.py", "b.py", "c.py"]):
            results.append(parsed)
            pool.finish()
    assert 1 <= len(results) < 3
    assert all(parsed.failure is None for parsed in results)


def test_the_same_source_has_the_same_structure_every_time(parse) -> None:
    source = (
        "from dflow import DAG, EmptyOperator, chain\nwith DAG('d'):\n"
        "    chain(*[EmptyOperator(task_id=name) for name in {'a', 'b', 'c', 'd', 'e'}])\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    first = parse({"a.py": source}, env=env)["a.py"].specs
    assert first
    assert first == parse({"a.py": source}, env=env)["a.py"].specs


def test_the_environment_of_user_code_has_no_secrets(tmp_path: Path) -> None:
    env = {
        "PATH": "/bin",
        "MY_OWN": "kept",
        "DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://u:secret@h/d",
        "DFLOW__CELERY__BROKER_URL_CMD": "echo redis://:secret@h",
        "DFLOW__CELERY__FLOWER_BASIC_AUTH": "u:secret",
        "DFLOW__CORE__DEFAULT_TIMEZONE": "Europe/Berlin",
    }
    result = user_code_env(settings_module.load(home=tmp_path, env=env), env)
    assert "secret" not in str(result)
    assert not [name for name in result if name.endswith("_CMD") or "DATABASE" in name or "CELERY__" in name]
    assert result["MY_OWN"] == "kept"
    assert result["DFLOW__CORE__DEFAULT_TIMEZONE"] == "Europe/Berlin"
    assert result["DFLOW_HOME"] == str(tmp_path)
