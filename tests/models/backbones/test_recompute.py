"""What is recomputed changes time and memory, not numbers; and self-attention is not run again."""

from __future__ import annotations

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.backbones.recompute import _HostCopy
from luve_lightning.models.experts import ExpertConfig, add_expert, expert_parameters
from tests.helpers.attention_calls import AttentionCalls
from tests.helpers.tiny_wan import HFE, LFE, inputs, output, randomise, tiny_transformer

BLOCKS, TOKENS, WORDS = 2, 60, 3


def prepared(expert: bool, dtype: torch.dtype) -> tuple[WanTransformer3DModel, list[Tensor]]:
    """A transformer, and what of it is trained: everything, or an expert on a frozen base."""
    transformer = tiny_transformer().to(dtype)
    if not expert:
        return transformer, list(transformer.parameters())
    add_expert(transformer, "lfe", LFE, torch.float32)
    randomise(transformer, "lfe")
    return transformer, list(expert_parameters(transformer, "lfe"))


def step(
    recompute: Any, expert: bool, dtype: torch.dtype, keep_attention: int | None = None, **options: Any
) -> tuple[list[Tensor], list[int], list[int]]:
    """Loss and gradients of one step; the attentions of its forward and of its backward pass."""
    transformer, trained = prepared(expert, dtype)
    denoiser_of(transformer).set_recompute(recompute, keep_attention, **options)
    with AttentionCalls() as forward:
        loss = output(transformer, inputs(dtype=dtype)).float().square().mean()
    with AttentionCalls() as backward:
        loss.backward()
    assert all(p.grad is not None for p in trained)
    gradients = [p.grad for p in trained if p.grad is not None]
    return [loss.detach(), *gradients], forward.keys, backward.keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expert", [False, True], ids=["all weights", "expert"])
def test_numbers_stay_and_self_attention_is_kept(expert: bool, dtype: torch.dtype) -> None:
    want, forward, again = step("nothing", expert, dtype)
    assert (forward, again) == ([TOKENS, WORDS] * BLOCKS, [])
    repeated = {"blocks": [TOKENS, WORDS] * BLOCKS, "all_but_attention": [WORDS] * BLOCKS}
    for recompute, expected in repeated.items():
        got, forward, again = step(recompute, expert, dtype)
        assert forward == [TOKENS, WORDS] * BLOCKS
        assert again == expected, recompute
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), recompute


@pytest.mark.parametrize("expert", [False, True], ids=["all weights", "expert"])
def test_attention_is_kept_in_as_many_blocks_as_asked(expert: bool) -> None:
    want, _, _ = step("nothing", expert, torch.float32)
    # The backward pass runs from the last block to the first, which keeps its attention.
    for kept, again in ((0, [TOKENS, WORDS] * 2), (1, [TOKENS, WORDS, WORDS]), (2, [WORDS, WORDS])):
        got, _, repeated = step("all_but_attention", expert, torch.float32, kept)
        assert repeated == again
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for recompute, kept in (("all_but_attention", 3), ("all_but_attention", -1), ("blocks", 1)):
        with pytest.raises(ValueError, match="keep_attention: expected 0 to 2 blocks, and recompute: all_but"):
            step(recompute, expert, torch.float32, kept)


@pytest.mark.parametrize("recompute", ["blocks", "all_but_attention"])
@pytest.mark.parametrize("expert", [False, True], ids=["all weights", "expert"])
def test_inputs_on_the_host_give_the_same_numbers(recompute: str, expert: bool) -> None:
    want = step(recompute, expert, torch.float32)
    got = step(recompute, expert, torch.float32, offload=True)
    assert got[1:] == want[1:]
    assert all(torch.equal(g, w) for g, w in zip(got[0], want[0], strict=True))


@pytest.mark.parametrize("recompute", ["nothing", "blocks", "all_but_attention"])
@pytest.mark.parametrize("config", [None, LFE, HFE], ids=["all weights", "lfe", "hfe"])
def test_a_feed_forward_in_chunks_gives_the_same_numbers(recompute: Any, config: ExpertConfig | None) -> None:
    def gradients(chunks: int) -> tuple[list[Tensor], list[Any]]:
        transformer = tiny_transformer()
        if config is not None:
            add_expert(transformer, "expert", config)
            randomise(transformer, "expert")
        denoiser = denoiser_of(transformer)
        denoiser.set_recompute(recompute, chunks=chunks)
        lengths: list[int] = []
        last = next(m for n, m in transformer.named_modules() if n.endswith("net.2"))
        last.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
        copied = deepcopy(transformer)
        assert copied.state_dict().keys() == tiny_keys(config)
        output(copied, inputs()).square().mean().backward()
        with torch.no_grad():
            output(copied, inputs())
        return [p.grad for p in copied.parameters() if p.grad is not None], lengths

    (want, whole), (got, parts) = gradients(1), gradients(7)
    assert set(whole) == {TOKENS}
    assert set(parts) == {9, 6, TOKENS}  # 7 parts of 9 but the last; whole where nothing is trained
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def tiny_keys(config: ExpertConfig | None) -> Any:
    transformer = tiny_transformer()
    if config is not None:
        add_expert(transformer, "expert", config)
    return transformer.state_dict().keys()


def test_inputs_lie_on_the_host_until_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes back one block before its turn; nothing stays of a pass whose graph is gone; a copy keeps its own."""
    events: list[str] = []
    fetch, tensor = _HostCopy.fetch, _HostCopy.tensor
    alive: weakref.WeakSet[_HostCopy] = weakref.WeakSet()

    def fetched(self: _HostCopy) -> None:
        events.append("in time" if self.back is None else "already there")
        alive.add(self)
        fetch(self)

    def used(self: _HostCopy) -> Tensor:
        events.append("used")
        return tensor(self)

    monkeypatch.setattr(_HostCopy, "fetch", fetched)
    monkeypatch.setattr(_HostCopy, "tensor", used)
    monkeypatch.setattr("luve_lightning.models.backbones.recompute._PART", 100)  # many parts, the last one smaller
    transformer = tiny_transformer(num_layers=3)
    denoiser_of(transformer).set_recompute("blocks", offload=True)
    copied = deepcopy(transformer)
    assert copied.blocks[0].input_host is copied.blocks[2].input_host is not transformer.blocks[0].input_host
    first, second = (output(model, inputs()).square().mean() for model in (transformer, copied))
    assert events == []
    second.backward()
    first.backward()
    one = ["used", "already there", "in time", "used", "already there", "in time", "used", "already there"]
    assert events == one + one
    for left, right in zip(transformer.parameters(), copied.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)  # type: ignore[arg-type]
    del first, second
    assert not alive
    with pytest.raises(ValueError, match="offload: the blocks' inputs are kept alone only with recompute: blocks or"):
        denoiser_of(transformer).set_recompute("nothing", offload=True)


def test_inputs_on_the_host_leave_the_device() -> None:
    """All but the last block's, which the backward pass needs at once."""

    def left(offload: bool) -> list[bool]:
        transformer = tiny_transformer(num_layers=4)
        denoiser_of(transformer).set_recompute("blocks", offload=offload)
        storages: list[StorageWeakRef] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: storages.append(StorageWeakRef(args[0].untyped_storage())))
            for block in transformer.blocks
        ]
        loss = output(transformer, inputs()).square().mean()
        for handle in handles:
            handle.remove()
        gone = [storage.expired() for storage in storages]
        loss.backward()
        return gone

    assert left(offload=True) == [True, True, True, False]
    assert left(offload=False) == [False] * 4


def test_the_choice_can_be_taken_back_and_has_three_words() -> None:
    transformer, _ = prepared(True, torch.float32)
    denoiser_of(transformer).set_recompute("all_but_attention")
    denoiser_of(transformer).set_recompute("nothing")
    loss = output(transformer, inputs()).square().mean()
    with AttentionCalls() as backward:
        loss.backward()
    assert backward.keys == []
    with pytest.raises(ValueError, match=r"recompute: expected 'nothing', 'blocks' or .*, got 'all'"):
        denoiser_of(transformer).set_recompute("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunks: expected at least 1, got 0"):
        denoiser_of(transformer).set_recompute("nothing", chunks=0)
