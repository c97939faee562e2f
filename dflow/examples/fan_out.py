"""Chain and fan out: order without data.

`>>` puts tasks in order, lists fan out and in, `chain` writes a long order in one line (two lists of the same length
are joined pair by pair), `cross_downstream` joins everything with everything:

    start ─┬─> load_a ─> check_a ─┬─> publish ─> done
           ├─> load_b ─> check_b ─┤
           └─> load_c ─> check_c ─┴─> archive ─> done

Tasks in a fan run side by side, on whatever worker has room. `EmptyOperator` does nothing and needs no worker: it only
gives the graph a beginning and an end.
"""

from __future__ import annotations

import time

from dflow import DAG, EmptyOperator, PythonOperator, chain, cross_downstream


def load(table: str) -> int:
    """Pretend to load a table; returns how many rows it had."""
    time.sleep(0.2)
    print(f"loaded {table}")
    return len(table) * 100


def check(table: str) -> None:
    """Pretend to check it."""
    print(f"{table} is fine")


with DAG("example_fan_out", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__):
    tables = ["a", "b", "c"]
    start, done = EmptyOperator(task_id="start"), EmptyOperator(task_id="done")
    loads = [PythonOperator(task_id=f"load_{t}", python_callable=load, op_args=[t]) for t in tables]
    checks = [PythonOperator(task_id=f"check_{t}", python_callable=check, op_kwargs={"table": t}) for t in tables]
    ends = [EmptyOperator(task_id="publish"), EmptyOperator(task_id="archive")]

    chain(start, loads, checks)
    cross_downstream(checks, ends)
    ends >> done
