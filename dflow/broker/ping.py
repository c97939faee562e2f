"""Is the broker there? One bounded question, for `dflow standalone`, `config check` and start-up messages."""

from __future__ import annotations

import redis

from dflow.broker.address import redacted, redis_py_url
from dflow.core.errors import BrokerUnavailableError
from dflow.settings import Settings


def ping(settings: Settings, *, timeout_seconds: float = 2.0) -> None:
    """Return when Redis answers; raise BrokerUnavailableError (not there, refuses us) or SettingsError (bad URL)."""
    url = settings.celery.broker_url
    client = redis.Redis.from_url(
        redis_py_url(url), socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds
    )
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerUnavailableError(
            f"Redis at {redacted(url)} does not answer ({error}); start it, or correct celery.broker_url"
        ) from error
    finally:
        client.close()
