"""The folder of the ComfyUI nodes: what it needs installed, and that the package is built without it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.comfyui import PACK
from tests.helpers.upsampling import tiny_vluer


@pytest.mark.slow
def test_the_nodes_need_no_more_than_the_readme_installs(tmp_path: Path) -> None:
    """ComfyUI starts without importing the package; loading needs torch, diffusers and transformers, no trainer."""
    tiny_vluer().save_pretrained(tmp_path / "models/vluer/wan")
    program = f"""
import sys
from pathlib import Path
import pytest
for name in ("lightning", "peft", "omegaconf", "jsonargparse", "torchmetrics", "av", "decord", "wandb", "skimage",
             "scipy", "matplotlib", "pandas", "pyarrow", "rich", "cleanfid", "torchvision"):
    sys.modules[name] = None
sys.path.insert(0, {str(PACK.parent)!r})
from tests.helpers.comfyui import ComfyUI
patch = pytest.MonkeyPatch()
module = ComfyUI(Path({str(tmp_path)!r}), patch).install(patch)
assert not [name for name in sys.modules if name.startswith(("luve_lightning", "diffusers", "transformers"))]
loaded, = module.NODE_CLASS_MAPPINGS["LuVeLoadVLUer"]().load("wan", "float32")
import torch
latent = {{"samples": torch.ones(1, 16, 1, 4, 4)}}
out, = module.NODE_CLASS_MAPPINGS["LuVeUpsampleLatentBy"]().upsample(latent, loaded, 2.0)
print(tuple(out["samples"].shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 16, 1, 8, 8)", done.stderr


def test_the_package_is_built_without_them() -> None:
    settings = tomllib.loads((PACK.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert not any(fnmatch(PACK.name, pattern) for pattern in settings["setuptools"]["packages"]["find"]["include"])
