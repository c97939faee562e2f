from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflow.broker.doorbell import LocalDoorbell


@pytest.fixture(params=["bell", "x" * 60 + "/" + "y" * 60])
def bells(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[LocalDoorbell]]:
    bells = [LocalDoorbell(tmp_path / request.param) for _ in range(3)]
    yield bells
    for bell in bells:
        bell.close()


def test_the_first_wait_returns_at_once_for_a_ring_may_have_been_missed(bells: list[LocalDoorbell]) -> None:
    assert bells[0].wait(3600)
    assert not bells[0].wait(0)


def test_a_ring_wakes_every_waiter_and_many_rings_are_one(bells: list[LocalDoorbell]) -> None:
    ringer, *waiters = bells
    for waiter in waiters:
        waiter.wait(0)
    for _ in range(1000):  # more than a socket's buffer holds
        ringer.ring()
    for waiter in waiters:
        assert waiter.wait(3600)
        assert not waiter.wait(0)


def test_a_ring_during_the_wait_ends_it(bells: list[LocalDoorbell]) -> None:
    ringer, waiter, _ = bells
    waiter.wait(0)
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.append(waiter.wait(60)))
    thread.start()
    ringer.ring()
    thread.join(60)
    assert heard == [True]


def test_the_sockets_of_the_dead_are_removed(bells: list[LocalDoorbell]) -> None:
    ringer, waiter, _ = bells
    waiter.wait(0)
    (path,) = ringer._directory.glob("*.sock")
    assert waiter._receiver is not None
    waiter._receiver.close()  # as if it had been killed
    waiter._receiver = None
    ringer.ring()
    assert not path.exists()
    assert waiter.wait(3600), "it listens anew"


def test_a_directory_that_was_removed_is_made_again(bells: list[LocalDoorbell]) -> None:
    ringer, waiter, _ = bells
    waiter.wait(0)
    for path in ringer._directory.iterdir():
        path.unlink()
    ringer._directory.rmdir()
    ringer.ring()
    assert waiter.wait(3600)
    ringer.ring()
    assert waiter.wait(3600)
