from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.splits import SPLITS, Split, hashed_split, place_sources

SOURCES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=30, unique=True)


@settings(max_examples=200, deadline=None)
@given(SOURCES)
def test_a_small_set_trains_and_validates(sources: list[str]) -> None:
    split_of = place_sources(sources, {})
    assert set(split_of) == set(sources)
    assert "train" in split_of.values()
    assert ("val" in split_of.values()) == (len(sources) > 1)
    moved = [source for source in sources if split_of[source] != hashed_split(source, (0.9, 0.05, 0.05))]
    assert len(moved) <= 2


@settings(max_examples=200, deadline=None)
@given(SOURCES, st.data())
def test_given_splits_stay(sources: list[str], data: st.DataObject) -> None:
    fixed: dict[str, Split] = {s: data.draw(st.sampled_from(SPLITS)) for s in sources if data.draw(st.booleans())}
    split_of = place_sources(sources, fixed)
    assert {source: split_of[source] for source in fixed} == fixed


def test_a_large_set_is_split_by_its_hashes_alone() -> None:
    sources = [f"video {i}" for i in range(2000)]
    assert place_sources(sources, {}) == {source: hashed_split(source, (0.9, 0.05, 0.05)) for source in sources}


def test_the_order_of_sources_does_not_matter() -> None:
    sources = [f"clip {i}" for i in range(8)]
    assert place_sources(sources, {}) == place_sources(sources[::-1], {})
