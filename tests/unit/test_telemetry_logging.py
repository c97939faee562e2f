"""One line an event, as text or as JSON, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflow.settings import load
from dflow.telemetry.logging import JsonFormatter, TextFormatter, configure


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def _record(**extra: object) -> logging.LogRecord:
    record = logging.LogRecord("dflow.x", logging.WARNING, "f", 1, "lost %d%%", (5,), None)
    record.created, record.msecs = 1.25, 250.0
    record.__dict__.update(extra)
    return record


def test_text() -> None:
    line = TextFormatter("scheduler").format(_record())
    assert line.startswith("1970-01-01T00:00:01.250Z WARNING scheduler[")
    assert line.endswith("dflow.x: lost 5%")


def test_json_has_extras_and_exceptions() -> None:
    try:
        raise ValueError("bad zone")
    except ValueError:
        info = sys.exc_info()
    entry = json.loads(JsonFormatter("worker").format(_record(dag_id="etl", path=Path("/x"), exc_info=info)))
    assert entry["at"] == "1970-01-01T00:00:01.250+00:00"
    assert (entry["level"], entry["component"], entry["message"]) == ("WARNING", "worker", "lost 5%")
    assert (entry["dag_id"], entry["path"]) == ("etl", "/x")
    assert "ValueError: bad zone" in entry["exception"]
    assert "\n" not in JsonFormatter("worker").format(_record(exc_info=info))


def test_configure_follows_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load(tmp_path, {"DFLOW__LOGGING__JSON": "true", "DFLOW__LOGGING__LOGGING_LEVEL": "warning"})
    configure(settings, "scheduler")
    logging.getLogger("dflow.test").info("quiet")
    logging.getLogger("dflow.test").warning("loud")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["message"] == "loud"
    assert captured.out == ""
