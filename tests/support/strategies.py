"""Hypothesis strategies for hostile names, numbers and trees, and settings for quiet examples."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.audit_watch import TOKEN

NAMES = st.one_of(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    st.sampled_from(
        ["../up", "a/../../b", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "\x1b]0;owned\x07", "~root", "a" * 5000,
         "caf\u00e9", "\u202egnp", "con", "-rf", "$(id)", "`id`", "%s%n", TOKEN, f"https://ada:{TOKEN}@hub.org/x",
         f"https://hub.org/?token={TOKEN}", "user/model", "user/../model", "\ud800"]
    ),
    st.text(max_size=12),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, True, None, "1e400", float("inf"), float("nan")]),
)
ANY = st.recursive(
    st.one_of(NAMES, NUMBERS, st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
QUIET = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example],
)
