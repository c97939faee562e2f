"""Statements the server keeps planned.

The statements of the hot path are large, and planning one costs more than running it on a few rows (measured on
Postgres 16: the state change 0.65 ms planned each time against 0.14 kept, admission 1.25 against 0.17). psycopg2
never prepares by itself, so this does it by SQL: `PREPARE` once for each connection, then `EXECUTE`.

A prepared statement lives in a server session. Behind a pooler that gives each transaction another session
(PgBouncer in transaction mode) switch it off by ``?prepared=off`` in the database URL; `Store` then says so here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, text

_PARAMETER: Final = re.compile(r"(?<!:):([a-z_]+)")
_KNOWN: Final = "dflow_prepared"  # key of the names already prepared, in the pooled connection's info
OFF: Final = "dflow_prepared_off"  # set in the pooled connection's info by a Store that must not prepare


class Prepared:
    """One named-parameter statement; ``types`` gives the Postgres type of each parameter."""

    def __init__(self, sql: str, types: Mapping[str, str]) -> None:
        found = set(_PARAMETER.findall(sql))
        if found != set(types):
            raise ValueError(f"parameters {sorted(found)} do not match the declared types {sorted(types)}")
        self.sql = sql
        self._text = text(_PARAMETER.sub(lambda match: f"CAST(:{match[1]} AS {types[match[1]]})", sql))
        self._name = "dflow_" + hashlib.sha256(sql.encode()).hexdigest()[:16]
        numbers = {name: f"${number}" for number, name in enumerate(types, start=1)}
        body = _PARAMETER.sub(lambda match: numbers[match[1]], sql)
        self._prepare = f"PREPARE {self._name}{_in_parentheses(types.values())} AS {body}"
        values = _in_parentheses(f"CAST(%({name})s AS {kind})" for name, kind in types.items())
        self._execute = f"EXECUTE {self._name}{values}"

    def execute(self, tx: Connection, parameters: Mapping[str, Any], *, after: str = "") -> CursorResult[Any]:
        """Run the statement in the transaction, preparing it first where this connection has not yet.

        ``after`` is a statement without parameters to be run before it in the same round trip. Each of the two has its
        own snapshot (READ COMMITTED), so this one sees what was committed while ``after`` waited for a lock.
        """
        info = tx.info
        if OFF in info:
            if after:
                tx.execute(text(after))
            return tx.execute(self._text, parameters)
        known: set[str] = info.setdefault(_KNOWN, set())
        if self._name not in known:
            # Not transactional: it stays prepared even when the transaction is rolled back.
            tx.exec_driver_sql(self._prepare)
            known.add(self._name)
        return tx.exec_driver_sql(f"{after}; {self._execute}" if after else self._execute, dict(parameters))


def _in_parentheses(parts: Iterable[str]) -> str:
    """Return ``" (a, b)"``, and nothing for no parts: Postgres takes no empty parentheses here."""
    joined = ", ".join(parts)
    return f" ({joined})" if joined else ""
