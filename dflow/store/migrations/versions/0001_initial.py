"""The first schema.

Hot tables (task_instance, dag_run, unaccounted, worker) leave room on their pages so that updates of columns no index
covers stay on the page, and have tight autovacuum. History tables (ti_event, attempt, log_chunk) are insert-only.
There are no foreign keys on the hot path: a key check would lock the parent row against the scheduler.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

# A frozen copy of dflow.core.states.LEGAL_TRANSITIONS as of this revision.
_LEGAL = {
    "none": "scheduled success failed skipped upstream_failed removed",
    "scheduled": "queued success failed skipped upstream_failed removed none",
    "queued": "running scheduled success failed skipped removed none",
    "running": "success failed skipped up_for_retry up_for_reschedule deferred restarting",
    "up_for_retry": "scheduled success failed skipped removed none",
    "up_for_reschedule": "scheduled success failed skipped removed none",
    "deferred": "scheduled success failed skipped up_for_retry removed none",
    "restarting": "scheduled failed skipped none",
    "success": "none failed skipped",
    "failed": "none success skipped",
    "skipped": "none success failed",
    "upstream_failed": "none success failed skipped",
    "removed": "none",
}

_SCHEMA = """
CREATE TABLE code_blob (
    sha256      text PRIMARY KEY,
    content     bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE bundle (
    hash        text PRIMARY KEY,             -- sha256 over the sorted (path, sha256) pairs
    name        text NOT NULL,
    manifest    jsonb NOT NULL,               -- {"files": {path: sha256}}
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE dag_file (
    bundle_name text NOT NULL,
    path        text NOT NULL,                -- relative to the bundle, with /
    sha256      text NOT NULL,
    imports     jsonb NOT NULL DEFAULT '{}',  -- other files of the bundle it imported: {path: sha256}
    dag_ids     text[] NOT NULL DEFAULT '{}',
    parsed_at   timestamptz NOT NULL,
    duration_seconds double precision NOT NULL,
    PRIMARY KEY (bundle_name, path)
);

CREATE TABLE import_error (
    bundle_name text NOT NULL,
    path        text NOT NULL,
    message     text NOT NULL,
    traceback   text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (bundle_name, path)
);

CREATE TABLE dag (
    dag_id      text PRIMARY KEY,
    bundle_name text NOT NULL,
    path        text NOT NULL,
    is_active   boolean NOT NULL DEFAULT true,   -- false: its file is gone
    is_paused   boolean NOT NULL DEFAULT false,
    version_id  bigint,                          -- the current dag_version
    bundle_hash text,                            -- the code new runs are pinned to
    description text,
    tags        text[] NOT NULL DEFAULT '{}',
    owners      text[] NOT NULL DEFAULT '{}',
    schedule_summary text NOT NULL DEFAULT 'None',
    max_active_runs  integer NOT NULL DEFAULT 16,
    next_logical_date   timestamptz,
    next_interval_start timestamptz,
    next_interval_end   timestamptz,
    next_run_after      timestamptz,             -- NULL: nothing is due, ever
    parsed_at   timestamptz NOT NULL DEFAULT now(),
    created_at  timestamptz NOT NULL DEFAULT now(),
    team        text
) WITH (fillfactor = 80);
CREATE INDEX dag_due ON dag (next_run_after) WHERE is_active AND NOT is_paused AND next_run_after IS NOT NULL;

CREATE TABLE dag_version (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dag_id      text NOT NULL,
    number      integer NOT NULL,
    structure_hash text NOT NULL,
    spec        jsonb NOT NULL,
    bundle_hash text NOT NULL,                   -- the bundle it was first seen in
    created_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (dag_id, number),
    UNIQUE (dag_id, structure_hash)
);

CREATE TABLE dag_code (                          -- for display only; core.store_dag_code
    dag_version_id bigint NOT NULL,
    sha256      text NOT NULL,
    path        text NOT NULL,
    source      text NOT NULL,
    PRIMARY KEY (dag_version_id, sha256)
);

CREATE TABLE dag_run (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dag_id      text NOT NULL,
    run_id      text NOT NULL,
    run_type    text NOT NULL,
    state       text NOT NULL CHECK (state IN ('queued', 'running', 'success', 'failed')),
    logical_date        timestamptz,
    data_interval_start timestamptz,
    data_interval_end   timestamptz,
    run_after   timestamptz NOT NULL,
    conf        jsonb NOT NULL DEFAULT '{}',
    dag_version_id bigint NOT NULL,
    bundle_hash text NOT NULL,
    path        text NOT NULL,                   -- the DAG file in the bundle
    max_active_tasks integer NOT NULL,
    version     bigint NOT NULL DEFAULT 0,       -- bumped whenever accounted state changes; validates caches
    triggered_by text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    started_at  timestamptz,
    ended_at    timestamptz,
    timeout_at  timestamptz,
    timeout_seconds double precision,            -- dagrun_timeout
    cancel_requested_at timestamptz,
    cancelled_by text,
    cause       text,                            -- why it ended as it did, in words
    note        text,
    UNIQUE (dag_id, run_id),
    UNIQUE (dag_id, logical_date),
    CHECK ((ended_at IS NOT NULL) = (state IN ('success', 'failed')))
) WITH (fillfactor = 80);
CREATE INDEX dag_run_queued ON dag_run (dag_id, run_after, id) WHERE state = 'queued';
CREATE INDEX dag_run_running ON dag_run (dag_id) WHERE state = 'running';
CREATE INDEX dag_run_timeout ON dag_run (timeout_at) WHERE state = 'running' AND timeout_at IS NOT NULL;
CREATE INDEX dag_run_recent ON dag_run (dag_id, id DESC);
CREATE INDEX dag_run_by_time ON dag_run (run_after DESC);

CREATE TABLE task_instance (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_pk      bigint NOT NULL,                 -- dag_run.id
    dag_id      text NOT NULL,
    task_id     text NOT NULL,
    map_index   integer NOT NULL DEFAULT -1,
    state       text NOT NULL DEFAULT 'none',
    attempt_id  uuid,                            -- the fence: set on admission, cleared when scheduled again
    try_number  integer NOT NULL DEFAULT 0,      -- attempts started so far
    user_failures  integer NOT NULL DEFAULT 0,   -- counted against retries
    infra_failures integer NOT NULL DEFAULT 0,   -- counted against core.infra_retries
    retries     integer NOT NULL DEFAULT 0,
    pool        text NOT NULL,
    pool_slots  integer NOT NULL DEFAULT 1,
    queue       text NOT NULL,
    executor    text,
    priority_weight integer NOT NULL DEFAULT 1,
    not_before  timestamptz,
    scheduled_at timestamptz,
    queued_at   timestamptz,
    published_at timestamptz,
    publish_count integer NOT NULL DEFAULT 0,
    worker_id   uuid,
    hostname    text,
    pid         integer,
    started_at  timestamptz,
    ended_at    timestamptz,
    cancel_requested_at timestamptz,
    cancelled_by text,
    reason      text,                            -- of the last transition
    cause       text,                            -- in words: "killed by signal 9 (SIGKILL), peak 3.9 GiB"
    note        text,
    UNIQUE (run_pk, task_id, map_index)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
CREATE INDEX ti_scheduled ON task_instance (run_pk, priority_weight DESC, id) WHERE state = 'scheduled';
CREATE INDEX ti_active ON task_instance (run_pk) WHERE state IN ('queued', 'running');
CREATE INDEX ti_waiting ON task_instance (not_before) WHERE state IN ('up_for_retry', 'up_for_reschedule');
CREATE INDEX ti_worker ON task_instance (worker_id) WHERE state = 'running';

CREATE TABLE legal_transition (
    from_state text NOT NULL,
    to_state   text NOT NULL,
    PRIMARY KEY (from_state, to_state)
);

CREATE FUNCTION enforce_legal_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM legal_transition WHERE from_state = OLD.state AND to_state = NEW.state) THEN
        RAISE EXCEPTION 'illegal transition of task instance %: % -> %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER legal_transition BEFORE UPDATE OF state ON task_instance
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION enforce_legal_transition();

CREATE TABLE unaccounted (                       -- the scheduler's inbox: ends it has not planned with yet
    ti_id      bigint NOT NULL,
    run_pk     bigint NOT NULL,
    state      text NOT NULL,
    at         timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
CREATE INDEX unaccounted_run ON unaccounted (run_pk);

CREATE TABLE ti_event (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ti_id      bigint NOT NULL,
    run_pk     bigint NOT NULL,
    attempt_id uuid,
    from_state text NOT NULL,
    to_state   text NOT NULL,
    reason     text NOT NULL,
    actor      text NOT NULL,                    -- "scheduler 3f2a…", "worker w1@host", "user ann (cli)"
    cause      text,
    at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ti_event_ti ON ti_event (ti_id, id);

CREATE TABLE attempt (                           -- one row for each attempt that has ended
    id         uuid PRIMARY KEY,
    ti_id      bigint NOT NULL,
    run_pk     bigint NOT NULL,
    try_number integer NOT NULL,
    state      text NOT NULL,                    -- the state the attempt ended the task instance in
    reason     text NOT NULL,
    cause      text,
    exit_code  integer,                          -- negative: minus the signal number
    peak_rss_bytes bigint,
    worker_id  uuid,
    hostname   text,
    pid        integer,
    queued_at  timestamptz,
    started_at timestamptz,
    ended_at   timestamptz NOT NULL
);
CREATE INDEX attempt_ti ON attempt (ti_id, try_number);

CREATE TABLE worker (                            -- one row for each worker incarnation: its lease
    id         uuid PRIMARY KEY,
    name       text NOT NULL,                    -- Celery's node name, for people
    hostname   text NOT NULL,
    pid        integer NOT NULL,
    executor   text NOT NULL,
    queues     text[] NOT NULL,
    concurrency integer NOT NULL,
    state      text NOT NULL CHECK (state IN ('live', 'draining', 'gone')),
    lease_until timestamptz NOT NULL,
    lease_seconds double precision NOT NULL,
    health_url text,
    version    text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    ended_at   timestamptz,
    cause      text,                             -- why it is gone
    claimed    bigint NOT NULL DEFAULT 0,        -- attempts claimed so far
    last_claim_at timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 50);
CREATE INDEX worker_live ON worker (lease_until) WHERE state <> 'gone';

CREATE TABLE service (                           -- schedulers, dag-processors: a heartbeat is a finished pass
    id         uuid PRIMARY KEY,
    kind       text NOT NULL,
    hostname   text NOT NULL,
    pid        integer NOT NULL,
    health_url text,
    version    text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    ended_at   timestamptz,
    info       jsonb NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);

CREATE TABLE pool (
    name       text PRIMARY KEY,
    slots      integer NOT NULL CHECK (slots >= -1),  -- -1: no limit
    description text NOT NULL DEFAULT '',
    include_deferred boolean NOT NULL DEFAULT false
);
INSERT INTO pool (name, slots, description) VALUES ('default_pool', 128, 'Default pool');

CREATE TABLE xcom (
    run_pk     bigint NOT NULL,
    task_id    text NOT NULL,
    map_index  integer NOT NULL DEFAULT -1,
    key        text NOT NULL,
    value      jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_pk, task_id, map_index, key)
);

CREATE TABLE log_chunk (
    attempt_id uuid NOT NULL,
    seq        integer NOT NULL,
    ti_id      bigint NOT NULL,
    lines      jsonb NOT NULL,                   -- [[epoch seconds, level, source, text], ...]
    at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (attempt_id, seq)
);
CREATE INDEX log_chunk_ti ON log_chunk (ti_id);
"""

_TABLES = (
    "log_chunk xcom pool service worker attempt ti_event unaccounted task_instance legal_transition dag_run dag_code "
    "dag_version dag import_error dag_file bundle code_blob"
)


def upgrade() -> None:
    """Create everything."""
    op.execute(_SCHEMA)
    rows = ", ".join(f"('{old}', '{new}')" for old, news in _LEGAL.items() for new in news.split())
    op.execute(f"INSERT INTO legal_transition VALUES {rows}")


def downgrade() -> None:
    """Drop everything."""
    op.execute(f"DROP TABLE {', '.join(_TABLES.split())}")
    op.execute("DROP FUNCTION enforce_legal_transition()")
