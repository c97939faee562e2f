"""Locks that outlive a transaction: held by a session of Postgres, gone with it, however it ends.

They keep two processes from doing the same long work at once. They protect no data: whoever writes is fenced or
idempotent without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from dflow.store.engine import Store

_BUNDLES: Final = 0x62756E64  # "bund": the first half of the keys of bundle locks


@contextmanager
def bundle_lock(store: Store, bundle_name: str) -> Iterator[bool]:
    """Yield whether this process is now the one that synchronizes the bundle; if so, until the end of the block.

    Does not wait. Takes one connection of the pool for the length of the block, outside of any transaction.
    """
    key = {"space": _BUNDLES, "name": bundle_name}
    with store.session() as connection:
        is_ours = bool(connection.execute(_TRY_LOCK, key).scalar_one())
        try:
            yield is_ours
        finally:
            if is_ours:
                try:
                    connection.execute(_UNLOCK, key)
                except DBAPIError:
                    connection.invalidate()  # the lock ends with its session


_TRY_LOCK = text("SELECT pg_try_advisory_lock(:space, hashtext(:name))")
_UNLOCK = text("SELECT pg_advisory_unlock(:space, hashtext(:name))")
