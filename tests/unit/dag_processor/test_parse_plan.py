"""Which files are parsed again, and which are not."""

from __future__ import annotations

from dflow.services.parse_plan import FileRecord, Fingerprints, ParsePlan, plan_parsing

MANIFEST = {"a.py": "A", "b.py": "B", "lib/util.py": "U", "conf/x.yaml": "X"}


def plan(
    manifest: dict[str, str] = MANIFEST,
    *,
    candidates: tuple[str, ...] = ("a.py", "b.py"),
    records: dict[str, FileRecord] | None = None,
    retry: tuple[str, ...] = (),
) -> ParsePlan:
    return plan_parsing(manifest=manifest, candidates=candidates, records=records or {}, retry=retry)


def records(**imports: dict[str, str]) -> dict[str, FileRecord]:
    return {
        "a.py": FileRecord(sha256="A", imports=imports.get("a", {})),
        "b.py": FileRecord(sha256="B", imports=imports.get("b", {})),
    }


def test_everything_is_parsed_the_first_time() -> None:
    assert plan() == ParsePlan(parse=("a.py", "b.py"), gone=())


def test_nothing_is_parsed_when_nothing_changed() -> None:
    assert plan(records=records(a={"lib/util.py": "U"})) == ParsePlan(parse=(), gone=())


def test_a_changed_file_is_parsed_alone() -> None:
    assert plan(MANIFEST | {"a.py": "A2"}, records=records()).parse == ("a.py",)


def test_who_imports_a_changed_module_is_parsed_too() -> None:
    known = records(b={"lib/util.py": "U"})
    assert plan(MANIFEST | {"lib/util.py": "U2"}, records=known).parse == ("b.py",)


def test_a_dependency_that_went_or_came_counts_as_changed() -> None:
    known = records(a={"lib/util.py": "U"}, b={"conf/y.yaml": ""})
    without = {path: sha for path, sha in MANIFEST.items() if path != "lib/util.py"}
    assert plan(without, records=known).parse == ("a.py",)
    assert plan(MANIFEST | {"conf/y.yaml": "Y"}, records=known).parse == ("b.py",)


def test_who_listed_a_directory_is_parsed_when_a_file_is_added_there() -> None:
    known = records(a={"conf/": Fingerprints(MANIFEST).of("conf/")}, b={"./": Fingerprints(MANIFEST).of("./")})
    assert plan(records=known).parse == ()
    assert plan(MANIFEST | {"conf/y.yaml": "Y"}, records=known).parse == ("a.py",)
    assert plan(MANIFEST | {"c.csv": "C"}, records=known).parse == ("b.py",)
    assert plan(MANIFEST | {"conf/x.yaml": "X2"}, records=known).parse == ()


def test_failed_files_are_parsed_when_it_is_time() -> None:
    assert plan(records=records(), retry=("a.py",)).parse == ("a.py",)


def test_files_that_left_or_no_longer_speak_of_dags_are_gone() -> None:
    without = {path: sha for path, sha in MANIFEST.items() if path != "a.py"}
    assert plan(without, candidates=("b.py",), records=records()).gone == ("a.py",)
    assert plan(candidates=("b.py",), records=records()).gone == ("a.py",)


def test_a_gone_file_is_not_tried_again() -> None:
    assert plan(candidates=(), records=records(), retry=("a.py",)).parse == ()
