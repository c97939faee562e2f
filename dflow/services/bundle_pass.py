"""One pass over one DAG folder: bring the rows in step with what a scan saw.

    store what is new -> parse what is concerned -> publish each result -> let go of what left -> pin the rest

Everything it decides comes from the scan and from rows, so a pass that is cut off anywhere is simply done again, also
by another dag-processor. It begins no further file after `BUDGET_SECONDS` and leaves the rest to the next pass, so
that the heartbeat, which is a finished pass, does not depend on how many files there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from dflow.services.bundle_scan import Scan
from dflow.services.code_store import Snapshots, StoredBundle, store_bundle
from dflow.services.dag_publishing import Published, Publishing, report
from dflow.services.parse_plan import MADE_WITH, FileRecord, Fingerprints, ParsePlan, plan_parsing
from dflow.services.parse_pool import Failure, Parsed, ParseOptions, ParsePool, user_code_env
from dflow.services.retries import Retries
from dflow.settings import Settings
from dflow.store import dag_files, dags, import_errors
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

BUDGET_SECONDS: Final = 10.0
_OUTPUT_SHOWN: Final = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What every pass works with."""

    settings: Settings
    store: Store
    snapshots: Snapshots
    bundle_names: frozenset[str]  # the bundles this dag-processor takes care of
    stop: threading.Event
    on_progress: Callable[[], None]  # called after each parsed file
    made_with: str  # differs when the same file may give another DAG: other defaults, another dflow or Python


class BundlePass:
    """One pass; made, run once and thrown away. ``is_first``: this process has not finished one for the bundle yet."""

    def __init__(self, name: str, scan: Scan, retries: Retries, tools: Tools, *, is_first: bool) -> None:
        self._name, self.scan, self._retries, self._tools = name, scan, retries, tools
        self._store: Store = tools.store
        self._is_first = is_first

    def run(self) -> Counter[str]:
        """Do it; ``pending`` counts files left over. Afterwards ``scan`` is what was stored."""
        bundle = store_bundle(self._store, self._name, self.scan)
        self.scan = bundle.scan
        known = self._store.run(self._load_known)
        plan = self._plan(bundle, known)
        self._store.run(lambda tx: self._report_unreadable(tx, known))
        results = self._parse(plan.parse, self._publishing(bundle, known)) if plan.parse else []
        counts = Counter(
            blobs=bundle.new_blobs,
            parsed=len(results),
            failed=sum(one.failure is not None for one in results),
            new_versions=sum(len(one.new_versions) for one in results),
            deactivated=sum(len(one.deactivated) for one in results),
            pending=len(plan.parse) - len(results),
        )
        if not counts["pending"]:
            counts.update(self._store.run(lambda tx: self._finish(tx, bundle, known)))
        return +counts

    # What there is

    @cached_property
    def _dag_files(self) -> set[str]:
        """The files to parse, if anything about them changed."""
        return {
            path for path, entry in self.scan.files.items() if entry.is_dag_candidate and not self._is_unreadable(path)
        }

    @cached_property
    def _unreadable_modules(self) -> set[str]:
        return {path for path in self.scan.unreadable if path.endswith(".py")}

    def _is_unreadable(self, path: str) -> bool:
        """Is it one that cannot be read now, or below a directory that cannot be listed?"""
        unreadable = self.scan.unreadable
        return path in unreadable or any(path.startswith(one) for one in unreadable if one.endswith("/"))

    def _load_known(self, tx: Tx) -> _Known:
        rows = dag_files.list_(tx, self._name)
        errors = import_errors.list_(tx, self._name)
        places = dags.locations(tx, [dag_id for row in rows for dag_id in row.dag_ids])
        return _Known(
            records={row.path: FileRecord(sha256=row.sha256, imports=row.imports, dag_ids=row.dag_ids) for row in rows},
            errors={row.path: Failure(message=row.message, traceback=row.traceback) for row in errors},
            lost={row.path for row in rows if any(places.get(i) != (self._name, row.path) for i in row.dag_ids)},
        )

    def _plan(self, bundle: StoredBundle, known: _Known) -> ParsePlan:
        retry = self._retries.due(known.errors, bundle.hash) | known.lost
        if self._is_first:  # and only then: two dag-processors of different versions must not go round in circles
            made_with = self._tools.made_with
            retry |= {path for path, row in known.records.items() if row.imports.get(MADE_WITH, made_with) != made_with}
        return plan_parsing(manifest=bundle.manifest, candidates=self._dag_files, records=known.records, retry=retry)

    # Parse and publish

    def _report_unreadable(self, tx: Tx, known: _Known) -> None:
        """Make an import error of each module that cannot be read; what is known of it stays."""
        for path in sorted(self._unreadable_modules):
            failure = Failure(message=f"{path} {self.scan.unreadable[path]}")
            report(tx, self._name, path, failure, known.errors.get(path))

    def _publishing(self, bundle: StoredBundle, known: _Known) -> Publishing:
        def may_own(bundle_name: str, path: str) -> bool:
            """May that other file keep a DAG id to itself? Not when it left, nor when nobody processes its bundle."""
            if bundle_name != self._name:
                return bundle_name in self._tools.bundle_names
            return path in self._dag_files or self._is_unreadable(path)

        core = self._tools.settings.core
        return Publishing(
            store=self._store,
            bundle_name=self._name,
            bundle_hash=bundle.hash,
            manifest=bundle.manifest,
            fingerprints=Fingerprints(bundle.manifest),
            made_with=self._tools.made_with,
            root=self._tools.snapshots.of(self._name, bundle.hash, bundle.manifest),
            may_own=may_own,
            is_paused_by_default=core.dags_are_paused_at_creation,
            is_code_stored=core.store_dag_code,
            dag_ids_before={path: record.dag_ids for path, record in known.records.items()},
            errors_before=known.errors,
        )

    def _parse(self, paths: Sequence[str], publishing: Publishing) -> list[Published]:
        """Parse and publish; returns what was published, which is less than planned when the time was over."""
        results: list[Published] = []
        postponed: dict[str, Parsed] = {}
        left = set(paths)
        with closing(self._sandboxed(paths, publishing.root)) as parsing:
            for parsed in parsing:
                left.discard(parsed.path)
                one = publishing.publish(parsed, is_final=False)
                if one.taken:
                    postponed[parsed.path] = parsed
                else:
                    results.append(one)
                    self._note(one, publishing.bundle_hash)
                self._tools.on_progress()
        late = _publish_postponed(publishing, self._name, postponed, left)
        for one in late:
            self._note(one, publishing.bundle_hash)
        return results + late

    def _sandboxed(self, paths: Sequence[str], root: Path) -> Generator[Parsed, None, None]:
        settings = self._tools.settings
        deadline = time.monotonic() + BUDGET_SECONDS
        with ParsePool(
            size=settings.dag_processor.parsing_processes,
            options=ParseOptions.from_settings(settings),
            env=user_code_env(settings),
            stop=self._tools.stop,
        ) as pool:
            for parsed in pool.parse(root, paths):
                if parsed.output.strip():
                    log.info("%s/%s printed: %s", self._name, parsed.path, parsed.output.strip()[:_OUTPUT_SHOWN])
                yield parsed
                if time.monotonic() > deadline:
                    pool.finish()

    def _note(self, one: Published, bundle_hash: str) -> None:
        if one.failure:
            self._retries.failed(one.path, bundle_hash)
            log.warning("import error in bundle %s: %s", self._name, one.failure.message)
        else:
            self._retries.forget(one.path)
        for dag_id in one.new_versions:
            log.info("DAG %s has a new version, from %s/%s", dag_id, self._name, one.path)
        for dag_id in one.deactivated:
            log.info("DAG %s is deactivated: %s/%s no longer defines it", dag_id, self._name, one.path)

    # Let go and pin

    def _finish(self, tx: Tx, bundle: StoredBundle, known: _Known) -> dict[str, int]:
        """Deactivate the DAGs of files that left, forget those files, and pin what works to the new code."""
        protected = {path for path in (*known.records, *known.errors) if self._is_unreadable(path)}
        keep = sorted(self._dag_files | self._unreadable_modules | protected)
        deactivated = dags.deactivate_missing(tx, bundle_name=self._name, paths=keep)
        for path in dag_files.forget_missing(tx, bundle_name=self._name, paths=keep):
            self._retries.forget(path)
        broken = {row.path for row in import_errors.list_(tx, self._name)}
        pinned = dags.set_bundle_hash(
            tx, bundle_name=self._name, bundle_hash=bundle.hash, except_paths=sorted(broken | protected)
        )
        if deactivated:
            log.info("deactivated, their files are gone: %s", ", ".join(deactivated))
        return {"deactivated": len(deactivated), "pinned": pinned}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is on record about the bundle at the beginning of a pass, by path."""

    records: Mapping[str, FileRecord]
    errors: Mapping[str, Failure]
    lost: set[str]  # files whose DAGs are not there any more: deleted by somebody, to be published anew


def _publish_postponed(
    publishing: Publishing, name: str, postponed: Mapping[str, Parsed], left: set[str]
) -> list[Published]:
    """Publish files with DAG ids that belonged to others, now that all others are done.

    A file waits for the next pass when the owner is still to be parsed. The second round is for files that traded ids.
    """
    results: dict[str, Published] = {}
    for _ in range(2):
        for path in sorted(postponed):
            if path in results and not results[path].taken:
                continue
            one = publishing.publish(postponed[path], is_final=False)
            if one.taken and not any(bundle == name and owner in left for bundle, owner in one.taken.values()):
                one = publishing.publish(postponed[path], is_final=True)
            elif one.taken:
                continue
            results[path] = one
    return list(results.values())
