"""Checks between settings and of the form of some: what one type and one range cannot say.

Each check is a function of the finished settings that yields problems; none of them connects to anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from dflow.settings.suggest import did_you_mean

if TYPE_CHECKING:
    from dflow.settings.tree import Settings

DATABASE_SCHEMES: Final = ("postgresql", "postgresql+psycopg2")
BROKER_SCHEMES: Final = ("redis", "rediss", "redis+socket")
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]*")


def problems(settings: Settings) -> list[str]:
    """Return what is wrong between the settings, one sentence each, every one naming a setting and what to do."""
    return [problem for check in _CHECKS for problem in check(settings)]


def _time_zone(settings: Settings) -> Iterator[str]:
    name = settings.core.default_timezone
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        from zoneinfo import available_timezones

        hint = did_you_mean(name, available_timezones()) or "; use a name such as Europe/Berlin"
        yield f"core.default_timezone: {name!r} is not an IANA time zone{hint}"


def _addresses(settings: Settings) -> Iterator[str]:
    yield from _address("database.sql_alchemy_conn", settings.database.sql_alchemy_conn, DATABASE_SCHEMES)
    yield from _address("celery.broker_url", settings.celery.broker_url, BROKER_SCHEMES)


def _address(name: str, url: str, schemes: tuple[str, ...]) -> Iterator[str]:
    """The address itself is never shown: what is not a URL may be all password."""
    if not url:
        return
    expected = f"expected an address that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        yield f"{name}: the address cannot be read; encode special characters of the password, such as %40 for @"
        return
    if "://" not in url:
        yield f"{name}: this is not an address; {expected}"
    elif parts.scheme not in schemes:
        yield f"{name}: {parts.scheme!r} is not supported; {expected}"


def _flower(settings: Settings) -> Iterator[str]:
    auth = settings.celery.flower_basic_auth
    if auth and not all(":" in pair for pair in auth.split(",")):
        yield "celery.flower_basic_auth: expected user:password, several separated by commas"


def _queues(settings: Settings) -> Iterator[str]:
    if not _PREFIX.fullmatch(settings.celery.queue_prefix):
        yield "celery.queue_prefix: only letters, digits and _ . : - are allowed"
    if not settings.operators.default_queue or "," in settings.operators.default_queue:
        yield "operators.default_queue: expected the name of one queue"


def _order(settings: Settings) -> Iterator[str]:
    core, worker, scheduler = settings.core, settings.worker, settings.scheduler
    if core.max_task_retry_delay < core.default_task_retry_delay:
        yield "core.max_task_retry_delay: must not be less than core.default_task_retry_delay"
    if settings.dag_processor.dag_file_processor_timeout < core.dagbag_import_timeout:
        yield "dag_processor.dag_file_processor_timeout: must not be less than core.dagbag_import_timeout"
    if worker.kill_grace >= worker.lease_seconds:
        yield (
            "worker.kill_grace: must be less than worker.lease_seconds, or a worker that is cut off cannot end its "
            "tasks before others take them over"
        )
    if scheduler.health_check_threshold <= 2 * scheduler.poll_interval:
        yield "scheduler.health_check_threshold: must be more than twice scheduler.poll_interval"


def _timeout(settings: Settings) -> Iterator[str]:
    if settings.core.default_task_execution_timeout == 0:
        yield "core.default_task_execution_timeout: 0 would end every task at once; write none for no limit"


def _ports(settings: Settings) -> Iterator[str]:
    """Components of one machine often share a file; two fixed ports that are equal keep one of them from starting."""
    ports = {
        "scheduler.health_check_port": settings.scheduler.health_check_port,
        "worker.health_check_port": settings.worker.health_check_port,
        "dag_processor.health_check_port": settings.dag_processor.health_check_port,
        "celery.flower_port": settings.celery.flower_port,
    }
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if port and port in taken:
            yield f"{name}: port {port} is already that of {taken[port]}"
        taken.setdefault(port, name)


_CHECKS: Final[tuple[Callable[[Settings], Iterator[str]], ...]] = (
    _time_zone,
    _addresses,
    _flower,
    _queues,
    _order,
    _timeout,
    _ports,
)
