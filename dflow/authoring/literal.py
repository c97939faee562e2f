"""``literal("{{ not a template }}")``: a value that is passed through rendering as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dflow.authoring.resolvable import Resolvable


@dataclass(frozen=True, slots=True)
class literal(Resolvable):
    """A value that rendering leaves alone, e.g. ``BashOperator(bash_command=literal("echo {{ ds }}"), ...)``."""

    value: Any

    def resolve(self, context: Any) -> Any:
        """Return the value, unrendered."""
        return self.value
