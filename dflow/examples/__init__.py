"""The example DAGs that come with dflow, shown when the setting ``core.load_examples`` is on.

They are a bundle like any DAG folder: the dag-processor stores and parses them, workers fetch them by hash. Each small
one teaches one idea; `tz_report` is a real job on real data. They import nothing but ``dflow`` and the standard library
(and tz_report the `tzdata` package), and run without any service too: ``dflow dags test dflow/examples/hello.py``.
"""
