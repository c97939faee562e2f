from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery, current_app
from kombu.connection import Connection

from dflow import settings as settings_module
from dflow.broker import messages
from dflow.broker.app import TASK_NAME, make_app, transport_options
from dflow.core.errors import SettingsError
from dflow.core.messages import Nudge
from dflow.settings import Settings

NUDGE = Nudge(
    ti_id=42,
    attempt_id="6a5f9f9e-0d0f-4a35-9a53-2d3f3a1f4a11",
    dag_id="etl",
    task_id="load",
    run_id="manual__2026-11-22T10:00:00+00:00",
    map_index=-1,
    queue="default",
    priority_weight=1,
)


def settings(tmp_path: Path, **env: str) -> Settings:
    return settings_module.load(home=tmp_path, env={"DFLOW__CELERY__BROKER_URL": "redis://127.0.0.1:1/0", **env})


def test_json_is_all_the_application_speaks(tmp_path: Path) -> None:
    conf = make_app(settings(tmp_path)).conf
    assert conf.accept_content == ["json"]
    assert {conf.task_serializer, conf.result_serializer, conf.event_serializer} == {"json"}
    assert conf.task_acks_late
    assert conf.result_backend is None
    assert conf.task_ignore_result


def test_two_applications_live_beside_each_other_and_none_becomes_the_current_one(tmp_path: Path) -> None:
    before = current_app._get_current_object()
    one = make_app(settings(tmp_path))
    other = make_app(settings(tmp_path, DFLOW__OPERATORS__DEFAULT_QUEUE="other"))
    assert (one.conf.task_default_queue, other.conf.task_default_queue) == ("default", "other")
    assert current_app._get_current_object() is before


def test_an_application_without_a_broker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="broker_url"):
        make_app(settings_module.load(home=tmp_path, env={}))


def test_the_transport_publishes_a_batch_in_one_pipeline(tmp_path: Path) -> None:
    """kombu quietly publishes one by one when anything makes redis-py repeat commands."""
    options = transport_options(settings(tmp_path, DFLOW__CELERY__QUEUE_PREFIX="a:"))
    with Connection("redis://127.0.0.1:1/0", transport_options=options) as connection:
        assert connection.transport.supports_batch_publish
    assert options["global_keyprefix"] == "a:"
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 5.0


def test_our_message_has_what_celery_puts_into_its_own(tmp_path: Path) -> None:
    app: Celery = make_app(settings(tmp_path))
    celerys = app.amqp.as_task_v2(
        NUDGE.attempt_id,
        TASK_NAME,
        args=[NUDGE.ti_id, NUDGE.attempt_id],
        kwargs={},
        shadow="etl.load",
        ignore_result=True,
        argsrepr=f"(run_id={NUDGE.run_id!r}, ti_id=42)",
    )
    assert messages.headers(NUDGE, origin=messages.origin()) == celerys.headers
    args, kwargs, embed = celerys.body
    import json

    assert json.loads(messages.body(NUDGE)) == [args, kwargs, embed]


def test_a_mapped_task_shows_its_index() -> None:
    mapped = Nudge(**{**{name: getattr(NUDGE, name) for name in Nudge.__dataclass_fields__}, "map_index": 3})
    assert messages.display_name(NUDGE) == "etl.load"
    assert messages.display_name(mapped) == "etl.load[3]"
