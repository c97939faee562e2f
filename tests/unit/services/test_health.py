from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from dflow.services.health import Health, HealthServer


@pytest.fixture
def health() -> Health:
    return Health("scheduler", threshold_seconds=60)


@pytest.fixture
def server(health: Health) -> Iterator[HealthServer]:
    server = HealthServer(health).start()
    yield server
    server.stop()


def get(server: HealthServer, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_alive_before_ready(server: HealthServer, health: Health) -> None:
    assert get(server, "/healthz")[0] == 200
    assert get(server, "/readyz")[0] == 503
    health.passed()
    health.info["queue"] = 3
    status, body = get(server, "/readyz?verbose=1")
    assert status == 200
    assert (body["component"], body["passes"], body["queue"], body["last_error"]) == ("scheduler", 1, 3, None)


def test_dead_when_the_loop_does_not_turn(server: HealthServer, health: Health) -> None:
    health.passed()
    health.threshold_seconds = -1
    assert get(server, "/healthz")[0] == 503
    assert get(server, "/readyz")[0] == 503


def test_other_paths_say_what_there_is(server: HealthServer) -> None:
    status, body = get(server, "/")
    assert status == 404
    assert body["paths"] == ["/healthz", "/readyz"]


def test_any_free_port_on_this_machine_only(server: HealthServer) -> None:
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server._server.server_address[0] == "127.0.0.1"
