"""Who may use the Flower of a standalone dflow: one name with a password of its own, made once for each home.

Flower listens on a port, which everybody on the machine can reach, and its API does not answer at all without a login
(Flower 2.2, `FLOWER_UNAUTHENTICATED_API`). So where `celery.flower_basic_auth` is not set, the home gets a password in
a file for its owner only. It reaches Flower through the environment, never through arguments.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from dflow.core.errors import ServerStartError

FILE_NAME: Final = "flower-auth"
_USER: Final = "dflow"


def ensure(home: Path) -> str:
    """Return the home's ``user:password`` for Flower, made now when there is none; the file may be edited.

    :raises ServerStartError: the file can be neither read nor written, or holds something else.
    """
    path = home / FILE_NAME
    try:
        found = path.read_text().strip() if path.exists() else ""
        return _checked(found, path) if found else _make(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ServerStartError(f"Cannot use {path}, which holds the login for Flower: {error}. Remove it.") from error


def _checked(login: str, path: Path) -> str:
    user, _, password = login.partition(":")
    if not user or not password or "\n" in login or "," in login:
        raise ServerStartError(f"{path} should hold one line, user:password, for Flower. Remove it to get a new one.")
    return login


def _make(path: Path) -> str:
    login = f"{_USER}:{secrets.token_urlsafe(18)}"
    draft = path.with_name(f"{FILE_NAME}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(login + "\n")
    draft.replace(path)
    return login
