"""Publishes nudges to Redis: one pipeline for a batch, over one long-lived connection.

Nothing is remembered here. A publish that failed, or of which nobody knows whether it happened, is tried once more over
a new connection and then reported as PublishError; the rows stay `queued` and are published again later, and a message
that arrives twice is refused by the claim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import redis
from kombu.connection import Connection
from kombu.exceptions import KombuError

from dflow.broker import messages
from dflow.broker.address import checked_broker_url, redacted
from dflow.broker.app import transport_options
from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.settings import Settings

log = logging.getLogger(__name__)

_PIPELINE_MESSAGES: Final = 1000
# How kombu itself retries connecting: once and at once. Its defaults sleep for seconds in between.
_CONNECT_ONCE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
_FAILURES: Final = (KombuError, redis.RedisError, OSError)


class Publisher:
    """Sends nudges to the queue each names. Not thread-safe: one owner, one connection."""

    def __init__(self, settings: Settings) -> None:
        self._url = checked_broker_url(settings.celery.broker_url)
        self._transport_options = {**transport_options(settings), **_CONNECT_ONCE}
        self._connect_timeout = settings.celery.broker_socket_timeout
        self._origin = messages.origin()
        self._connection: Any = None
        self._producer: Any = None

    def publish(self, nudges: Sequence[Nudge]) -> None:
        """Publish all of them, in order; raise PublishError when it failed or is uncertain for any.

        Takes at most about two socket timeouts (`celery.broker_socket_timeout`) when Redis does not answer.
        """
        if not nudges:
            return
        try:
            self._send(nudges)
        except _FAILURES as first:
            log.debug("publishing %d messages failed (%s); once more over a new connection", len(nudges), first)
            self.close()
            try:
                self._send(nudges)
            except _FAILURES as error:
                self.close()
                raise PublishError(
                    f"{len(nudges)} messages may not have reached Redis at {redacted(self._url)} ({_cause(error)}); "
                    "their rows are published again when it is back"
                ) from error

    def close(self) -> None:
        """Drop the connection; the next publish makes a new one."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except _FAILURES:
                pass

    @property
    def is_batching(self) -> bool:
        """Does kombu send a batch as one pipeline? It quietly does not when retries are configured on its sockets."""
        self._connect()
        return bool(self._producer.channel.supports_batch_publish)

    def _send(self, nudges: Sequence[Nudge]) -> None:
        self._connect()
        publish = self._producer.publish
        with self._producer.batch(max_size=_PIPELINE_MESSAGES):
            for nudge in nudges:
                publish(
                    messages.body(nudge),
                    exchange="",  # the anonymous exchange: the routing key is the queue, no binding is looked up
                    routing_key=nudge.queue,
                    content_type=messages.CONTENT_TYPE,
                    content_encoding=messages.CONTENT_ENCODING,
                    headers=messages.headers(nudge, origin=self._origin),
                    correlation_id=nudge.attempt_id,
                    reply_to="",
                    delivery_mode=2,
                    retry=False,
                )

    def _connect(self) -> None:
        if self._producer is None:
            self._connection = Connection(  # type: ignore[no-untyped-call]
                self._url, transport_options=self._transport_options, connect_timeout=self._connect_timeout
            )
            self._producer = self._connection.Producer(auto_declare=False)


def _cause(error: BaseException) -> str:
    """The innermost reason; kombu wraps what redis-py said."""
    return str(error.__cause__ or error)
