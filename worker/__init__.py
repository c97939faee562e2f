"""The Celery worker of dflow: ``celery -A worker worker|inspect|control|flower``.

A stock Celery prefork worker with an agent beside it. `worker.celery` has the application (Celery finds it by itself),
`worker.bootsteps` starts and stops the agent around the pool, `worker.prefork` tells it how task processes ended,
`worker.request` leaves ending them to it. Importing this package starts nothing.
"""
