"""The Celery and Redis edge against a real Redis: publishing, doorbells, and a stock worker that runs our message."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis.client import Pipeline

from dflow.broker.address import redis_py_url
from dflow.broker.doorbell import RedisDoorbell, doorbell_for
from dflow.broker.ping import ping
from dflow.broker.publisher import Publisher
from dflow.core.errors import BrokerUnavailableError, PublishError
from dflow.core.messages import Nudge
from dflow.embedded import RedisServer
from dflow.settings import Settings
from tests.support import eventually

pytestmark = pytest.mark.integration


def nudges(count: int, queue: str = "default") -> list[Nudge]:
    return [
        Nudge(
            ti_id=number,
            attempt_id=str(uuid.uuid4()),
            dag_id="d",
            task_id="t",
            run_id="r",
            map_index=-1,
            queue=queue,
            priority_weight=1,
        )
        for number in range(1, count + 1)
    ]


@pytest.fixture
def own_settings(make_settings: Callable[..., Settings], own_redis_server: RedisServer) -> Settings:
    return make_settings({"celery.broker_socket_timeout": "2"}, broker_url=own_redis_server.url)


@pytest.fixture
def client(own_settings: Settings) -> Iterator[Any]:
    client = redis.Redis.from_url(redis_py_url(own_settings.celery.broker_url))
    yield client
    client.close()


@pytest.fixture
def publisher(own_settings: Settings) -> Iterator[Publisher]:
    publisher = Publisher(own_settings)
    yield publisher
    publisher.close()


def test_a_batch_is_one_pipeline(
    publisher: Publisher, client: Any, own_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    execute = Pipeline.execute

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(len(self.command_stack))
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "execute", counted)
    publisher.publish(nudges(500))
    assert publisher.is_batching
    assert sent == [500]
    assert client.llen(f"{own_settings.celery.queue_prefix}default") == 500
    assert [key.decode() for key in client.scan_iter()] == [f"{own_settings.celery.queue_prefix}default"]


def test_each_queue_is_a_list_in_the_order_of_publishing(
    publisher: Publisher, client: Any, own_settings: Settings
) -> None:
    first, second, other = *nudges(2), *nudges(1, "other")
    publisher.publish([first, other, second])
    prefix = own_settings.celery.queue_prefix
    assert first.attempt_id.encode() in client.rpop(f"{prefix}default")
    assert second.attempt_id.encode() in client.rpop(f"{prefix}default")
    assert other.attempt_id.encode() in client.rpop(f"{prefix}other")


def test_a_restarted_redis_is_found_again_within_one_publish(
    publisher: Publisher, own_redis_server: RedisServer, client: Any, own_settings: Settings
) -> None:
    publisher.publish(nudges(1))
    own_redis_server.stop()
    with pytest.raises(PublishError, match="published again"):
        publisher.publish(nudges(1))
    own_redis_server.start()
    publisher.publish(nudges(1))
    client.flushall()
    own_redis_server.stop()
    own_redis_server.start()
    publisher.publish(nudges(3))
    assert client.llen(f"{own_settings.celery.queue_prefix}default") >= 3


def test_a_stock_worker_runs_our_message(publisher: Publisher, client: Any, own_settings: Settings) -> None:
    code = (
        "import redis, sys\n"
        "from dflow import settings\n"
        "from dflow.broker.address import redis_py_url\n"
        "from dflow.broker.app import make_app\n"
        "loaded = settings.load()\n"
        "app = make_app(loaded)\n"
        "@app.task(name='dflow.run', bind=True)\n"
        "def run(self, ti_id, attempt_id):\n"
        "    request = self.request\n"
        "    said = [ti_id, attempt_id, request.id, request.shadow, request.ignore_result]\n"
        "    redis.Redis.from_url(redis_py_url(loaded.celery.broker_url)).set('ran', repr(said))\n"
        "app.worker_main(['worker', '-P', 'solo', '--without-mingle', '--without-gossip', '-l', 'WARNING'])\n"
    )
    (nudge,) = nudges(1)
    publisher.publish([nudge])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **own_settings.as_env()})
    try:
        said = eventually(lambda: client.get("ran"), 30)
    finally:
        process.terminate()
        process.wait(30)
    assert eval(said) == [1, nudge.attempt_id, nudge.attempt_id, "d.t", True]


@pytest.fixture
def bells(own_settings: Settings) -> Iterator[list[RedisDoorbell]]:
    bells = []
    for _ in range(2):
        bell = doorbell_for(own_settings)
        assert isinstance(bell, RedisDoorbell)
        bells.append(bell)
    yield bells
    for bell in bells:
        bell.close()


def test_a_ring_wakes_the_waiter_and_many_rings_are_one(bells: list[RedisDoorbell]) -> None:
    ringer, waiter = bells
    assert waiter.wait(60), "the first wait returns at once: a ring may have been missed"
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.append(waiter.wait(60)))
    thread.start()
    ringer.ring()
    thread.join(60)
    assert heard == [True]
    for _ in range(100):
        ringer.ring()
    assert waiter.wait(60)
    eventually(lambda: not waiter.wait(0), 10)


def test_a_doorbell_lives_through_a_restart_of_redis(bells: list[RedisDoorbell], own_redis_server: RedisServer) -> None:
    ringer, waiter = bells
    waiter.wait(0)
    own_redis_server.stop()
    assert not waiter.wait(0.05)
    ringer.ring()  # raises nothing
    own_redis_server.start()
    assert eventually(lambda: waiter.wait(0.05), 30), "subscribed again; a ring may have been missed"
    assert not waiter.wait(0)

    def heard() -> bool:
        ringer.ring()
        return waiter.wait(0.05)

    assert eventually(heard, 30), "the ringer tries again after a moment"


def test_doorbells_of_another_prefix_are_not_heard(bells: list[RedisDoorbell], own_settings: Settings) -> None:
    other = RedisDoorbell(own_settings.celery.broker_url, prefix="other:")
    other.wait(0)
    bells[0].ring()
    assert not other.wait(0.1)
    other.close()


def test_ping(own_settings: Settings, own_redis_server: RedisServer) -> None:
    ping(own_settings)
    own_redis_server.stop()
    with pytest.raises(BrokerUnavailableError, match=r"celery\.broker_url"):
        ping(own_settings)
