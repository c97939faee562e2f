"""The real Postgres and Redis that `dflow standalone` and the tests bring along, from wheels or from the machine.

Both listen on Unix sockets in private directories only: nobody but this user on this machine can reach them.
May import `settings` and `core`; knows nothing of the schema or of Celery.
"""

from dflow.embedded.locations import Locations, is_running, locations, urls
from dflow.embedded.postgres import PostgresServer
from dflow.embedded.redis import RedisServer

__all__ = ["Locations", "PostgresServer", "RedisServer", "is_running", "locations", "urls"]
