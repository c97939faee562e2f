"""Run ids have Airflow's form and one instant has one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from dflow.core.ids import run_id_for
from dflow.core.states import RunType


def test_form() -> None:
    at = datetime(2026, 11, 22, 10, 0, 0, 123456, tzinfo=UTC)
    assert run_id_for(RunType.MANUAL, at) == "manual__2026-11-22T10:00:00.123456+00:00"
    assert run_id_for("scheduled", at.replace(microsecond=0)) == "scheduled__2026-11-22T10:00:00+00:00"
    assert run_id_for("manual", at.astimezone(timezone(timedelta(hours=-3)))) == run_id_for("manual", at)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        run_id_for("manual", datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="weekly"):
        run_id_for("weekly", datetime(2026, 1, 1, tzinfo=UTC))
