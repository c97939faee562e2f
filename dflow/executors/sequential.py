"""SequentialExecutor: one attempt at a time, in order. The LocalExecutor with a single process."""

from __future__ import annotations

from typing import Final

from dflow.executors.local import LocalExecutor
from dflow.settings import Settings

NAME: Final = "SequentialExecutor"


class SequentialExecutor(LocalExecutor):
    """For a first look and for finding out what a DAG does without anything beside it."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, processes=1)
