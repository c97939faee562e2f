"""Choosing the port of Flower: the configured one or an error; the default one or, when taken, the next free."""

from __future__ import annotations

import socket
from typing import Final

from dflow.core.errors import ConflictError

_TRIES: Final = 50


def choose(host: str, port: int, *, is_explicit: bool) -> int:
    """Return a port one can listen on.

    :raises ConflictError: the port was asked for and is taken, or many beside it are; names port and option.
    """
    if is_free(host, port):
        return port
    if not is_explicit:
        for candidate in range(port + 1, min(port + _TRIES, 65536)):
            if is_free(host, candidate):
                return candidate
    raise ConflictError(
        f"Flower cannot listen on {host}:{port}: the port is taken. Choose another with `--flower-port PORT` (or "
        "celery.flower_port), or do without Flower: `--no-flower`."
    )


def is_free(host: str, port: int) -> bool:
    """Return whether one can listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
