"""Symmetries of pictures as variants."""

from __future__ import annotations

import pytest
import torch

from luve_lightning.data.encode_clips import InTurn, Unchanged, variant_name
from luve_lightning.data.variants import Symmetry


def video() -> torch.Tensor:
    return torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_each_flag_is_the_plain_operation() -> None:
    x = video()
    assert torch.equal(Symmetry(mirror=True)(x), x.flip(-1))
    assert torch.equal(Symmetry(transpose=True)(x), x.transpose(-1, -2))
    assert torch.equal(Symmetry(reverse=True)(x), x.flip(2))
    assert torch.equal(Symmetry(negative=True)(x), -x)
    assert torch.equal(Symmetry(colors="gbr")(x), torch.stack([x[:, 1], x[:, 2], x[:, 0]], dim=1))


def test_they_combine_and_keep_every_value() -> None:
    x = video()
    y = Symmetry(mirror=True, transpose=True, reverse=True, negative=True, colors="bgr")(x)
    assert torch.equal(y.flatten().sort().values, (-x).flatten().sort().values)
    assert not torch.equal(y, x)


def test_label_tells_all_parameters_apart() -> None:
    made = [
        Symmetry(mirror=m, transpose=t, reverse=r, negative=n, colors=c)
        for m in (False, True)
        for t in (False, True)
        for r in (False, True)
        for n in (False, True)
        for c in ("rgb", "gbr")
    ]
    assert len({variant_name("v", s) for s in made}) == len(made)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="permutation of rgb"):
        Symmetry(colors="rrg")
    with pytest.raises(ValueError, match="square frames, got 8x6"):
        Symmetry(transpose=True)(torch.zeros(1, 3, 1, 8, 6))


def test_transforms_in_turn() -> None:
    x = torch.arange(3 * 2 * 4 * 4.0).reshape(1, 3, 2, 4, 4)
    first, second = Symmetry(mirror=True, colors="gbr"), Symmetry(transpose=True, colors="brg")
    both = InTurn([first, Unchanged(), second])
    assert torch.equal(both(x), second(first(x)))
    assert not torch.equal(both(x), first(second(x)))
    assert variant_name("both", both) == "both (mirror gbr, then transpose brg)"
    assert variant_name("none", InTurn([Unchanged()])) == "none"
    with pytest.raises(ValueError, match="transforms: expected at least one"):
        InTurn([])
