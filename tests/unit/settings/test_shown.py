"""What is shown of settings: no secrets; and the generated file is a file that dflow reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dflow.settings import all_settings, load, redact_url
from dflow.settings.generate import config_text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:pw@db:5432/dflow", "postgresql://ann:***@db:5432/dflow"),
        ("postgresql://ann@db/dflow", "postgresql://ann@db/dflow"),
        ("postgresql://ann:a@b:c@db/dflow", "postgresql://ann:***@db/dflow"),
        ("postgresql://postgres@/dflow?host=/run/pg", "postgresql://postgres@/dflow?host=/run/pg"),
        (
            "postgresql://db/x?user=a&password=pw&sslmode=require",
            "postgresql://db/x?user=a&password=***&sslmode=require",
        ),
        ("redis://:pw@cache:6379/0", "redis://:***@cache:6379/0"),
        ("redis+socket:///run/redis.sock?password=pw", "redis+socket:///run/redis.sock?password=***"),
        ("redis+socket:///run/redis.sock", "redis+socket:///run/redis.sock"),
        ("redis+socket://:pw@/run/redis.sock", "redis+socket://:***@/run/redis.sock"),
        ("redis://u:p/w#x?y@cache", "redis://u:***@cache"),
        ("not an address", "***"),
        ("postgresql://ann:pw@[::1/dflow", "postgresql://ann:***@[::1/dflow"),
        ("host=db password=pw", "***"),
    ],
)
def test_redaction_of_addresses(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_no_secret_in_repr_and_explanations(tmp_path: Path) -> None:
    (tmp_path / "dflow.cfg").write_text("[celery]\nflower_basic_auth = ann:hunter2\nbroker_url = redis://:hunter2@a\n")
    env = {
        "DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://ann:hunter2@db/x",
        "DFLOW__CELERY__FLOWER_BASIC_AUTH_CMD": "echo ann:hunter2",
        "DFLOW__CELERY__BROKER_URL": "redis://:hunter2@b",
    }
    settings = load(tmp_path, env)
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in repr(settings.explanations)
    assert settings.explain("celery", "flower_basic_auth").shown == "***"
    assert settings.explain("celery", "broker_url").losers[0].shown == "redis://:***@a"


def test_the_generated_file_is_read_back_and_changes_nothing(tmp_path: Path) -> None:
    plain = load(tmp_path, {})
    (tmp_path / "dflow.cfg").write_text(config_text())
    assert load(tmp_path, {}) == plain
    (tmp_path / "dflow.cfg").write_text(re.sub(r"^# (\w+ =.*)$", r"\1", config_text(), flags=re.M))
    uncommented = load(tmp_path, {})
    assert uncommented == plain
    assert all(uncommented.explain(s.section, s.key).winner.step == 3 for s in all_settings())


def test_every_setting_is_described() -> None:
    for setting in all_settings():
        assert setting.description.endswith("."), setting.name
        assert setting.is_secret or not setting.allows_command or setting.is_url, setting.name
