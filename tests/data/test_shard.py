"""Shares of the clips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.score_clips import Shard, parse_shard


@given(clips=st.integers(0, 50), count=st.integers(1, 9))
def test_each_clip_is_in_one_share_and_shares_are_even(clips: int, count: int) -> None:
    shares = [range(clips)[i::count] for i in range(count)]
    assert sorted(clip for share in shares for clip in share) == list(range(clips))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len({Shard(i, count).file_name for i in range(count)}) == count


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, Shard(0, 1)),
        ("2/5", {}, Shard(2, 5)),
        ("0/2", {"RANK": "0", "WORLD_SIZE": "1"}, Shard(0, 2)),
        (None, {"RANK": "3", "WORLD_SIZE": "4"}, Shard(3, 4)),
    ],
)
def test_where_it_comes_from(text: str | None, environment: dict[str, str], expected: Shard) -> None:
    assert parse_shard(text, environment) == expected


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shard: expected i/n"):
        parse_shard(text, {})


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="torchrun's 4 processes share the clips by themselves"):
        parse_shard("0/2", {"RANK": "0", "WORLD_SIZE": "4"})
