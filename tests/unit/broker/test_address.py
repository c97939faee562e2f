from __future__ import annotations

import pytest

from dflow.broker.address import checked_broker_url, redacted, redis_py_url
from dflow.core.errors import SettingsError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@localhost/1", "redis://:secret@localhost/1"),
        ("rediss://r:1/0?ssl_cert_reqs=CERT_REQUIRED", "rediss://r:1/0?ssl_cert_reqs=required"),
        ("rediss://r:1/0?ssl_cert_reqs=none", "rediss://r:1/0?ssl_cert_reqs=none"),
        ("redis+socket:///run/redis.sock", "unix:///run/redis.sock"),
        ("redis+socket:///run/redis.sock?virtual_host=2", "unix:///run/redis.sock?db=2"),
        ("redis+socket://:pw@/run/redis.sock", "unix://:pw@/run/redis.sock"),
    ],
)
def test_celery_and_redis_py_mean_the_same_address(url: str, expected: str) -> None:
    assert checked_broker_url(f" {url} ") == url
    assert redis_py_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "localhost:6379",
        "amqp://localhost",
        "redis://",
        "redis://host/zero",
        "redis+socket://",
        "redis://h:x/0",
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write_instead(url: str) -> None:
    with pytest.raises(SettingsError, match=r"celery\.broker_url .*redis://host:6379/0"):
        checked_broker_url(url)


def test_a_password_is_never_shown() -> None:
    assert redacted("redis://:secret@host:1/0") == "redis://:***@host:1/0"
    assert redacted("redis://ann:secret@host:1/0") == "redis://ann:***@host:1/0"
    assert redacted("redis://host:1/0") == "redis://host:1/0"
    assert "secret" not in redacted("redis://:secret@[broken/0")
