"""Keep one DAG folder and the database in step, pass by pass, at the cost of what changed.

A pass over a folder in which nothing happened costs one `stat` for each file and one small query, which notices when
another dag-processor or a person changed the rows (then, and when the folder changed, `dflow.services.bundle_pass` does
the work). A lock on the bundle keeps two dag-processors from doing the same work at once.

A folder that is missing, unreadable, or suddenly empty in place of one with files says nothing about its DAGs: more
likely a volume is not mounted. Then nothing is deactivated and a warning is logged.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Final

from dflow.services import bundle_scan
from dflow.services.bundle_pass import BundlePass, Tools
from dflow.services.bundle_scan import FolderUnavailableError, Scan
from dflow.services.retries import Retries
from dflow.store import dag_files
from dflow.store.locks import bundle_lock

log = logging.getLogger(__name__)

_REPEAT_WARNING_SECONDS: Final = 600.0


class BundleSync:
    """One bundle of one dag-processor. What it keeps in memory saves work; the rows decide."""

    def __init__(self, name: str, folder: Path, tools: Tools) -> None:
        self.name, self._folder, self._tools = name, folder, tools
        self._scan: Scan | None = None
        self._retries = Retries()
        self._in_step: tuple[object, ...] | None = None  # folder and rows as they were after the last full pass
        self._has_finished = False
        self._warned_at: dict[str, float] = {}

    def run_once(self) -> Counter[str]:
        """Bring the rows in step with the folder, or a good way towards it: ``pending`` counts files left over."""
        scan = self._look()
        if scan is None:
            return Counter(unavailable=1)
        if self._in_step == self._state(scan) and not self._retries.is_any_due():
            return Counter()
        with bundle_lock(self._tools.store, self.name) as is_ours:
            if not is_ours:
                return Counter(locked=1)
            work = BundlePass(self.name, scan, self._retries, self._tools, is_first=not self._has_finished)
            counts = work.run()
            self._scan = work.scan
            self._has_finished |= not counts["pending"]
            self._in_step = None if counts["pending"] else self._state(work.scan)
        return counts

    def _look(self) -> Scan | None:
        """Scan the folder; None when it says nothing."""
        try:
            scan = bundle_scan.scan(self._folder, self._scan)
        except FolderUnavailableError as error:
            self._warn(f"{error}; its DAGs stay as they are. Create the folder, mount it, or set core.dags_folder")
            return None
        if not scan.files and not self._was_emptied_by_hand(scan) and self._has_files_on_record():
            self._warn(
                f"the DAG folder {self._folder} is empty; its DAGs stay as they are. If a volume belongs there, mount "
                "it; to deactivate the DAGs, put any file into the folder"
            )
            return None
        self._scan = scan
        for warning in scan.warnings:
            self._warn(warning)
        return scan

    def _was_emptied_by_hand(self, scan: Scan) -> bool:
        """Is it the same directory that had files a moment ago? A missing mount shows another one."""
        return self._scan is not None and self._scan.identity == scan.identity

    def _has_files_on_record(self) -> bool:
        return bool(self._tools.store.run(lambda tx: dag_files.list_(tx, self.name)))

    def _state(self, scan: Scan) -> tuple[object, ...]:
        mark = self._tools.store.run(lambda tx: dag_files.mark(tx, self.name))
        return (mark, scan.manifest, dict(scan.unreadable))

    def _warn(self, message: str) -> None:
        """Log a warning, and the same one again only after a while."""
        now = time.monotonic()
        if now - self._warned_at.get(message, -_REPEAT_WARNING_SECONDS) >= _REPEAT_WARNING_SECONDS:
            self._warned_at[message] = now
            log.warning("%s", message)
