"""Dense attention as a named attention."""

from __future__ import annotations

import torch

from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.attention.dense import Dense


def test_it_is_softmax_attention() -> None:
    query, key, value = torch.randn(3, 3, 30, 2, 5, dtype=torch.float64)
    scores = torch.einsum("bnhc,bmhc->bhnm", query, key) / 5**0.5
    want = torch.einsum("bhnm,bmhc->bnhc", scores.softmax(-1), value)
    torch.testing.assert_close(Dense()(query, key, value, Where((2, 3, 5), 0)), want)
    assert Dense().pairs((2, 3, 5), 0, 1.0) == 900
    assert Attention.from_record(Dense().record()) == Dense()
