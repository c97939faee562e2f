"""The Celery application: JSON only, late acknowledgement, no result backend, every socket with a timeout.

Made by a function, so importing does no work and two applications with different settings can live in one process. The
options are those correctness and latency need; none of them is needed for *safety* (invariant 3: a message delivered
twice, late or never changes nothing).
"""

from __future__ import annotations

from typing import Any, Final

from celery import Celery

from dflow.broker.address import checked_broker_url
from dflow.settings import Settings

TASK_NAME: Final = "dflow.run"  # the one task: args [ti_id, attempt_id]
VISIBILITY_TIMEOUT_SECONDS: Final = 30 * 24 * 3600  # redelivery is the republisher's business, not Redis's


def make_app(settings: Settings) -> Celery:
    """Return a Celery application for these settings; raises SettingsError when `celery.broker_url` cannot work."""
    app = Celery("dflow", set_as_current=False)
    app.conf.update(celery_options(settings))
    return app


def celery_options(settings: Settings) -> dict[str, Any]:
    """Return the Celery options, with the reason beside each that is not Celery's default."""
    return {
        "broker_url": checked_broker_url(settings.celery.broker_url),
        "broker_transport_options": transport_options(settings),
        "broker_connection_timeout": settings.celery.broker_socket_timeout,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker waits for Redis as long as it takes
        "broker_heartbeat": 0,  # AMQP only
        "result_backend": None,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        # JSON only: no message names a class to import, none is unpickled (invariant 12).
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "enable_utc": True,
        # The finish is committed before Celery acks, so a crash in between redelivers a message the claim refuses.
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_reject_on_worker_lost": False,  # a lost child is handled by the agent, with a cause and a budget
        "task_default_queue": settings.operators.default_queue,
        "task_create_missing_queues": True,
        "task_send_sent_event": False,
        "task_publish_retry": False,  # uncertain publishes are repeated from rows, not from memory
        "worker_prefetch_multiplier": settings.celery.worker_prefetch_multiplier,
        "worker_concurrency": settings.celery.worker_concurrency,
        "worker_max_tasks_per_child": settings.worker.max_tasks_per_child or None,
        "worker_send_task_events": False,  # Flower turns events on by remote control
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # a task outlives a Redis restart
        "worker_proc_alive_timeout": 30.0,  # warm children import a lot on a busy machine
        "worker_detect_quorum_queues": False,  # RabbitMQ only
    }


def transport_options(settings: Settings) -> dict[str, Any]:
    """Return kombu's options for the Redis transport.

    ``retry_on_timeout`` stays unset on purpose: with it kombu silently publishes one message at a time instead of one
    pipeline for a batch (`kombu.transport.redis.Channel.supports_batch_publish`).
    """
    timeout = settings.celery.broker_socket_timeout
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        "health_check_interval": 10,  # also bounds how long a consumer sits on a half-open connection
        "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
        "priority_steps": [0],  # priority is decided in Postgres; one list for each queue keeps BRPOP short
        "max_connections": 20,
    }
    if settings.celery.queue_prefix:
        options["global_keyprefix"] = settings.celery.queue_prefix
    return options
