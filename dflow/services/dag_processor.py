"""The dag-processor: turns DAG folders into stored code and serialized DAGs.

Two bundles: "dags" (the setting ``core.dags_folder``) and, with ``core.load_examples``, "examples". Each pass looks
at both (`dflow.services.bundle_sync`). This process never imports user code: files are parsed in sandboxes
(`dflow.services.parse_pool`). It decides nothing about what runs; it only publishes DAGs, their code and when their
next run is due. Any number of dag-processors may run side by side over the same folder.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import dflow
import dflow.examples
from dflow.authoring.defaults import Defaults
from dflow.services.base import Counts, run_forever, stop_on_signals
from dflow.services.bundle_pass import Tools
from dflow.services.bundle_sync import BundleSync
from dflow.services.code_store import Snapshots
from dflow.services.health import Health, HealthServer
from dflow.services.heartbeat import ServiceHeartbeat
from dflow.settings import Settings
from dflow.store import dag_files, dags
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

DAGS: Final = "dags"
EXAMPLES: Final = "examples"
_NOTHING_DONE: Final = frozenset({"locked", "unavailable", "pending"})


class DagProcessor:
    """The service: one pass looks at every bundle."""

    name = "dag-processor"

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        stop: threading.Event | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        folders = bundle_folders(settings)
        self._store = store
        self._stop = stop or threading.Event()
        self._scan_interval = settings.dag_processor.scan_interval
        self._is_tidied = False
        tools = Tools(
            settings=settings,
            store=store,
            snapshots=Snapshots(settings, store),
            bundle_names=frozenset(folders),
            stop=self._stop,
            on_progress=on_progress,
            made_with=_made_with(settings),
        )
        self._bundles = [BundleSync(name, folder, tools) for name, folder in folders.items()]

    def run_once(self) -> Counts:
        """Look at every bundle; return what was done: blobs, parsed, failed, new_versions, deactivated, pinned, ...

        Raises what the store raises.
        """
        if not self._is_tidied:
            self._store.run(self._leave_other_bundles)
            self._is_tidied = True
        counts: Counter[str] = Counter()
        for bundle in self._bundles:
            if not self._stop.is_set():
                counts += bundle.run_once()
        if counts.keys() - _NOTHING_DONE:
            log.info("pass: %s", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        return counts

    def wait(self, counts: Counts) -> None:
        """Return when the next pass is due: at once when this one got on but left something over."""
        if not (counts.get("pending") and counts.get("parsed")):
            self._stop.wait(self._scan_interval)

    def _leave_other_bundles(self, tx: Tx) -> None:
        """Deactivate the DAGs of bundles that are no longer configured: the examples, once they are switched off."""
        ours = {bundle.name for bundle in self._bundles}
        for name in {DAGS, EXAMPLES} - ours:
            deactivated = dags.deactivate_missing(tx, bundle_name=name, paths=[])
            dag_files.forget_missing(tx, bundle_name=name, paths=[])
            if deactivated:
                log.info("deactivated, the bundle %s is switched off: %s", name, ", ".join(deactivated))


def bundle_folders(settings: Settings) -> dict[str, Path]:
    """Return the folders to process, by bundle name."""
    folders = {DAGS: settings.core.dags_folder}
    if settings.core.load_examples:
        folders[EXAMPLES] = Path(dflow.examples.__file__).parent
    return folders


def _made_with(settings: Settings) -> str:
    """Return a text that differs when the same DAG file may give another DAG."""
    defaults = hashlib.sha256(repr(Defaults.from_settings(settings)).encode()).hexdigest()[:16]
    return f"dflow {dflow.__version__}, Python {platform.python_version()}, defaults {defaults}"


def main(settings: Settings) -> int:
    """Run a dag-processor until SIGTERM or SIGINT; return the exit code."""
    stop = stop_on_signals()
    store = Store.from_settings(settings, "dag-processor", pool_size=2)
    # The longest step between two signs of progress is one file.
    longest_step = settings.dag_processor.dag_file_processor_timeout + settings.dag_processor.scan_interval
    health = Health("dag-processor", threshold_seconds=settings.scheduler.health_check_threshold + longest_step)
    server = HealthServer(health, port=settings.dag_processor.health_check_port).start()
    heartbeat = ServiceHeartbeat(store, "dag-processor", health_url=server.url)
    processor = DagProcessor(store, settings, stop=stop, on_progress=health.turned)
    folders = ", ".join(f"{name}={folder}" for name, folder in bundle_folders(settings).items())
    log.info("dag-processor starts: %s, health at %s", folders, server.url)
    try:
        run_forever(processor, wait=processor.wait, stop=stop, health=health, heartbeat=heartbeat)
    finally:
        heartbeat.close()
        server.stop()
        store.close()
    log.info("dag-processor has stopped")
    return 0
