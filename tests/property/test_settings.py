"""Values of settings survive being written down and read again, and no password survives being shown."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dflow.settings import Setting, all_settings, redact_url
from dflow.settings.values import Value, parse, to_text

HOME = Path("/home/of/dflow")
LARGEST = 10**9


def _values(setting: Setting) -> st.SearchStrategy[Value]:
    low = setting.minimum if setting.minimum is not None else -LARGEST
    high = setting.maximum if setting.maximum is not None else LARGEST
    match setting.kind:
        case "bool":
            return st.booleans()
        case "int":
            return st.integers(int(low), int(high))
        case "float":
            numbers = st.floats(low, high)
            return st.none() | numbers if setting.is_optional else numbers
        case "path":
            return st.sampled_from([Path("/a/b c"), Path("/")])
        case _ if setting.choices:
            return st.sampled_from(setting.choices)
        case _:
            return st.text(st.characters(exclude_categories=("C", "Z")), max_size=40)


SETTINGS_WITH_VALUES = st.sampled_from(list(all_settings())).flatmap(
    lambda setting: st.tuples(st.just(setting), _values(setting))
)


@given(SETTINGS_WITH_VALUES)
def test_a_value_is_read_back_from_its_text(pair: tuple[Setting, Value]) -> None:
    setting, value = pair
    assert parse(setting, to_text(value), HOME) == value


PASSWORDS = st.text("aZ0@/#?:%&=+ []", min_size=3, max_size=12).map(lambda noise: f"hunter{noise}2")


@given(st.sampled_from(["redis://{}{}@h:1/0", "postgresql+psycopg2://{}{}@[::1]:5432/d?x=1"]), PASSWORDS)
def test_no_password_is_shown_however_badly_it_is_written(template: str, password: str) -> None:
    shown = redact_url(template.format("user:", password))
    assert "hunter" not in shown
    assert shown.startswith(template.partition("{")[0] + "user:***@")


@given(PASSWORDS.filter(lambda password: "&" not in password))
def test_no_password_in_the_query_is_shown(password: str) -> None:
    assert "hunter" not in redact_url(f"postgresql:///d?host=/run&sslpassword={password}&x=1")
