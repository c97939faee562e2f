"""Measure dflow against raw Celery, in the same run, on the same machine, with the same Redis.

    python -m benchmarks.run [--workers 1] [--concurrency 4] [--rounds 5] [--json FILE]

Starts `dflow standalone` in an empty home, and beside it as many raw Celery workers with the same concurrency. Rounds
of raw and dflow alternate, so that both see the same machine; the other side idles meanwhile. Reported:

- *drain rate*: tasks a second. Raw: from the first message published to the last acknowledged. dflow: from the first
  start to the last end of the 500 middle tasks, by the database's clock, scheduler and all state included.
- *gap*: from the end of a task to the start of its successor in a chain of 50. By the rows (end written to claim), and
  by the clock inside the tasks (function returned to next function entered), which is everything a user waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg2
import redis
from kombu import Connection

from benchmarks.raw import noop
from dflow.embedded.locations import urls

HERE = Path(__file__).parent
DAGS = HERE / "dags"
RAW_COUNT = 2000
DEADLINE_SECONDS = 180


def main() -> int:
    """Run the rounds and print one table; exit 1 when something did not finish."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="dflow-bench-") as folder, Cluster(Path(folder), options) as cluster:
        cluster.wait_ready()
        cluster.fanout(), cluster.chain()  # once for warmth: bundles cached, plans kept
        raw, rates, row_gaps, task_gaps = [], [], [], []
        for _ in range(options.rounds):
            raw.append(cluster.raw())
            rates.append(cluster.fanout())
            by_rows, by_tasks = cluster.chain()
            row_gaps += by_rows
            task_gaps += by_tasks
    result = {
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.2f}",
        "versions": {name: version(name) for name in ("celery", "kombu", "redis", "sqlalchemy", "psycopg2-binary")},
        "workers": f"{options.workers} x {options.concurrency}",
        "raw_celery_per_second": round(statistics.median(raw), 1),
        "fanout_per_second": round(statistics.median(rates), 1),
        "fanout_ratio": round(statistics.median(rates) / statistics.median(raw), 3),
        "chain_gap_ms_by_rows": _spread(row_gaps),
        "chain_gap_ms_in_tasks": _spread(task_gaps),
        "rounds": {"raw": [round(rate) for rate in raw], "fanout": [round(rate) for rate in rates]},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="worker machines (Celery parents) on each side")
    parser.add_argument("--concurrency", type=int, default=4, help="processes of each worker")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of raw and dflow, alternating")
    parser.add_argument("--json", help="also write the result to this file")
    return parser.parse_args()


def _spread(gaps: list[float]) -> dict[str, float]:
    ordered = sorted(gap * 1000 for gap in gaps)
    return {
        "median": round(statistics.median(ordered), 2),
        "p95": round(ordered[int(len(ordered) * 0.95)], 2),
        "max": round(ordered[-1], 2),
    }


class Cluster:
    """`dflow standalone` and the raw workers, started together and stopped together."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.home, self.options = folder / "home", options
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DFLOW")},
            "DFLOW_HOME": str(self.home),
            "DFLOW__CORE__DAGS_FOLDER": str(DAGS),
            "DFLOW__CORE__LOAD_EXAMPLES": "False",
        }

    def __enter__(self) -> Cluster:
        self.home.mkdir(parents=True)
        self._start(
            "standalone",
            f"{sys.executable} -m dflow standalone --no-flower --workers {self.options.workers}"
            f" --concurrency {self.options.concurrency}".split(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.home / f"bench-{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command, env=self.environment, cwd=HERE.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def wait_ready(self) -> None:
        """Wait until both DAGs are there and all workers of both sides are, then start the raw workers."""

        def ready() -> bool:
            self.database_url, self.broker_url = urls(self.home)
            with self.rows() as rows:
                rows.execute("SELECT (SELECT count(*) FROM dag), (SELECT count(*) FROM worker WHERE state = 'live')")
                return rows.fetchone() == (2, self.options.workers)

        self._eventually("the cluster is up", ready, pause=0.2)
        self.environment["RAW_BROKER_URL"] = self.broker_url
        for number in range(self.options.workers):
            self._start(
                f"raw-{number}",
                f"{sys.executable} -m celery -A benchmarks.raw worker -n raw{number}@%h -Q raw --loglevel WARNING"
                f" -c {self.options.concurrency}".split(),
            )
        with Connection(self.broker_url) as connection:
            self.redis: redis.Redis = connection.default_channel.client
            self._publish_raw(connection, 200)
            self._eventually("the raw workers are up", self._raw_drained)

    def raw(self) -> float:
        """Publish no-op tasks to the raw workers; return tasks a second until all are acknowledged."""
        with Connection(self.broker_url) as connection:
            began = time.perf_counter()
            self._publish_raw(connection, RAW_COUNT)
            self._eventually("raw tasks are drained", self._raw_drained)
            return RAW_COUNT / (time.perf_counter() - began)

    def _publish_raw(self, connection: Connection, count: int) -> None:
        with connection.Producer() as producer, producer.batch():
            for _ in range(count):
                noop.apply_async(producer=producer, queue="raw")

    def _raw_drained(self) -> bool:
        return not self.redis.llen("raw") and not self.redis.hlen("unacked")

    def fanout(self) -> float:
        """Run the fan-out once; return middle tasks a second from the first start to the last end."""
        run_pk = self._run("bench_fanout")
        with self.rows() as rows:
            rows.execute(
                "SELECT count(*), extract(epoch FROM max(ended_at) - min(started_at)) FROM task_instance"
                " WHERE run_pk = %s AND task_id LIKE 'noop_%%'",
                (run_pk,),
            )
            count, seconds = rows.fetchone()
        return count / float(seconds)

    def chain(self) -> tuple[list[float], list[float]]:
        """Run the chain once; return the gaps in seconds, by the rows and by the clocks inside the tasks."""
        run_pk = self._run("bench_chain")
        with self.rows() as rows:
            rows.execute(
                "SELECT extract(epoch FROM started_at), extract(epoch FROM ended_at), value FROM task_instance"
                " JOIN xcom USING (run_pk, task_id) WHERE run_pk = %s AND key = 'return_value' ORDER BY task_id",
                (run_pk,),
            )
            links = rows.fetchall()
        pairs = list(itertools.pairwise(links))
        by_rows = [float(after[0] - before[1]) for before, after in pairs]
        return by_rows, [after[2]["began"] - before[2]["ended"] for before, after in pairs]

    def _run(self, dag_id: str) -> int:
        run_id = f"bench_{time.time_ns()}"
        command = [sys.executable, "-m", "dflow", "dags", "trigger", dag_id, "--run-id", run_id]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
        state: tuple[int, str] = (0, "")

        def ended() -> bool:
            nonlocal state
            with self.rows() as rows:
                rows.execute("SELECT id, state FROM dag_run WHERE run_id = %s", (run_id,))
                state = rows.fetchone()
            return state[1] in ("success", "failed")

        self._eventually(f"a run of {dag_id} ends", ended, pause=0.05)
        if state[1] != "success":
            raise SystemExit(f"the run {run_id} of {dag_id} ended {state[1]}; logs are in {self.home}")
        return state[0]

    @contextlib.contextmanager
    def rows(self) -> Iterator[Any]:
        """A cursor on a connection of its own, closed at the end."""
        connection = psycopg2.connect(self.database_url.replace("postgresql+psycopg2://", "postgresql://"))
        try:
            with connection, connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def _eventually(self, what: str, condition: Any, pause: float = 0.005) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        problem: Exception | None = None
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self.processes):
                break
            try:
                if condition():
                    return
            except (psycopg2.Error, redis.RedisError, TypeError) as error:  # not up yet
                problem = error
            time.sleep(pause)
        tail = (self.home / "bench-standalone.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"waited {DEADLINE_SECONDS} s in vain until {what} ({problem})\n{tail}")


if __name__ == "__main__":
    raise SystemExit(main())
