"""The way to Postgres: one `Store` per process, one transaction per unit of work.

Promises: instants come back as aware UTC datetimes and jsonb as plain Python values; a database that is away shows as
`StoreUnavailableError`, which names host and database but never a password; a half-open TCP connection is noticed in
seconds. A `Store` is thread-safe and must not be carried across a fork.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from dflow.core.errors import SettingsError, StoreUnavailableError
from dflow.store import prepared

if TYPE_CHECKING:
    from dflow.settings import Settings

Tx = Connection
T = TypeVar("T")

# What a transaction may die of through no fault of its own (Postgres manual, appendix A).
_RETRIED_SQLSTATES: Final = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
    }
)
_MAX_TRIES: Final = 6
_FIRST_BACKOFF_SECONDS: Final = 0.01
_MAX_BACKOFF_SECONDS: Final = 0.5
_PING_AFTER_IDLE_SECONDS: Final = 1.0

_ASYNC_COMMIT = text("SET LOCAL synchronous_commit = off")
_UP_SINCE = text("SELECT pg_postmaster_start_time()")


class Store:
    """Connections to one Postgres database.

    ``url`` is ``postgresql://user:password@host:port/db`` or, over a Unix socket, ``postgresql://user@/db?host=/dir``.
    ``connect_timeout`` and ``statement_timeout`` are seconds (0 = no statement timeout); ``pool_size`` is the hard
    limit of connections. ``application_name`` is what people see in ``pg_stat_activity``. ``?prepared=off`` in the URL
    keeps statements unprepared, for poolers that change sessions (see `dflow.store.prepared`). ``is_durable=False``: no
    commit waits for the disk (``sync=False`` throughout, at the cost of no statement). Nothing is connected until the
    first use. Raises SettingsError for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 5,
        connect_timeout: float = 10,
        statement_timeout: float = 30,
        application_name: str = "dflow",
        is_durable: bool = True,
    ) -> None:
        self._is_durable = is_durable
        self.url = _parse(url)
        self.engine = _make_engine(
            self.url,
            pool_size=pool_size,
            connect_timeout=connect_timeout,
            statement_timeout=statement_timeout,
            application_name=application_name,
            is_durable=is_durable,
        )

    @classmethod
    def from_settings(
        cls, settings: Settings, name: str, pool_size: int | None = None, *, is_durable: bool = True
    ) -> Self:
        """Return the store of section ``[database]``; ``name`` is the component, for pg_stat_activity."""
        database = settings.database
        return cls(
            database.sql_alchemy_conn,
            pool_size=pool_size or database.sql_alchemy_pool_size,
            connect_timeout=database.connect_timeout,
            statement_timeout=database.statement_timeout,
            application_name=f"dflow {name}",
            is_durable=is_durable,
        )

    @property
    def address(self) -> str:
        """Host, port and database for messages; never the user's password."""
        return describe(self.url)

    @contextmanager
    def begin(self, *, sync: bool = True) -> Iterator[Tx]:
        """Open one transaction: committed at the end of the block, rolled back when the block raises.

        ``sync=False`` does not wait for the disk at commit (`synchronous_commit = off`, for this transaction only): a
        crash of the database may lose the last moment of such commits, never their order or consistency. It is for
        work that is done again when lost. Raises StoreUnavailableError when the database is or goes away; when that
        happens in the commit itself, the outcome is unknown.
        """
        with self._mapped_errors(), self.engine.connect() as tx, tx.begin():
            if not sync and self._is_durable:
                tx.execute(_ASYNC_COMMIT)
            yield tx

    def run(self, fn: Callable[[Tx], T], *, sync: bool = True) -> T:
        """Return ``fn(tx)`` of one committed transaction, run anew when Postgres asks for it.

        Deadlocks, serialization failures and lock timeouts are retried with jittered backoff, a few times. A connection
        found broken is replaced once, when it broke before the commit. So ``fn`` must do nothing but work on ``tx``.
        """
        is_replaced = False
        for attempt in range(1, _MAX_TRIES + 1):
            committing = False
            try:
                with self.engine.connect() as tx, tx.begin():
                    if not sync and self._is_durable:
                        tx.execute(_ASYNC_COMMIT)
                    result = fn(tx)
                    committing = True
                return result
            except DBAPIError as error:
                if error.connection_invalidated:
                    if committing or is_replaced:
                        raise self._unavailable(error) from error
                    is_replaced = True
                    continue
                if _sqlstate(error) not in _RETRIED_SQLSTATES or attempt == _MAX_TRIES:
                    self._raise_if_unreachable(error)
                    raise
                _back_off(attempt)
            except PoolTimeoutError as error:
                raise self._unavailable(error) from error
        raise AssertionError("the loop returns or raises")

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """Lend one connection without a transaction (each statement commits by itself), for locks of a session."""
        with self._mapped_errors(), self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def database_up_since(self, tx: Tx) -> datetime:
        """Return when the database server started (by its clock); leases are not judged right after that."""
        since: datetime = tx.execute(_UP_SINCE).scalar_one()
        return since

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if error.connection_invalidated:
                raise self._unavailable(error) from error
            self._raise_if_unreachable(error)
            raise
        except PoolTimeoutError as error:
            raise self._unavailable(error) from error

    def _raise_if_unreachable(self, error: DBAPIError) -> None:
        """An error without a statement comes from connecting."""
        if error.statement is None and _sqlstate(error) is None:
            raise self._unavailable(error) from error

    def _unavailable(self, error: DBAPIError | PoolTimeoutError) -> StoreUnavailableError:
        reason = str(error.orig).strip() if isinstance(error, DBAPIError) else str(error)
        if password := self.url.password:
            reason = reason.replace(str(password), "***")
        return StoreUnavailableError(f"Cannot use Postgres at {self.address}: {reason}\n{_remedy(reason)}")


def describe(url: URL) -> str:
    """Return ``host:port/database`` of a URL, or the socket directory in place of the host."""
    host = url.host or url.query.get("host") or "localhost"
    port = f":{url.port}" if url.port else ""
    return f"{host}{port}/{url.database or url.username or ''}"


def _parse(url: str) -> URL:
    """Return the URL with the psycopg2 driver named: SQLAlchemy's own default driver differs between its versions."""
    expected = "expected postgresql://user:password@host:5432/database"
    if not url:
        raise SettingsError([f"database.sql_alchemy_conn is empty; {expected}"])
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SettingsError([f"database.sql_alchemy_conn is no database URL; {expected}"]) from None
    if parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise SettingsError([f"database.sql_alchemy_conn names {parsed.drivername!r}, not Postgres; {expected}"])
    return parsed.set(drivername="postgresql+psycopg2")


def _make_engine(
    url: URL,
    *,
    pool_size: int,
    connect_timeout: float,
    statement_timeout: float,
    application_name: str,
    is_durable: bool,
) -> Engine:
    # Everything here reads by key or by a partial index. A plan that is kept (store/prepared.py) may have been made
    # while a table was empty, and would then read it from end to end until the next analyze. Just-in-time compilation
    # costs more than any of these statements.
    options = (
        "-c enable_seqscan=off -c plan_cache_mode=force_generic_plan -c jit=off "
        "-c timezone=UTC -c default_transaction_isolation=read\\ committed "
        "-c idle_in_transaction_session_timeout=60s "
        f"-c statement_timeout={round(statement_timeout * 1000)}"
        f"{'' if is_durable else ' -c synchronous_commit=off'}"
    )
    given = url.query.get("options")
    engine = create_engine(
        url.difference_update_query(["options", "prepared"]),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=30,
        connect_args={
            "connect_timeout": max(1, round(connect_timeout)),
            "application_name": application_name,
            "options": f"{options} {given}" if isinstance(given, str) else options,
            # A peer that vanished without a word is found out in about 10 s (libpq parameters; Linux tcp(7)).
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
    _ping_idle_connections(engine)
    if url.query.get("prepared") == "off":
        _keep_unprepared(engine)
    return engine


def _keep_unprepared(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def mark(_connection: Any, record: Any) -> None:
        record.info[prepared.OFF] = True


def _ping_idle_connections(engine: Engine) -> None:
    """Check a pooled connection before use only when it has idled a while: a busy loop pays no extra round trip."""

    @event.listens_for(engine, "checkin")
    def remember(_connection: Any, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping(connection: Any, record: Any, _proxy: Any) -> None:
        idle_since = record.info.get("idle_since")
        if idle_since is None or time.monotonic() - idle_since < _PING_AFTER_IDLE_SECONDS:
            return
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            connection.rollback()
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # the pool replaces the connection


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None)


def _back_off(attempt: int) -> None:
    ceiling = min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**attempt)
    time.sleep(random.uniform(0, ceiling))  # noqa: S311 jitter, not a secret


def _remedy(reason: str) -> str:
    if "password authentication failed" in reason or "no password supplied" in reason:
        return "Check user and password in the setting database.sql_alchemy_conn."
    if "does not exist" in reason:
        return "Create it, or correct the setting database.sql_alchemy_conn."
    if "too many clients" in reason or "remaining connection slots" in reason:
        return "Raise max_connections of the server, or lower the setting database.sql_alchemy_pool_size."
    if "QueuePool limit" in reason:
        return "Every connection of this process is busy: raise the setting database.sql_alchemy_pool_size."
    return "Is the server running and reachable from here? The setting database.sql_alchemy_conn says where it is."
