"""Settings: declared once, resolved in five steps, checked all at once, frozen, and remembered with their sources.

>>> settings = load()
>>> settings.core.executor
'CeleryExecutor'

`schema` declares them, `resolve` has the precedence, `command` runs ``_CMD`` settings, `checks` looks across them,
`tree` is the object that is passed around, `generate` writes a commented file. May import `dflow.core` only.
"""

from __future__ import annotations

from dflow.settings.resolve import Candidate, Explanation
from dflow.settings.schema import (
    CelerySettings,
    CoreSettings,
    DagProcessorSettings,
    DatabaseSettings,
    LoggingSettings,
    OperatorsSettings,
    SchedulerSettings,
    Setting,
    WorkerSettings,
    all_settings,
    declarations,
)
from dflow.settings.tree import Settings, config_path, find, home_of, load, resolver_for
from dflow.settings.values import redact_url

__all__ = [
    "Candidate",
    "CelerySettings",
    "CoreSettings",
    "DagProcessorSettings",
    "DatabaseSettings",
    "Explanation",
    "LoggingSettings",
    "OperatorsSettings",
    "SchedulerSettings",
    "Setting",
    "Settings",
    "WorkerSettings",
    "all_settings",
    "config_path",
    "declarations",
    "find",
    "home_of",
    "load",
    "redact_url",
    "resolver_for",
]
