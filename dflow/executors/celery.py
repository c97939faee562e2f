"""CeleryExecutor: nudges become Celery messages, and any number of `celery -A worker worker` machines take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dflow.broker.publisher import Publisher
from dflow.core.messages import Nudge
from dflow.settings import Settings

NAME: Final = "CeleryExecutor"


class CeleryExecutor:
    """Publishes through Redis; the workers are started by others, on any machine."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._publisher = Publisher(settings)

    def start(self) -> None:
        """Nothing to start: the first publish connects."""

    def publish(self, nudges: Sequence[Nudge]) -> None:
        """One pipeline of messages; raises PublishError when Redis is away."""
        self._publisher.publish(nudges)

    def stop(self) -> None:
        """Close the connection. Workers go on with what they have."""
        self._publisher.close()
