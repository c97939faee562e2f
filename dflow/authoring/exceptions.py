"""The exceptions a task raises to say how it ends, and those dflow raises inside a task; names are Airflow's."""

from __future__ import annotations

from dflow.core.errors import DflowError


class AirflowException(DflowError):
    """The base of what operators raise on purpose. Raising it fails the attempt; retries apply."""


class AirflowSkipException(AirflowException):
    """Raised by a task to end as ``skipped``."""


class AirflowFailException(AirflowException):
    """Raised by a task to end as ``failed`` at once, whatever tries are left."""


class AirflowTaskTimeout(BaseException):
    """Raised inside a task when its ``execution_timeout`` has passed.

    Not an `Exception`, so that ``except Exception`` in a task does not swallow it (as in Airflow).
    """


class ParamValidationError(AirflowException):
    """A param has no value, or a value its JSON Schema does not allow."""


class XComNotFound(AirflowException):
    """A task asked for an XCom that its upstream task did not push."""
