"""Dry runs on the meta device beside the same code on real tensors, PyTorch's own counters and memory that was used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from luve_lightning.analysis.dry_run import BLOCK, _attention_by_scores, dry_run, dry_training, weight_bytes
from luve_lightning.analysis.training_plan import TrainingFunctions, run_backward
from luve_lightning.functional.frames import Norm
from luve_lightning.machine import measure_peak_mib
from luve_lightning.models.backbones import LatentSpace, latent_space_of
from luve_lightning.models.backbones.wan import WanText
from luve_lightning.models.backbones.wan_tiles import decode_tiled
from luve_lightning.models.vluer import VLUer

Case = Callable[[torch.device], Callable[[], Any]]


def transformer(device: torch.device) -> Callable[[], Any]:
    with device:
        net = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=16, ffn_dim=200, num_layers=2
        ).eval()
    arguments = {
        "hidden_states": torch.randn(2, 16, 3, 12, 20, device=device),
        "timestep": torch.ones(2, device=device),
        "encoder_hidden_states": torch.randn(2, 8, 16, device=device),
    }
    return lambda: net(**arguments)


def vae(device: torch.device) -> LatentSpace:
    with device:
        return latent_space_of(AutoencoderKLWan(base_dim=4, num_res_blocks=1))


def decoder(device: torch.device) -> Callable[[], Any]:
    codec, latents = vae(device), torch.randn(1, 16, 3, 4, 6, device=device)
    codec.vae.to(memory_format=torch.contiguous_format)
    return lambda: codec.vae.decode(latents).sample


def tiled_decoder(device: torch.device) -> Callable[[], Any]:
    codec, latents = vae(device), torch.randn(1, 16, 2, 4, 6, device=device)
    return lambda: decode_tiled(codec.vae, latents, (4, 3))


def vluer(device: torch.device) -> Callable[[], Any]:
    with device:
        net = VLUer(channels=16, pairs=2, hidden=32, query_channels=8, query_chunk=500)
    latents = torch.randn(1, 16, 3, 6, 8, device=device)
    return lambda: net(latents, (5, 13, 17))


def text_encoder(device: torch.device) -> Callable[[], Any]:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    with device:
        net = UMT5EncoderModel(UMT5Config(**sizes)).eval()
    ids = torch.zeros(1, 24, dtype=torch.long, device=device)
    return lambda: net(ids).last_hidden_state


def masked_text_encoder(device: torch.device) -> Callable[[], Any]:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    with device:
        net = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
        ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.ones(3, 24, dtype=torch.long).tril(8)
    return lambda: WanText.states(net, ids, mask)


CASES = {
    "transformer": transformer,
    "decoder": decoder,
    "tiled decoder": tiled_decoder,
    "vluer": vluer,
    "text encoder": text_encoder,
    "masked text encoder": masked_text_encoder,
}
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_pytorch_counts_of_the_real_computation(name: str) -> None:
    planned, real = CASES[name](META), CASES[name](CPU)
    with dry_run() as run:
        planned()
    # PyTorch counts nothing for its attention kernel on CPUs, but the products of the plain form.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        real()
    assert run.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", CASES)
def test_tensors_live_on_the_meta_device_as_real_ones_do(name: str) -> None:
    """The same count over real tensors, whose attention is PyTorch's kernel for CPUs."""
    planned, real = CASES[name](META), CASES[name](CPU)
    with dry_run(converts=False) as run:
        planned()
    with dry_run(fused=False, converts=False) as reference:
        real()
    assert run.peak == pytest.approx(reference.peak, rel=0.01)


def test_the_peak_is_counted_by_hand() -> None:
    x = torch.empty(1000, device="meta")  # 4000 bytes, there before: not counted

    def run_twice() -> Tensor:
        a = x + 1  # 4096 after rounding
        b = a.repeat(4)  # 16000, 16384 after rounding
        del a
        c = b.view(2, -1)[:, :500].contiguous()  # 4000: b, c; the view costs nothing
        return c.mul_(2)

    with dry_run() as run:
        kept = run_twice()
        assert run.peak == 4096 + 16384
        again = kept.repeat(10, 1)  # 40000: b is gone
    assert run.peak == 4096 + 40448
    assert again.shape == (20, 500)
    assert sum(run.terms.values()) == run.peak


def test_places_name_the_modules_and_leave_no_hook() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.GELU()), nn.Linear(64, 8)).to("meta")
    x = torch.empty(256, 8, device="meta")
    with dry_run() as run:
        net(x)
    # The activation's input and output; the module's caller holds none.
    assert run.terms == {"Sequential": 2 * 256 * 64 * 4}
    from torch.nn.modules import module

    assert not module._global_forward_pre_hooks
    assert not module._global_forward_hooks


def test_hooks_go_when_the_computation_fails() -> None:
    from torch.nn.modules import module

    with pytest.raises(RuntimeError), dry_run():
        nn.Linear(8, 8).to("meta")(torch.empty(2, 9, device="meta"))
    assert not module._global_forward_pre_hooks


def test_attention_needs_no_matrix_of_scores() -> None:
    q = torch.empty(1, 5000, 2, 64, device="meta").permute(0, 2, 1, 3)
    with dry_run() as run:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        out.permute(0, 2, 1, 3).flatten(2)  # of the query's layout: a view
    assert run.peak == 5000 * 2 * 64 * 4 + 5000 * 2 * 4
    assert run.flops == 2 * 2 * 2 * 5000 * 5000 * 64
    assert {operation.kind for operation in run.operations} == {"attention"}


def test_attention_reads_its_mask() -> None:
    q, mask = torch.empty(2, 3, 40, 8, device="meta"), torch.empty(2, 3, 40, 50, device="meta")
    k = torch.empty(2, 3, 50, 8, device="meta")
    with dry_run() as run:
        nn.functional.scaled_dot_product_attention(q, k, k, mask)
    ((operation, count),) = run.operations.items()
    assert (operation.kind, count) == ("attention", 1)
    assert operation.bytes == 4 * (2 * 2 * 3 * 40 * 8 + 2 * 2 * 3 * 50 * 8 + 2 * 3 * 40 * 50)


def test_a_mask_that_no_fused_kernel_takes_makes_all_scores() -> None:
    """Against PyTorch's own fallback on the CPU: products, memory and result."""

    def masked(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 4, 64, 16, device=device) for _ in range(3))
        return [q, k, v, torch.randn(2, 64, 64, 4, device=device).permute(0, 3, 1, 2)]  # heads innermost

    def fallback() -> Tensor:
        return torch._scaled_dot_product_attention_math(*masked(CPU), scale=1.0)[0]

    with dry_run() as run:
        nn.functional.scaled_dot_product_attention(*masked(META))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        want = fallback()
    assert run.flops == counter.get_total_flops() == 2 * 2 * 2 * 4 * 64 * 64 * 16
    assert not any("attention" in operation.kind for operation in run.operations)
    torch.testing.assert_close(_attention_by_scores(*masked(CPU)), want)
    queries, scores = 4 * 2 * 4 * 64 * 16, 4 * 2 * 4 * 64 * 64
    # Three tensors given and one scaled, the mask, scores, weights, and which scores are minus infinity.
    assert run.peak == pytest.approx(4 * queries + 3 * scores + scores // 4, rel=0.01)


def test_a_norm_of_frames_is_counted_as_its_kernel() -> None:
    norm = Norm(torch.empty(8, device="meta"), True, torch.bfloat16)
    x, out, gradient, add = (torch.empty(4, 9, 9, 8, device="meta", dtype=torch.bfloat16) for _ in range(4))
    # What it reads and writes, and what it allocates.
    for call, moved, made in (
        (lambda: norm(x, out), 2, 0),
        (lambda: norm.gradient(x, gradient), 3, 1),
        (lambda: norm.gradient(x, gradient, add), 4, 1),
    ):
        with dry_run() as run:
            kept = call()
        assert sum(done.bytes * count for done, count in run.operations.items()) == moved * x.nbytes
        assert run.peak == made * -(-x.nbytes // BLOCK) * BLOCK
        del kept


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_a_convolutions_input_alone_is_a_convolution(frozen: bool) -> None:
    layer = nn.Conv3d(4, 4, 3, padding=1, device="meta").to(memory_format=torch.channels_last_3d)
    layer.requires_grad_(not frozen)
    x = torch.empty(1, 4, 3, 5, 5, device="meta").contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with dry_training(TrainingFunctions(None)) as run:
        run_backward(layer(x).square().sum())
    found: Counter[str] = Counter()
    for operation, count in run.operations.items():
        found[operation.kind] += operation.flops * count
    del found["rest"]
    once = 2 * 27 * 4 * x.numel()
    assert found == ({"convolution": 2 * once} if frozen else {"convolution": once, "convolution backward": 2 * once})


def test_repeated_work_is_counted_as_often() -> None:
    x = torch.empty(10, 20, device="meta")
    with dry_run() as run, run.times(3):
        x @ x.T
    assert run.flops == 3 * 2 * 10 * 10 * 20


def test_tied_weights_count_once() -> None:
    net = nn.ModuleList([nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)])
    assert weight_bytes(net) == 2 * -(-40000 // BLOCK) * BLOCK
    net[1].weight = net[0].weight
    assert weight_bytes(net) == -(-40000 // BLOCK) * BLOCK


@pytest.mark.slow
def test_a_forward_uses_the_memory_that_was_planned() -> None:
    """The process's memory, of a model of which two tensors of 192 MiB are most: small ones linger in its heap."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "ffn_dim": 16384, "num_layers": 1}

    def forward(device: torch.device) -> Callable[[], Any]:
        with device:
            net = WanTransformer3DModel(**sizes).eval()
        x, text = torch.randn(1, 16, 2, 64, 96, device=device), torch.randn(1, 8, 16, device=device)
        return lambda: net(x, torch.ones(1, device=device), text, return_dict=False)[0]

    planned, real = forward(META), forward(CPU)
    with dry_run() as run:
        planned()
    with torch.no_grad():
        real()
        used = measure_peak_mib(real, CPU)
    assert run.peak / 2**20 == pytest.approx(used, rel=0.15)


def test_compiled_modules_read_and_write_what_lies_outside_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            normed = ((x - 1) * 2).exp()  # one kernel: reads x, writes `normed`
            y = self.inner(normed)
            return (x + y).sigmoid() * normed  # one kernel: reads x, y, `normed`, writes the result

    net = nn.Sequential(Block(), nn.ReLU()).to("meta")
    x = torch.empty(100, 64, device="meta")
    with dry_run() as eager:
        net(x)
    with dry_run(compiled=[net[0]]) as run:
        net(x)
    assert run.flops == eager.flops
    # `normed` and `y`, in whose place the result is written; each operation has a result of its own otherwise.
    assert (run.peak, eager.peak) == (2 * x.nbytes, 4 * x.nbytes)
    traffic = {
        name: sum(done.bytes * count for done, count in counts.operations.items() if done.kind == "rest") // x.nbytes
        for name, counts in (("eager", eager), ("compiled", run))
    }
    # Outside the block the ReLU reads and writes as ever.
    assert traffic == {"eager": 2 + 2 + 2 + 3 + 2 + 3 + 2, "compiled": 2 + 4 + 2}


def test_what_runs_on_the_cpu_takes_nothing_of_a_gpu() -> None:
    with dry_run() as run:
        table = torch.arange(1000) * 2
        table.to("meta")
    assert run.peak == 8192
    assert sum(run.operations.values()) == 1  # the copy
