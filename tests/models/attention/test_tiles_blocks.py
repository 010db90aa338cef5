"""FlexAttention's own functions and our operator around them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luve_lightning.models.attention import tiles
from luve_lightning.models.attention.tiles import block_attention, block_attention_backward, tables_of


def drawn(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values of three blocks of 128 slots, and tables in which block 1 is filled in part."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 384, 3, 16, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    attends = np.array([[True, True, False], [False, True, True], [True, False, True]])
    return inputs, [torch.from_numpy(table) for table in tables_of(attends, np.array([128, 70, 128]))]


def test_tables_list_full_and_other_blocks_both_ways() -> None:
    filled, *tables = drawn()[1]
    assert filled.tolist() == [128, 70, 128]
    listed = [
        [row[:count] for row, count in zip(rows[0, 0].tolist(), counts[0, 0].tolist(), strict=True)]
        for counts, rows in zip(tables[::2], tables[1::2], strict=True)
    ]
    # Kernels of torch 2.11 read all tables by the width of one.
    assert len({rows.shape for rows in tables[1::2]}) == 1
    assert listed == [
        [[1], [1], []],  # blocks of queries: blocks of keys filled in part
        [[0], [2], [0, 2]],  # blocks of queries: full blocks of keys
        [[], [0, 1], []],  # blocks of keys filled in part: blocks of queries
        [[0, 2], [], [1, 2]],  # full blocks of keys: blocks of queries
    ]


def test_the_operator_keeps_the_rules_of_operators() -> None:
    inputs, tables = drawn(torch.float64)
    torch.library.opcheck(block_attention, (*inputs, tables))
    torch.autograd.gradcheck(
        lambda *x: block_attention(*x, tables)[0], [x[:1, :1, :, :2].detach().requires_grad_() for x in inputs],
        fast_mode=True,
    )  # fmt: skip


def test_what_a_gpu_compiles_can_be_traced_and_agrees() -> None:
    inputs, tables = drawn()
    query, key, value = (x.detach() for x in inputs)
    # Where every block attends to every block: without its kernel, FlexAttention looks at the mask alone.
    tables = [torch.from_numpy(t) for t in tables_of(np.ones((3, 3), dtype=bool), np.array([128, 70, 128]))]
    output, logsumexp = block_attention(query, key, value, tables)
    got = tiles._compiled(tiles._forward, "aot_eager")(query, key, value, tables)
    torch.testing.assert_close(got, (output, logsumexp))
    given = (query, key, value, output, logsumexp, torch.randn_like(output), tables)
    got = tiles._compiled(tiles._backward, "aot_eager")(*given)
    torch.testing.assert_close(got, block_attention_backward(*given))
    assert [x.stride() for x in got] == [x.stride() for x in (query, key, value)]
