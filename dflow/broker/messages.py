"""The Celery message of one nudge, in task protocol 2, made without Celery's `apply_async`.

`apply_async` costs several times what the message itself costs (routing, signals, options, a fresh `repr`), so dflow
makes the message: the same headers, properties and body, most of them constant. A test compares it with what the
installed Celery makes and a stock worker runs it. Source: Celery docs, "Message Protocol", version 2.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, Final

from dflow.broker.app import TASK_NAME
from dflow.core.messages import Nudge

CONTENT_TYPE: Final = "application/json"
CONTENT_ENCODING: Final = "utf-8"

_NO_CALLBACKS: Final = ',{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'


def body(nudge: Nudge) -> str:
    """Return the JSON body ``[args, kwargs, embed]``: the two ids and nothing else."""
    return f"[[{nudge.ti_id},{json.dumps(nudge.attempt_id)}]{_NO_CALLBACKS}"


def headers(nudge: Nudge, *, origin: str) -> dict[str, Any]:
    """Return the headers: what runs, under which id, and names for people: Flower shows ``shadow`` and ``argsrepr``."""
    return {
        "lang": "py",
        "task": TASK_NAME,
        "id": nudge.attempt_id,
        "shadow": display_name(nudge),
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": nudge.attempt_id,
        "parent_id": None,
        "argsrepr": f"(run_id={nudge.run_id!r}, ti_id={nudge.ti_id})",
        "kwargsrepr": "{}",
        "origin": origin,
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }


def display_name(nudge: Nudge) -> str:
    """Return ``dag_id.task_id``, with the map index when the task is mapped."""
    name = f"{nudge.dag_id}.{nudge.task_id}"
    return name if nudge.map_index < 0 else f"{name}[{nudge.map_index}]"


def origin() -> str:
    """Return who published, as Celery spells it: ``gen<pid>@<host>``."""
    return f"gen{os.getpid()}@{socket.gethostname()}"
