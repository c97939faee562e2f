"""`dflow dags test`: a DAG file in one process, with no service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Test = Callable[..., subprocess.CompletedProcess[str]]

TWO = """
import helper
from dflow import DAG, Param, task

with DAG("one", schedule=None, params={"n": Param(1, type="integer")}):
    @task
    def double(**context):
        print("working")
        return helper.double(context["params"]["n"])

    double()

with DAG("two", schedule=None):
    @task
    def fail():
        raise ValueError("bad zone")

    fail()
"""


@pytest.fixture
def test(tmp_path: Path) -> Test:
    (tmp_path / "helper.py").write_text("def double(n):\n    return 2 * n\n")
    (tmp_path / "two.py").write_text(TWO)

    def run(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dflow", "dags", "test", str(tmp_path / file), *arguments],
            env={**os.environ, "DFLOW_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_success_and_failure_are_exit_codes(test: Test) -> None:
    good = test("two.py", "--dag-id", "one", "--conf", '{"n": 4}', "-o", "json")
    assert good.returncode == 0, good.stderr
    result = json.loads(good.stdout)  # what the task printed is not in it
    assert (result["state"], result["tasks"][0]["state"]) == ("success", "success")
    assert "working" in good.stderr
    bad = test("two.py", "--dag-id", "two")
    assert bad.returncode == 1
    assert "fail" in bad.stdout
    assert "ValueError: bad zone" in bad.stdout


def test_what_cannot_be_run_is_told(test: Test, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nimport nothing_of_that_name\n")
    (tmp_path / "empty.py").write_text("")
    for arguments, code, message in [
        (("two.py",), 1, "several DAGs; choose one with --dag-id: one, two"),
        (("two.py", "--dag-id", "tow"), 1, "did you mean two?"),
        (("two.py", "--dag-id", "one", "--conf", '{"n": "x"}'), 2, "is not of type 'integer'"),
        (("broken.py",), 1, 'broken.py", line 2'),
        (("empty.py",), 1, "defines no DAG"),
        (("gone.py",), 2, "does not exist"),
    ]:
        done = test(*arguments)
        assert done.returncode == code, done
        assert message in " ".join(done.stderr.replace("│", "").split()), done.stderr
