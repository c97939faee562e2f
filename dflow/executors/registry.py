"""Which executor `core.executor` names."""

from __future__ import annotations

from dflow.core.errors import SettingsError
from dflow.executors.base import Executor
from dflow.settings import Settings

NAMES = ("CeleryExecutor", "LocalExecutor", "SequentialExecutor")


def executor_for(settings: Settings) -> Executor:
    """Return the configured executor, not yet started; raises SettingsError for a name nobody has."""
    name = settings.core.executor
    # Imported when chosen: an installation that uses one does not pay for the others.
    if name == "CeleryExecutor":
        from dflow.executors.celery import CeleryExecutor

        return CeleryExecutor(settings)
    if name == "LocalExecutor":
        from dflow.executors.local import LocalExecutor

        return LocalExecutor(settings)
    if name == "SequentialExecutor":
        from dflow.executors.sequential import SequentialExecutor

        return SequentialExecutor(settings)
    raise SettingsError([f"core.executor is {name!r}; expected one of {', '.join(NAMES)}"])
