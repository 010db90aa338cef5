"""What a test draws depends on its name and `--seed` alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.helpers.seeds import seed_all, seeded_apart

Numbers = tuple[float, float, float]


def draw() -> Numbers:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - what a library draws from


@pytest.fixture(scope="module")
def shared() -> Numbers:
    return draw()


@pytest.fixture
def own() -> Numbers:
    return draw()


@pytest.mark.parametrize("number", [1, 2])
def test_each_test_has_its_own_numbers(number: int, own: Numbers, request: pytest.FixtureRequest) -> None:
    seen = [own, draw()]
    seed_all(f"{request.config.option.seed} {request.node.nodeid}")
    assert seen == [draw(), draw()]
    seed_all(f"{request.config.option.seed} {request.node.nodeid}".replace(f"[{number}]", "[3]"))
    assert all(a != b for a, b in zip(own, draw(), strict=True))


def test_what_tests_share_is_the_same_and_costs_them_no_numbers(request: pytest.FixtureRequest) -> None:
    seed_all("any")
    before = draw()
    got = request.getfixturevalue("shared")
    after = draw()
    seed_all("any")
    assert [before, after] == [draw(), draw()]
    with seeded_apart(f"{request.config.option.seed} tests/test_seeds.py shared"):
        assert got == draw()
