"""Every setting, declared once: name, type, unit, default, section, description, secret, command.

Nothing here resolves anything. `dflow.settings.resolve` turns the declarations and the five sources into one frozen
`Settings`; `dflow.settings.generate` turns them into a commented file; the configuration reference is made of them.
The names are Airflow's wherever Airflow has the setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, get_args, get_type_hints

ENV_PREFIX: Final = "DFLOW__"
EXECUTORS: Final = ("CeleryExecutor", "LocalExecutor", "SequentialExecutor")
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

Kind = Literal["str", "int", "float", "bool", "path"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The declaration of one setting. ``default`` is the text one would write in the file; ``{home}`` is the home."""

    section: str
    key: str
    kind: Kind
    is_optional: bool  # may be "none"
    default: str
    description: str
    unit: str
    is_secret: bool
    is_url: bool
    allows_command: bool
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name people use: ``core.executor``."""
        return f"{self.section}.{self.key}"

    @property
    def env_name(self) -> str:
        """The environment variable of step 1; step 2 is this with ``_CMD``."""
        return f"{ENV_PREFIX}{self.section.upper()}__{self.key.upper()}"


def _setting(
    default: str,
    description: str,
    *,
    unit: str = "",
    secret: bool = False,
    url: bool = False,
    cmd: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    return field(
        repr=not secret,  # so that no log line or traceback with a settings object in it shows a password
        metadata={
            "default": default,
            "description": description,
            "unit": unit,
            "is_secret": secret,
            "is_url": url,
            "allows_command": cmd,
            "minimum": minimum,
            "maximum": maximum,
            "choices": choices,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """What every component shares."""

    executor: str = _setting("CeleryExecutor", "Where tasks run.", choices=EXECUTORS)
    dags_folder: Path = _setting(  # noqa: RUF009 - declares a field, shares no object
        "{home}/dags", "The folder of the DAG files; only the dag-processor reads it."
    )
    load_examples: bool = _setting("true", "Also load the example DAGs that come with dflow.")
    store_dag_code: bool = _setting(
        "true",
        "Keep the source of DAG files in the database to be displayed (`dflow dags code`). Workers get their code from "
        "the bundle store in any case.",
    )
    default_timezone: str = _setting(
        "UTC", "The IANA time zone of schedules and dates that name none, such as Europe/Berlin."
    )
    parallelism: int = _setting(
        "32", "How many tasks the LocalExecutor runs at once.", unit="processes", minimum=1, maximum=32
    )
    max_active_tasks_per_dag: int = _setting(
        "16", "How many tasks of one run are queued or running at once, for DAGs that do not say.", minimum=1
    )
    max_active_runs_per_dag: int = _setting(
        "16", "How many runs of a DAG are active at once, for DAGs that do not say.", minimum=1
    )
    dags_are_paused_at_creation: bool = _setting("true", "New DAGs start paused, unless they say otherwise.")
    default_task_retries: int = _setting(
        "0", "How often a task that raised is tried again, for tasks that do not say.", minimum=0
    )
    default_task_retry_delay: float = _setting(
        "300", "How long to wait before the next try, for tasks that do not say.", unit="seconds", minimum=0
    )
    max_task_retry_delay: float = _setting(
        "86400", "The longest delay exponential backoff can reach.", unit="seconds", minimum=0
    )
    infra_retries: int = _setting(
        "3",
        "How often an attempt that was lost with its worker (host gone, lease ended, drained) runs again. These do not "
        "count as retries of the task.",
        minimum=0,
    )
    default_task_execution_timeout: float | None = _setting(
        "none",
        "How long one try of a task may run, for tasks that do not say; none: no limit.",
        unit="seconds",
        minimum=0,
    )
    dag_run_conf_overrides_params: bool = _setting("true", "The conf of a run replaces params of the DAG by name.")
    xcom_max_bytes: int = _setting(
        "1048576",
        "The largest XCom value, as JSON. Larger data belongs into files or object storage.",
        unit="bytes",
        minimum=1,
    )
    dagbag_import_timeout: float = _setting(
        "30",
        "How long the import of one DAG file may take, in the dag-processor and on workers.",
        unit="seconds",
        minimum=0.1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Postgres."""

    sql_alchemy_conn: str = _setting(
        "",
        "The address of Postgres 14 or newer: postgresql://user:password@host:5432/dflow. Empty: the server that "
        "`dflow standalone` starts.",
        secret=True,
        url=True,
        cmd=True,
    )
    sql_alchemy_pool_size: int = _setting(
        "5", "The most connections one process keeps to Postgres.", unit="connections", minimum=1, maximum=1000
    )
    connect_timeout: float = _setting(
        "10", "How long connecting to Postgres may take.", unit="seconds", minimum=1, maximum=3600
    )
    statement_timeout: float = _setting(
        "30", "How long one statement may take; 0: no limit.", unit="seconds", minimum=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CelerySettings:
    """Celery, its broker, and Flower. Used with the CeleryExecutor."""

    broker_url: str = _setting(
        "",
        "The address of Redis 6 or newer: redis://:password@host:6379/0, rediss:// for TLS, redis+socket:///path for a "
        "Unix socket. Empty: the server that `dflow standalone` starts.",
        secret=True,
        url=True,
        cmd=True,
    )
    worker_concurrency: int = _setting(
        "16", "How many tasks one worker runs at once.", unit="processes", minimum=1, maximum=1024
    )
    worker_prefetch_multiplier: int = _setting(
        "4", "How many messages a worker takes ahead for each of its processes; 0: no limit.", minimum=0
    )
    flower_host: str = _setting("127.0.0.1", "The address Flower listens on; 0.0.0.0 for all.")
    flower_port: int = _setting("5555", "The port Flower listens on.", minimum=1, maximum=65535)
    flower_url_prefix: str = _setting("", "The path Flower is served under behind a proxy, such as /flower.")
    flower_basic_auth: str = _setting(
        "",
        "Who may use Flower: user:password, several separated by commas. Empty: everybody who can reach it, and nobody "
        "its API; `dflow standalone` makes a password of its own instead, in {home}/flower-auth.",
        secret=True,
        cmd=True,
    )
    broker_socket_timeout: float = _setting(
        "5",
        "How long one exchange with Redis may take before the connection counts as broken.",
        unit="seconds",
        minimum=0.1,
    )
    queue_prefix: str = _setting("", "A prefix for all keys in Redis, so that several clusters can share one server.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorsSettings:
    """Defaults of operators."""

    default_queue: str = _setting("default", "The queue of tasks that do not say, and of workers started without -Q.")
    default_owner: str = _setting("airflow", "The owner of tasks that do not say.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """The scheduler."""

    poll_interval: float = _setting(
        "1",
        "How long an idle scheduler waits for the doorbell before it looks by itself.",
        unit="seconds",
        minimum=0.01,
        maximum=60,
    )
    max_tis_per_query: int = _setting("512", "The most task instances one pass admits.", minimum=1)
    max_dagruns_to_create_per_loop: int = _setting("100", "The most runs one pass creates.", minimum=1)
    catchup_by_default: bool = _setting("false", "Create the runs missed since start_date, for DAGs that do not say.")
    max_catchup_runs: int = _setting("100", "The most missed runs of one DAG that one pass creates.", minimum=1)
    republish_after: float = _setting(
        "5", "How long a queued task may stay unclaimed before its message is sent again.", unit="seconds", minimum=0.1
    )
    lookahead: float = _setting(
        "0.5",
        "How much work to keep in the broker beyond free slots: what workers finish in this time.",
        unit="seconds",
        minimum=0,
    )
    health_check_port: int = _setting(
        "0", "The port of /healthz and /readyz; 0: any free one.", minimum=0, maximum=65535
    )
    health_check_threshold: float = _setting(
        "30", "A service whose last finished pass is older than this counts as dead.", unit="seconds", minimum=1
    )
    stall_after: float = _setting(
        "60",
        "A scheduler whose pass takes longer gives up and exits with code 70, to be started again.",
        unit="seconds",
        minimum=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Workers, of every executor."""

    lease_seconds: float = _setting(
        "30",
        "How long a worker that does not answer keeps its tasks. It renews four times in this time.",
        unit="seconds",
        minimum=4,
    )
    drain_grace: float = _setting(
        "60",
        "How long a worker that is asked to stop lets running tasks finish before it hands them back.",
        unit="seconds",
        minimum=0,
    )
    kill_grace: float = _setting(
        "5", "How long a task that is ended has between SIGTERM and SIGKILL.", unit="seconds", minimum=0
    )
    deaf_after: float = _setting(
        "10",
        "A worker with a free slot that does not consume for this long repairs its connection or exits.",
        unit="seconds",
        minimum=1,
    )
    max_tasks_per_child: int = _setting(
        "1000", "A task process is replaced after this many tasks; 0: never.", minimum=0
    )
    max_memory_per_child_mb: int = _setting(
        "0", "A task process that has grown over this is replaced after its task; 0: no limit.", unit="MiB", minimum=0
    )
    log_flush_interval: float = _setting(
        "0.5", "The longest time a log line of a task waits on the worker.", unit="seconds", minimum=0.01, maximum=60
    )
    bundle_cache_dir: Path = _setting(  # noqa: RUF009 - declares a field, shares no object
        "{home}/bundle-cache", "Where a worker keeps the code of DAGs it has fetched."
    )
    bundle_cache_keep: int = _setting("20", "How many versions of the code stay in the cache.", minimum=1)
    health_check_port: int = _setting(
        "0", "The port of /healthz and /readyz; 0: any free one.", minimum=0, maximum=65535
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DagProcessorSettings:
    """The dag-processor."""

    scan_interval: float = _setting(
        "2", "How often the DAG folder is looked at for changed files.", unit="seconds", minimum=0.05
    )
    parsing_processes: int = _setting(
        "2", "How many files are parsed at once.", unit="processes", minimum=1, maximum=256
    )
    dag_file_processor_timeout: float = _setting(
        "50", "How long the process that parses one file may live.", unit="seconds", minimum=0.1
    )
    memory_limit_mb: int = _setting(
        "1024", "How much memory the process that parses one file may use; 0: no limit.", unit="MiB", minimum=0
    )
    health_check_port: int = _setting(
        "0", "The port of /healthz and /readyz; 0: any free one.", minimum=0, maximum=65535
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingSettings:
    """What the components say about themselves; the logs of tasks are in Postgres."""

    logging_level: str = _setting("INFO", "The least severe level that is logged.", choices=LOG_LEVELS)
    json: bool = _setting("false", "Log one JSON object a line instead of text.")


SECTION_CLASSES: Final[dict[str, type[Any]]] = {
    "core": CoreSettings,
    "database": DatabaseSettings,
    "celery": CelerySettings,
    "operators": OperatorsSettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "dag_processor": DagProcessorSettings,
    "logging": LoggingSettings,
}


@cache
def declarations() -> dict[str, dict[str, Setting]]:
    """Return every declaration as ``{section: {key: Setting}}``, in the order they are written here."""
    return {section: {s.key: s for s in _declared(section, cls)} for section, cls in SECTION_CLASSES.items()}


def all_settings() -> Iterator[Setting]:
    """Every declaration, section by section."""
    for keys in declarations().values():
        yield from keys.values()


def _declared(section: str, cls: type[Any]) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    for declared in fields(cls):
        hint = hints[declared.name]
        is_optional = isinstance(hint, UnionType)
        plain = next(t for t in get_args(hint) if t is not type(None)) if is_optional else hint
        kind: Kind = "path" if plain is Path else plain.__name__
        yield Setting(section=section, key=declared.name, kind=kind, is_optional=is_optional, **declared.metadata)
