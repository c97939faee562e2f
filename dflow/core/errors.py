"""Every error dflow raises on purpose. Each message says what was expected and what to do; the CLI shows it bare."""

from __future__ import annotations


class DflowError(Exception):
    """Base of all errors dflow raises on purpose."""

    exit_code = 1


class SettingsError(DflowError):
    """One or more settings are wrong; ``problems`` has one sentence for each."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DagDefinitionError(DflowError):
    """A DAG file defines something that cannot work. ``file`` and ``line`` say where, when known."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.message, self.file, self.line = message, file, line
        where = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(where + message)


class DagCycleError(DagDefinitionError):
    """The tasks of a DAG depend on each other in a circle."""


class DuplicateTaskIdError(DagDefinitionError):
    """Two tasks of one DAG have the same id."""


class DagImportError(DflowError):
    """A DAG file could not be imported; carries the traceback as text."""

    def __init__(self, message: str, *, traceback: str = "") -> None:
        self.traceback = traceback
        super().__init__(message)


class SerializationError(DflowError):
    """A DAG or a value has no canonical JSON form."""


class StaleAttemptError(DflowError):
    """A write carried an attempt id that is no longer the current one; nothing was changed."""


class NotFoundError(DflowError):
    """A DAG, run, task instance, pool or setting of that name does not exist."""


class ConflictError(DflowError):
    """What was asked for contradicts what exists (a run of that id, a run that has ended)."""


class StoreUnavailableError(DflowError):
    """Postgres cannot be reached or refuses us; the message names address and remedy."""

    exit_code = 69  # EX_UNAVAILABLE


class BrokerUnavailableError(DflowError):
    """Redis cannot be reached or refuses us."""

    exit_code = 69


class SchemaError(DflowError):
    """The database schema is older or newer than this version of dflow."""


class PublishError(DflowError):
    """Publishing failed or is uncertain; harmless, the rows are published again."""


class ServerBinaryError(DflowError):
    """No usable Postgres or Redis binary for this platform, or one that does not fit the data in the home."""


class ServerStartError(DflowError):
    """An embedded server did not start; the message has its last words and what to do."""


class AgentRequestError(DflowError):
    """The agent of this worker machine could not do what a task process asked; the message says why."""


class AgentStartError(DflowError):
    """The agent of this worker machine did not come up, or is gone; the worker cannot claim anything without it."""
