"""Trigger rules: what runs when something before it failed or was skipped.

Usually a task waits until everything before it has succeeded (`all_success`), and when something failed it never
runs: it ends as `upstream_failed`. A trigger rule changes that. Here `work` always fails, and

- `publish` (all_success) does not run,
- `alert` (one_failed) runs as soon as something failed,
- `clean_up` (all_done) runs when everything before it has ended, however it ended.

A run succeeds when its last tasks do. `clean_up` is the last one here and succeeds, so this run is a success although a
task failed. To have the failure decide, make the cleaner a teardown (`@teardown`), which does not count.
"""

from __future__ import annotations

from dflow import dag, task


@dag(dag_id="example_trigger_rules", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__)
def trigger_rules():
    @task
    def make_room() -> str:
        return "/tmp/workspace"

    @task(retries=0)
    def work(where: str) -> None:
        raise RuntimeError(f"something in {where} is broken")

    @task
    def publish() -> None:
        print("never printed")

    @task(trigger_rule="one_failed")
    def alert() -> None:
        print("something failed: telling somebody")

    @task(trigger_rule="all_done")
    def clean_up() -> None:
        print("tidying up, whatever happened")

    end = clean_up()
    work(make_room()) >> [publish(), alert()] >> end


trigger_rules()
