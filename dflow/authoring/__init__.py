"""What people write in DAG files: DAG, operators, TaskFlow, groups, params; and its reduction to a plain `DagSpec`.

Names, keyword arguments and meaning follow ``airflow.sdk``. A mistake is refused where it is made, while the file is
parsed, by a `DagDefinitionError` naming file and line of the user's code. Imports `core` (and reads the types of
`settings`); knows nothing of databases, brokers or processes. Running what is written here is `dflow.runtime`.
"""
