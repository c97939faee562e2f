"""/healthz and /readyz of every component, answered from memory.

`Health` is what a component knows about itself; its loop writes it, the HTTP thread reads it. No request touches
Postgres, Redis or a lock the loop holds, so a probe costs microseconds and cannot make a busy component look dead.

- ``/healthz`` is 200 while the loop turns (also when the database is away: restarting would cure nothing) and 503 when
  it has not turned for `health_check_threshold` seconds.
- ``/readyz`` is 200 when, besides, the last pass succeeded.

With port 0 the server takes any free port and listens on this machine only; a configured port listens on all
addresses, because the probes of a container platform come from outside.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Health:
    """What a component knows about itself. Writers and readers may be different threads."""

    def __init__(self, component: str, *, threshold_seconds: float = 30.0) -> None:
        self.component = component
        self.threshold_seconds = threshold_seconds
        self.passes = 0
        self.last_error: str | None = "no pass has finished yet"
        self.info: dict[str, Any] = {}
        self._turned_at = time.monotonic()
        self._passed_at: float | None = None

    def turned(self) -> None:
        """The loop is alive, whatever came of the pass."""
        self._turned_at = time.monotonic()

    def passed(self) -> None:
        """A pass finished and its work is done."""
        self._turned_at = self._passed_at = time.monotonic()
        self.passes += 1
        self.last_error = None

    def failed(self, cause: str) -> None:
        """A pass failed; the loop goes on. ``cause`` is one line for people."""
        self._turned_at = time.monotonic()
        self.last_error = cause

    def is_alive(self) -> bool:
        """Has the loop turned within the threshold?"""
        return time.monotonic() - self._turned_at <= self.threshold_seconds

    def is_ready(self) -> bool:
        """Is it alive, and did the last pass succeed?"""
        return self.is_alive() and self._passed_at is not None and self.last_error is None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values; ages in seconds."""
        now = time.monotonic()
        return {
            "component": self.component,
            "alive": self.is_alive(),
            "ready": self.is_ready(),
            "passes": self.passes,
            "last_turn_seconds_ago": round(now - self._turned_at, 3),
            "last_pass_seconds_ago": None if self._passed_at is None else round(now - self._passed_at, 3),
            "last_error": self.last_error,
            **self.info,
        }


class HealthServer:
    """Serves one `Health` over HTTP from a daemon thread."""

    def __init__(self, health: Health, *, port: int = 0) -> None:
        host = "0.0.0.0" if port else "127.0.0.1"  # noqa: S104 - see the module's docstring
        self._server = ThreadingHTTPServer((host, port), _handler_for(health))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``; from another machine use that machine's name."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> HealthServer:
        """Begin to answer; returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _handler_for(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds a silent client may hold a thread

        def do_GET(self) -> None:
            checks = {"/healthz": health.is_alive, "/readyz": health.is_ready}
            check = checks.get(self.path.split("?", 1)[0])
            if check is None:
                self._answer(404, {"error": "not found", "paths": sorted(checks)})
            else:
                self._answer(200 if check() else 503, health.as_dict())

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body, default=str).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes are not news."""

    return Handler
