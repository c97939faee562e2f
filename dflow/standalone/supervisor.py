"""The supervisor: starts everything in order, restarts what crashes, drains and stops everything in order.

It holds no state that matters: it may be killed at any line. The kernel then tells its processes, the record tells the
next supervisor, and every task instance is a row. Its main thread starts all processes, because their lives are tied to
that thread (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from dflow import __version__
from dflow.core.errors import DflowError, ServerStartError
from dflow.embedded import locations, postgres, redis
from dflow.embedded.process import ProcessIdentity, tail
from dflow.settings import Settings, redact_url
from dflow.standalone import attach, components, display, flower_login, ports, record
from dflow.standalone.components import Component
from dflow.standalone.display import Display
from dflow.store import schema
from dflow.store.engine import Store

_TICK_SECONDS: Final = 0.2
_SHOW_SECONDS: Final = 1.0
_SHORT_GRACE_SECONDS: Final = 10.0
_ORPHAN_GRACE_SECONDS: Final = 15.0
_HURRIED_GRACE_SECONDS: Final = 1.0
_LOGIN_SOURCE: Final = "made by dflow standalone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start, decided before anything is."""

    settings: Settings  # complete: with the addresses of the embedded servers
    overrides: Mapping[str, str]  # what other commands need to know to find this system
    postgres: bool
    redis: bool
    workers: int
    flower: bool


def plan(settings: Settings, *, workers: int, flower: bool) -> Plan:
    """Decide what to start from the settings, to which options of the command line have already been added.

    :raises ConflictError: Flower's port was asked for and is taken.
    :raises ServerBinaryError: a server has to be embedded and there is no program for it.
    """
    is_celery = settings.core.executor == "CeleryExecutor"
    needs_postgres = not settings.database.sql_alchemy_conn
    needs_redis = is_celery and not settings.celery.broker_url
    place = locations(settings.home)
    filled: dict[str, str] = {}
    if needs_redis:
        redis.find_binary()
    if needs_postgres:
        postgres.choose_installation(place.postgres_data)
        filled[attach.DATABASE] = place.database_url
    if needs_redis:
        filled[attach.BROKER] = place.broker_url
    if is_celery and flower:
        port = ports.choose(
            settings.celery.flower_host,
            settings.celery.flower_port,
            is_explicit=attach.is_configured(settings, "celery.flower_port"),
        )
        if port != settings.celery.flower_port:
            filled["celery.flower_port"] = str(port)
    complete = settings.with_values(dict(filled), source="dflow standalone") if filled else settings
    overrides = {
        attach.DATABASE: complete.database.sql_alchemy_conn,
        attach.BROKER: complete.celery.broker_url,
        "core.executor": complete.core.executor,
        **filled,
    }
    return Plan(
        settings=complete,
        overrides={name: text for name, text in overrides.items() if text},
        postgres=needs_postgres,
        redis=needs_redis,
        workers=workers if is_celery else 0,
        flower=is_celery and flower,
    )


class Supervisor:
    """Runs one plan until it is told to stop."""

    def __init__(self, plan: Plan, show: Display) -> None:
        self._plan = plan
        self._display = show
        self._settings = plan.settings
        self._run_dir = self._settings.home / "run"
        self._components: list[Component] = []
        self._stop = _StopRequests()
        self._store = _store(plan.settings)
        self._show_at = 0.0  # monotonic seconds
        self._is_up = False

    def run(self) -> None:
        """Start, watch, stop; returns after SIGINT, SIGTERM or SIGHUP and a clean stop.

        :raises DflowError: something could not be started; what had been is stopped again.
        """
        _create_home(self._settings)
        with record.locked(self._run_dir), self._stop.installed(), self._display:
            self._end_left_behind()
            try:
                self._guard_flower()
                self._start()
                self._watch()
            finally:
                self._stop_all()
                record.remove(self._run_dir)

    # Starting

    def _end_left_behind(self) -> None:
        left = record.left_behind(self._run_dir)
        if left:
            self._say(
                f"An earlier supervisor was killed. Ending what it left running: {', '.join(left)} (up to "
                f"{_ORPHAN_GRACE_SECONDS:.0f} s) ..."
            )
            record.end_left_behind(left, grace_seconds=_ORPHAN_GRACE_SECONDS)

    def _guard_flower(self) -> None:
        if self._plan.flower and not self._settings.celery.flower_basic_auth:
            login = flower_login.ensure(self._settings.home)
            self._settings = self._settings.with_values({"celery.flower_basic_auth": login}, source=_LOGIN_SOURCE)

    def _start(self) -> None:
        self._say(f"dflow {__version__} standalone, {self._settings.core.executor}, home {self._settings.home}")
        for server in components.servers(self._settings, postgres=self._plan.postgres, redis=self._plan.redis):
            self._start_one(server)
        if self._stop.is_requested:
            return
        schema.migrate(self._store)
        env = {**os.environ, **self._settings.as_env()}
        for program in components.programs(self._settings, env, workers=self._plan.workers, flower=self._plan.flower):
            self._start_one(program)
        self._is_up = True
        if not self._stop.is_requested:
            self._say_where()

    def _start_one(self, component: Component) -> None:
        if self._stop.is_requested:
            return
        self._components.append(component)
        component.start()
        self._remember()

    def _remember(self) -> None:
        """Write down who runs, before anything can happen to us."""
        mine = ProcessIdentity.of(os.getpid())
        running = {one.name: found for one in self._components if (found := one.runnable.identity) is not None}
        if mine is not None:
            record.write(
                self._run_dir, record.Record(supervisor=mine, overrides=self._plan.overrides, processes=running)
            )

    def _say_where(self) -> None:
        settings = self._settings
        width = max(len(one.name) for one in self._components)
        for one in self._components:
            identity = one.runnable.identity
            process = f"pid {identity.pid}" if identity else "starting"
            self._say(f"  {one.name:<{width}}  {process:<12} {one.runnable.log_file}")
        self._say(f"  database  {redact_url(settings.database.sql_alchemy_conn)}")
        if settings.core.executor == "CeleryExecutor":
            self._say(f"  broker    {redact_url(settings.celery.broker_url)}")
        if self._plan.flower:
            prefix = settings.celery.flower_url_prefix.strip("/")
            self._say(f"  Flower    http://{settings.celery.flower_host}:{settings.celery.flower_port}/{prefix}")
            self._say(f"            (user and password: {self._login_place()})")
        self._say(f"  DAG files {settings.core.dags_folder}")
        self._say(f"In another terminal: `{_command(settings)} dags trigger tz_report --wait`.")
        self._say("Ctrl-C here drains and stops everything.")

    def _login_place(self) -> str:
        origin = self._settings.explain("celery", "flower_basic_auth").winner.source
        is_ours = origin == _LOGIN_SOURCE
        return str(self._settings.home / flower_login.FILE_NAME) if is_ours else "celery.flower_basic_auth"

    # Watching

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            for component in self._components:
                self._look_after(component)
            self._show()

    def _show(self) -> None:
        """Show what the database says, at most once a second."""
        if time.monotonic() < self._show_at:
            return
        snapshot = display.read(self._store, self._display.run_limit)
        if snapshot is not None:
            self._display.show(snapshot)
        self._show_at = time.monotonic() + _SHOW_SECONDS

    def _look_after(self, component: Component) -> None:
        pause = component.notice_end()
        if pause is not None:
            self._say_crash(component, pause)
        if component.has_recovered():
            self._say(f"{component.name} is running again.")
        if not component.is_due():
            return
        try:
            component.start()
        except (DflowError, OSError) as error:
            component.crashes += 1
            self._say(f"{component.name} did not start; trying again in {component.restart_in(30.0):g} s: {error}")
        self._remember()

    def _say_crash(self, component: Component, pause: float) -> None:
        """Tell it in full once, and what repeats in a line."""
        how, log_file = _ending(component.runnable.poll()), component.runnable.log_file
        words = f" The end of {log_file}:\n{tail(log_file, lines=3)}" if component.crashes == 1 else ""
        self._say(f"{component.name} {how}; starting it again in {pause:g} s.{words}")

    # Stopping

    def _stop_all(self) -> None:
        """First nothing new is decided, then running tasks are finished, then the servers go."""
        self._stop.count_from_here()
        drain_seconds = self._settings.worker.drain_grace + self._settings.worker.kill_grace + _SHORT_GRACE_SECONDS
        self._stop_group("parsing and scheduling", ("dag-processor", "scheduler"), self._local_grace(drain_seconds))
        self._stop_group("workers, which finish what they run", ("worker",), drain_seconds)
        self._stop_group("Flower", ("flower",), 5.0)
        self._stop_group("Redis", ("redis",), _SHORT_GRACE_SECONDS)
        self._store.close()
        self._stop_group("Postgres", ("postgres",), 30.0)
        if self._is_up:
            self._say("Stopped. The next start goes on where this one was.")

    def _local_grace(self, drain_seconds: float) -> float:
        """A local executor's tasks run below the scheduler and are finished with it."""
        return _SHORT_GRACE_SECONDS if self._settings.core.executor == "CeleryExecutor" else drain_seconds

    def _stop_group(self, what: str, names: Sequence[str], grace_seconds: float) -> None:
        group = [one for one in self._components if one.name.startswith(tuple(names)) and one.runnable.poll() is None]
        if not group:
            return
        self._say(f"Stopping {what} (up to {grace_seconds:.0f} s; Ctrl-C for at once) ...")
        for one in group:
            one.runnable.request_stop()
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and not self._stop.is_hurried:
            if all(one.runnable.poll() is not None for one in group):
                break
            if names != ("postgres",):
                self._show()
            time.sleep(0.05)
        for one in group:
            one.runnable.stop(grace_seconds=_HURRIED_GRACE_SECONDS)
        self._remember()

    def _say(self, message: str) -> None:
        self._display.say(message)


class _StopRequests:
    """Counts the signals that ask to stop: the first drains, another one hurries."""

    _SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._event = threading.Event()
        self._count = 0
        self._before = 1
        self._previous: dict[
            signal.Signals, signal.Handlers | Callable[[int, FrameType | None], object] | int | None
        ] = {}

    @property
    def is_requested(self) -> bool:
        return self._event.is_set()

    @property
    def is_hurried(self) -> bool:
        return self._count > self._before

    def count_from_here(self) -> None:
        """Stopping begins, asked for or not: only a signal from now on hurries."""
        self._before = self._count

    def wait(self, seconds: float) -> bool:
        """Wait for the first request; True when it has come."""
        return self._event.wait(seconds)

    def installed(self) -> _StopRequests:
        return self

    def __enter__(self) -> None:
        for number in self._SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays in force
                self._previous[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._event.set()


def _create_home(settings: Settings) -> None:
    try:
        # Others may pass through (Postgres of a root supervisor runs as another user) but not look around.
        settings.home.mkdir(mode=0o711, parents=True, exist_ok=True)
        for directory in (settings.home / "logs", settings.core.dags_folder):
            directory.mkdir(parents=True, exist_ok=True)
        (settings.home / "run").mkdir(mode=0o711, exist_ok=True)
    except OSError as error:
        raise ServerStartError(
            f"Cannot create {error.filename}: {error.strerror}. Set $DFLOW_HOME to a directory you can write to."
        ) from error
    _check_owner(settings.home)


def _check_owner(home: Path) -> None:
    """What one user started, as with sudo, another cannot go on with: databases and sockets have an owner."""
    uid = (home / "run").stat().st_uid
    if uid != os.geteuid():
        raise ServerStartError(
            f"The home {home} was made by {_user_name(uid)}. Start dflow as that user, or set $DFLOW_HOME to a "
            "directory of your own."
        )
    for directory in (home, home / "logs", home / "run"):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ServerStartError(f"Cannot write to {directory}. Make it writable, or set $DFLOW_HOME to another.")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _command(settings: Settings) -> str:
    """How a user calls `dflow` from another terminal so that it is this one, on this home."""
    beside_us = Path(sys.executable).parent / "dflow"
    program = "dflow" if shutil.which("dflow") == str(beside_us) or not beside_us.exists() else str(beside_us)
    home = "" if settings.home == Path("~/.dflow").expanduser() else f"DFLOW_HOME={shlex.quote(str(settings.home))} "
    return home + program


def _store(settings: Settings) -> Store:
    return Store(
        settings.database.sql_alchemy_conn, pool_size=2, connect_timeout=5, application_name="dflow standalone"
    )


def _ending(code: int | None) -> str:
    if code is None:
        return "did not start"
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
