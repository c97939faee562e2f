from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from dflow.core.errors import StoreUnavailableError
from dflow.services.base import Counts, Watchdog, every, run_forever
from dflow.services.health import Health


class Scripted:
    """A service whose passes do what the script says: an error to raise, or None."""

    name = "scripted"

    def __init__(self, *script: Exception | None) -> None:
        self._script = list(script)
        self.passes = 0

    def run_once(self) -> Counts:
        self.passes += 1
        error = self._script.pop(0) if self._script else None
        if error is not None:
            raise error
        return {"done": self.passes}


class QuickStop(threading.Event):
    """Does not really pause."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


def run(service: Scripted, *, passes: int, health: Health, heartbeat: object = None) -> list[Counts]:
    stop = QuickStop()
    finished: list[Counts] = []

    def on_pass(counts: Counts) -> None:
        finished.append(counts)
        if len(finished) == passes:
            stop.set()

    run_forever(service, wait=every(0, stop), stop=stop, health=health, on_pass=on_pass, heartbeat=heartbeat)  # type: ignore[arg-type]
    return finished


def test_it_goes_on_when_the_database_returns_and_says_both_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    away = StoreUnavailableError("no route to host")
    health = Health("scripted")
    service = Scripted(None, away, away, away, None)
    assert len(run(service, passes=2, health=health)) == 2
    assert service.passes == 5
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert health.is_ready()


def test_a_defect_is_logged_with_its_traceback_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    run(Scripted(ValueError("oops"), ValueError("oops"), None), passes=1, health=Health("scripted"))
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None


def test_the_heartbeat_follows_finished_passes_only() -> None:
    beats: list[int] = []
    service = Scripted(None, StoreUnavailableError("away"), None)

    class Heart:
        def beat(self) -> None:
            beats.append(service.passes)

    run(service, passes=2, health=Health("scripted"), heartbeat=Heart())
    assert beats == [1, 3]


def test_health_tells_a_failing_loop_from_a_dead_one() -> None:
    health = Health("scripted", threshold_seconds=60)
    assert health.is_alive()
    assert not health.is_ready(), "no pass yet"
    health.passed()
    assert health.is_ready()
    health.failed("the database is away")
    assert health.is_alive()
    assert not health.is_ready()
    assert health.as_dict()["last_error"] == "the database is away"
    stale = Health("scripted", threshold_seconds=-1)
    stale.passed()
    assert not stale.is_alive()
    assert not stale.is_ready()


@pytest.mark.parametrize("end", [True, False])
def test_a_pass_that_hangs_gives_the_process_up(end: bool) -> None:
    given_up = threading.Event()
    watchdog = Watchdog(0.05, "scripted", give_up=given_up.set)
    watchdog.begin()
    if end:
        watchdog.end()
        assert not given_up.wait(0.2)
    else:
        assert given_up.wait(60)
    watchdog.close()


def test_waiting_ends_when_asked_to_stop() -> None:
    stop = threading.Event()
    wait: Callable[[Counts], None] = every(3600, stop)
    threading.Timer(0.01, stop.set).start()
    wait({})
    assert stop.is_set()
