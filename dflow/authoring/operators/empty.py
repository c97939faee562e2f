"""EmptyOperator: a task that does nothing. The planner completes it; no worker is involved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dflow.authoring.operator import BaseOperator

if TYPE_CHECKING:
    from dflow.authoring.context import Context


class EmptyOperator(BaseOperator):
    """A point in the graph to fan in and out at. It costs no slot and no worker."""

    ui_color = "#e8f7e4"

    def execute(self, context: Context) -> Any:
        """Do nothing."""
