"""What Wan's folders say of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luve_lightning.cascade import LuVePipeline
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import load_backbone


def test_a_backbone_of_two_transformers_is_known_and_refused_before_it_is_loaded(
    repository: Path, tmp_path: Path
) -> None:
    mini = repository / "data/mini/wan"
    assert load_backbone(mini).serving() == {"transformer": SigmaBand()}
    index = json.loads((mini / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(mini / "scheduler", tmp_path / "scheduler")
    bands = {"transformer": SigmaBand(0.9, 1.0), "transformer_2": SigmaBand(0.0, 0.9)}
    assert load_backbone(tmp_path).serving() == bands
    with pytest.raises(ValueError, match="shared by transformer and transformer_2, expected one"):
        LuVePipeline.from_pretrained(tmp_path)
