"""Where the broker is: one `celery.broker_url` understood alike by Celery, kombu and redis-py.

Celery accepts ``redis://``, ``rediss://`` (TLS) and ``redis+socket:///path`` (Unix socket); redis-py calls the last one
``unix://``. Everything else is refused here with one clear message instead of deep inside kombu. Pure: no connection is
made in this file.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from dflow.core.errors import SettingsError

_SCHEMES: Final = ("redis", "rediss", "redis+socket")
_REMEDY: Final = (
    "use redis://host:6379/0, rediss://host:6379/0?ssl_cert_reqs=required or redis+socket:///path/to/redis.sock "
    "(DFLOW__CELERY__BROKER_URL, or broker_url under [celery] in dflow.cfg)"
)


def checked_broker_url(url: str) -> str:
    """Return the URL as Celery takes it; raise SettingsError, naming the remedy, when it cannot work."""
    url = url.strip()
    if not url:
        raise SettingsError([f"celery.broker_url is not set: {_REMEDY}"])
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingsError([f"celery.broker_url is not a URL ({error}): {_REMEDY}"]) from None
    if parts.scheme not in _SCHEMES:
        raise SettingsError([f"celery.broker_url has the scheme {parts.scheme or '(none)'!r}: {_REMEDY}"])
    if parts.scheme == "redis+socket":
        if not parts.path.strip("/"):
            raise SettingsError([f"celery.broker_url names no socket path: {_REMEDY}"])
    elif not parts.hostname and not port:
        raise SettingsError([f"celery.broker_url names no host: {_REMEDY}"])
    elif parts.path.strip("/") and not parts.path.strip("/").isdigit():
        raise SettingsError([f"celery.broker_url has the database {parts.path.strip('/')!r}, not a number: {_REMEDY}"])
    return url


def redis_py_url(url: str) -> str:
    """Return the same address in the form ``redis.Redis.from_url`` takes.

    kombu names the database of a Unix socket ``virtual_host`` and redis-py ``db``; Celery spells TLS verification
    ``CERT_REQUIRED`` (the constants of module ssl) and redis-py ``required``.
    """
    parts = urlsplit(checked_broker_url(url))
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "redis+socket":
        if "virtual_host" in query:
            query["db"] = query.pop("virtual_host").strip("/")
        return f"unix://{parts.netloc}{parts.path}" + (f"?{urlencode(query)}" if query else "")
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].removeprefix("CERT_").lower()
    return parts._replace(query=urlencode(query)).geturl()


def redacted(url: str) -> str:
    """Return the URL for people: without the password."""
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return url
        host = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{parts.username or ''}:***@{host}").geturl()
    except ValueError:
        return "***"
