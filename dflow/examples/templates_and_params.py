"""Templates and params: values that are known only when a run begins.

Params have a default, a description and a JSON Schema. Whoever triggers a run may give others; what does not fit the
schema is refused before anything runs:

    dflow dags trigger example_templates_and_params --wait --conf '{"city": "Oslo", "days": 3}'

Templates (Jinja) are filled in on the worker, just before the task runs. They see the params and the variables of the
run: `ds` is its date, `logical_date` the instant, `run_id` its id, `macros` holds helpers.
"""

from __future__ import annotations

from dflow import DAG, BashOperator, Param, task

with DAG(
    "example_templates_and_params",
    schedule=None,
    is_paused_upon_creation=False,
    tags=["example"],
    doc_md=__doc__,
    params={
        "city": Param("Berlin", type="string", minLength=1, description="Where."),
        "days": Param(7, type="integer", minimum=1, maximum=14, description="How many days ahead."),
    },
):
    show = BashOperator(
        task_id="show",
        bash_command="""
            echo "Run {{ run_id }}"
            {% for day in range(params.days) %}
            echo "{{ params.city }}, day {{ loop.index }}"
            {% endfor %}
        """,
    )

    @task
    def plan(params=None, run_id=None) -> dict:
        """A Python task gets the same values as arguments of these names."""
        return {"city": params["city"], "days": params["days"], "run": run_id}

    show >> plan()
