"""What components say about themselves: one line an event on standard error, as text or as JSON.

The logs of tasks do not come this way; `dflow.runtime.logs` captures them. Standard library logging only.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Final

from dflow.settings import Settings

_TEXT: Final = "%(asctime)s.%(msecs)03dZ %(levelname)-7s {component}[%(process)d] %(name)s: %(message)s"
_TEXT_TIME: Final = "%Y-%m-%dT%H:%M:%S"
# Attributes every record has; what is beyond them came in by `extra=` and belongs into the JSON object.
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# Libraries that tell at INFO what only their authors want to know.
_QUIET: Final = ("alembic", "sqlalchemy", "tornado.access", "urllib3")


def configure(settings: Settings, component: str) -> None:
    """Send all logging of this process to standard error, replacing what was configured before.

    ``component`` is the name in each line, e.g. "scheduler". The settings ``logging.logging_level`` and
    ``logging.json`` give level and form.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(component) if settings.logging.json else TextFormatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.logging.logging_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """Lines for people, in UTC."""

    converter = staticmethod(time.gmtime)

    def __init__(self, component: str) -> None:
        super().__init__(_TEXT.format(component=component.replace("%", "%%")), _TEXT_TIME)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, component, pid, logger, message, exception, and what came by `extra=`."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "component": self._component,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        entry |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        return json.dumps(entry, default=str, ensure_ascii=False)
