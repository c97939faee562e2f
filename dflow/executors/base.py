"""The executor interface: it decides only *where the process is* that claims an attempt.

The scheduler admits task instances and hands the executor a nudge for each; somewhere a process hears the nudge, claims
the attempt with one fenced statement and runs it. No executor holds state, answers what became of a task, or is asked
to. To add one: implement `Executor`, register worker rows with its name and queues from the processes that claim, add
it to `dflow.executors.registry` and to the contract suite in `tests/integration/test_executors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dflow.core.messages import Nudge


class Executor(Protocol):
    """Where admitted attempts go.

    ``name`` is what `core.executor` says and what the workers of this executor register with.
    """

    name: str

    def start(self) -> None:
        """Get ready to publish; may start processes of its own. Called once, before the first publish.

        An executor whose broker is away starts all the same: publishing reports it, and is repeated.
        """

    def publish(self, nudges: Sequence[Nudge]) -> None:
        """Pass the nudges on, in this order, soon.

        Called after the admitting transaction has committed, from one thread. Must return within seconds whatever
        happens. Raises PublishError when some may be lost; that is harmless, for the rows stay `queued` and are
        published again. Publishing one twice, or one whose attempt is long over, is harmless too.
        """

    def stop(self) -> None:
        """Let running attempts finish within their grace where the executor owns the processes; then let go."""
