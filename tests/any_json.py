"""JSON of ours with one value of it replaced by another of any shape."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in items for place in _places(inner, (*at, key)))]


def _with(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    items = value.items() if isinstance(value, dict) else enumerate(value)
    replaced = [(key, _with(inner, place[1:], new) if key == place[0] else inner) for key, inner in items]
    return dict(replaced) if isinstance(value, dict) else [inner for _, inner in replaced]


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with something else in one place, which may be the whole of it."""
    return _with(value, draw(st.sampled_from(_places(value))), draw(_JSON))
