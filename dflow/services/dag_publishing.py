"""Write what came of parsing one file: its DAGs, or what is wrong with it. One transaction for each file.

A good file replaces what it defined before: new versions where the structure changed, DAGs it no longer defines are
deactivated, its import error is cleared. A broken file changes nothing but its import error: the last good versions of
its DAGs stay live, with the code they worked with.

A DAG id belongs to the file that had it first, as long as that file is there and defines it. Another file with the same
id gets an import error that names both; its other DAGs are published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dflow.core.errors import StoreUnavailableError
from dflow.core.spec import DagSpec
from dflow.core.timetable import next_run
from dflow.services.parse_plan import MADE_WITH, Fingerprints
from dflow.services.parse_pool import Failure, Parsed
from dflow.store import dag_files, dags, import_errors, runs
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

Place = tuple[str, str]  # bundle name, path


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What changed."""

    path: str
    failure: Failure | None = None
    taken: Mapping[str, Place] = field(default_factory=dict)  # dag ids that belong to others
    new_versions: tuple[str, ...] = ()  # dag ids
    deactivated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishing:
    """How the files of one bundle are published in one pass.

    ``may_own(bundle_name, path)`` tells whether that other file may keep a DAG id to itself: it is still there.
    """

    store: Store
    bundle_name: str
    bundle_hash: str
    root: Path  # the snapshot the files were parsed from
    manifest: Mapping[str, str]
    fingerprints: Fingerprints
    made_with: str
    may_own: Callable[[str, str], bool]
    is_paused_by_default: bool
    is_code_stored: bool
    dag_ids_before: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by path
    errors_before: Mapping[str, Failure] = field(default_factory=dict)  # by path

    def publish(self, parsed: Parsed, *, is_final: bool = True) -> Published:
        """Write the result of one file.

        Not final: when DAG ids of the file belong to others, nothing is written and ``taken`` says so; their files may
        be about to let go of them in this same pass. Raises StoreUnavailableError; whatever else goes wrong is the
        file's failure.
        """
        if parsed.failure is not None:
            return self._fail(parsed, parsed.failure)
        try:
            return self.store.run(lambda tx: self._publish_good(tx, parsed, is_final))
        except StoreUnavailableError:
            raise
        except Exception as error:
            log.exception("%s/%s could not be published", self.bundle_name, parsed.path)
            return self._fail(parsed, Failure(message=f"{parsed.path}: what it defines cannot be stored: {error}"))

    def _publish_good(self, tx: Tx, parsed: Parsed, is_final: bool) -> Published:
        taken = self._taken(tx, parsed)
        if taken and not is_final:
            return Published(path=parsed.path, taken=taken)
        specs = sorted((spec for spec in parsed.specs if spec.dag_id not in taken), key=lambda spec: spec.dag_id)
        new_versions = tuple(spec.dag_id for spec in specs if self._upsert(tx, spec, parsed.path))
        dag_ids = [spec.dag_id for spec in specs]
        deactivated = dags.deactivate_others_in_file(tx, bundle_name=self.bundle_name, path=parsed.path, keep=dag_ids)
        self._record(tx, parsed, dag_ids)
        failure = _conflict(parsed.path, self.bundle_name, taken) if taken else None
        if failure:
            report(tx, self.bundle_name, parsed.path, failure, self.errors_before.get(parsed.path))
        else:
            import_errors.clear(tx, bundle_name=self.bundle_name, path=parsed.path)
        return Published(
            path=parsed.path,
            failure=failure,
            taken=taken,
            new_versions=new_versions,
            deactivated=tuple(deactivated),
        )

    def _fail(self, parsed: Parsed, failure: Failure) -> Published:
        def write(tx: Tx) -> None:
            self._record(tx, parsed, self.dag_ids_before.get(parsed.path, ()))
            report(tx, self.bundle_name, parsed.path, failure, self.errors_before.get(parsed.path))

        self.store.run(write)
        return Published(path=parsed.path, failure=failure)

    def _upsert(self, tx: Tx, spec: DagSpec, path: str) -> bool:
        """Make the spec current; return whether it is a new version."""
        result = dags.upsert(
            tx,
            spec,
            bundle_name=self.bundle_name,
            path=path,
            bundle_hash=self.bundle_hash,
            paused_default=self.is_paused_by_default,
        )
        if result.is_schedule_changed:
            due = next_run(
                spec.schedule,
                last=runs.last_scheduled(tx, spec.dag_id),
                start_date=spec.start_date,
                end_date=spec.end_date,
                catchup=spec.catchup,
                now=datetime.now(UTC),
            )
            dags.set_next_run(tx, spec.dag_id, due)
        if self.is_code_stored:
            source = (self.root / path).read_text(encoding="utf-8", errors="replace")
            dags.put_code(tx, result.version_id, path, self.manifest[path], source)
        return result.is_new_version

    def _taken(self, tx: Tx, parsed: Parsed) -> dict[str, Place]:
        """Return the DAG ids of the file that belong to other files, and to which."""
        owners = dags.locations(tx, [spec.dag_id for spec in parsed.specs])
        ours = (self.bundle_name, parsed.path)
        return {dag_id: owner for dag_id, owner in owners.items() if owner != ours and self.may_own(*owner)}

    def _record(self, tx: Tx, parsed: Parsed, dag_ids: Sequence[str]) -> None:
        dag_files.put(
            tx,
            bundle_name=self.bundle_name,
            path=parsed.path,
            sha256=self.manifest[parsed.path],
            imports={**self.fingerprints.of_all(set(parsed.touched) - {parsed.path}), MADE_WITH: self.made_with},
            dag_ids=dag_ids,
            duration_seconds=parsed.duration_seconds,
        )


def report(tx: Tx, bundle_name: str, path: str, failure: Failure, before: Failure | None) -> None:
    """Record an import error. The same error again keeps its time, which says since when it is so."""
    if before != failure:
        import_errors.set_(tx, bundle_name=bundle_name, path=path, message=failure.message, traceback=failure.traceback)


def _conflict(path: str, bundle_name: str, taken: Mapping[str, Place]) -> Failure:
    lines = []
    for dag_id, (other_bundle, other_path) in sorted(taken.items()):
        where = other_path if other_bundle == bundle_name else f"{other_path} of the bundle {other_bundle!r}"
        lines.append(f"{path}: the DAG {dag_id!r} is defined in {where} already; give one of the two another dag_id")
    return Failure(message="\n".join(lines))
