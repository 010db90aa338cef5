"""The Triton kernels in Triton's interpreter, which runs them on a CPU, against PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: Triton reads the variable when it is imported.
PROGRAM = """
import torch
from luve_lightning.functional import frames
from luve_lightning.functional.frames import kernels
from luve_lightning.models.backbones.wan_vae import frame_codec
from tests.helpers.noise import noise
from tests.models.backbones.test_wan_whole_clip import tiny_vae

vae = tiny_vae("two levels", base_dim=8).requires_grad_(False)
video, latents = noise(3, 9, 8, 12), noise(4, 3, 2, 3)


def results():
    codec = frame_codec(vae, torch.float32)
    z = latents.clone().requires_grad_()
    pixels = codec.decode_differentiable(z)
    [gradient] = torch.autograd.grad(pixels.square().sum(), z)
    return [codec.encode(video, 2), torch.cat(list(codec.decode(latents, 2)), dim=1), pixels.detach(), gradient]


wanted = results()
frames.uses_kernels = lambda x: True
for got, want in zip(results(), wanted, strict=True):
    assert want.std() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

q, k, v = noise(2, 70, 3 * kernels.ATTENTION_WIDTH).chunk(3, dim=-1)
want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(kernels.attend(q, k, v), want, rtol=1e-4, atol=1e-5)

for channels in (8, 16, 32, 96, 192, 384, 768):
    wide, parts, tiles = kernels.tile_of(channels)
    assert wide // 2 * parts * tiles >= channels
"""


@pytest.mark.slow
def test_kernels_equal_the_operations_that_define_them() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
