"""`dflow standalone`: the whole system on one machine, as separate processes under one supervisor.

`supervisor` starts, watches and ends; `components` says what the processes are; `record` remembers them across a kill;
`attach` lets other commands find them; `display` shows runs and workers. May import everything but `cli` and `worker`.
"""
