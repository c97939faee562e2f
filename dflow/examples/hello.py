"""Hello: two Python functions become two tasks, and the result of one is the argument of the other.

Calling a function under `@task` does not run it: it puts a task into the DAG and returns a stand-in for its future
result. Passing the stand-in on makes the dependency; the value itself travels through Postgres as JSON (an "XCom").

    dflow dags test dflow/examples/hello.py                   in this process, with no service at all
    dflow dags trigger example_hello --wait                   on the cluster
    dflow tasks logs example_hello latest greet               what the task said
"""

from __future__ import annotations

from dflow import dag, task


@dag(dag_id="example_hello", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__)
def hello():
    @task
    def name() -> str:
        return "world"

    @task
    def greet(who: str) -> str:
        greeting = f"Hello, {who}!"
        print(greeting)
        return greeting

    greet(name())


hello()
