"""Bash: run commands. The last line a command prints is its result; its exit code decides how the task ends.

Exit code 0 is success, 99 is "skipped" (`skip_on_exit_code`), everything else is a failure and takes the next try.
Commands are templates: `{{ ds }}` and friends are filled in before they run, and `env` is too. What a command writes to
stdout and stderr is the log of the task.
"""

from __future__ import annotations

from dflow import DAG, BashOperator

with DAG("example_bash", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__):
    count = BashOperator(task_id="count", bash_command="ls /etc | wc -l")
    tell = BashOperator(
        task_id="tell",
        bash_command='echo "$COUNT files in /etc, said run $RUN"',
        env={"COUNT": "{{ ti.xcom_pull(task_ids='count') }}", "RUN": "{{ run_id }}"},
        append_env=True,
    )
    skip = BashOperator(task_id="skip", bash_command="echo 'nothing to do today'; exit 99")
    count >> [tell, skip]
