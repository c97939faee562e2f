"""How every command finds the servers of `dflow standalone` without a setting: by the home they share.

An address that is configured (steps 1 to 4 of the precedence) is always used as it is. Only where none is, the record
of the running supervisor fills in, and without one the sockets of the home's embedded servers.
"""

from __future__ import annotations

from typing import Final

from dflow.embedded import locations
from dflow.settings import Settings
from dflow.standalone import record

DATABASE: Final = "database.sql_alchemy_conn"
BROKER: Final = "celery.broker_url"
_DEFAULT_STEP: Final = 5


def attach(settings: Settings, *, source: str) -> Settings:
    """Return the settings with this home's servers where none are configured, whether they run or not.

    :param source: what `dflow config explain` calls the origin of the addresses.
    """
    place = locations(settings.home)
    servers = {DATABASE: place.database_url, BROKER: place.broker_url}
    if not is_configured(settings, DATABASE):
        found = record.read(place.run)
        if found is not None and found.is_alive():
            servers |= found.overrides
    changes = {name: value for name, value in servers.items() if not is_configured(settings, name)}
    return settings.with_values(dict(changes), source=source) if changes else settings


def is_configured(settings: Settings, name: str) -> bool:
    """Return whether a setting has a value from the environment, the file, a command or an option."""
    section, key = name.split(".")
    return settings.explain(section, key).winner.step != _DEFAULT_STEP and settings.value(section, key) != ""
