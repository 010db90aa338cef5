"""pyiqa's quality networks (an optional extra), built from local weight files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from luve_lightning.metrics.base import Unavailable
from luve_lightning.metrics.pretrained import WeightFile, weights_folder

_URL = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"
_CACHES = ("${TORCH_HOME}/hub/pyiqa", "~/.cache/torch/hub/pyiqa")

MUSIQ_SPAQ = WeightFile(
    name="MUSIQ trained on SPAQ",
    file_name="musiq_spaq_ckpt-358bb6af.pth",
    size_bytes=108_600_000,
    url=_URL,
    purpose="imaging quality",
    caches=(*_CACHES, "~/.cache/vbench/pyiqa_model"),
)
MUSIQ_KONIQ = WeightFile(
    name="MUSIQ trained on KonIQ-10k",
    file_name="musiq_koniq_ckpt-e95806b9.pth",
    size_bytes=108_600_000,
    url=_URL,
    purpose="MUSIQ",
    caches=_CACHES,
)
MANIQA_KONIQ = WeightFile(
    name="MANIQA trained on KonIQ-10k",
    file_name="ckpt_koniq10k.pt",
    size_bytes=543_000_000,
    url=_URL,
    purpose="MANIQA",
    caches=_CACHES,
)
NIQE_PARAMETERS = WeightFile(
    name="the statistics of NIQE's pristine images",
    file_name="niqe_modelparameters.mat",
    size_bytes=8_150,
    url=_URL,
    purpose="NIQE",
    caches=_CACHES,
)


def load_pyiqa(measure: str, file: WeightFile, given: str | Path | None, purpose: str) -> nn.Module:
    """A pyiqa network: N x 3 x h x w in [0, 1] to N x 1 scores.

    Args:
        measure: pyiqa's name for it.
        file: its weights.
        given: where the weights are, or None to look in the usual places.
        purpose: name of the metric, for the message.

    Raises:
        Unavailable: pyiqa or the file is missing, or they do not fit each other.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise Unavailable(
            f"{purpose} needs pyiqa (pip install 'luve-lightning[iqa]': {error}) and {file.file_name} "
            f"({file.readable_size}, {file.url}) in {weights_folder()}"
        ) from error
    path = str(file.find(given))
    try:
        if measure.startswith("niqe"):
            network: nn.Module = pyiqa.create_metric(measure, device="cpu", pretrained_model_path=path)
            return network
        with _no_download():
            network = pyiqa.create_metric(measure, device="cpu", pretrained=False)
        network.load_weights(path, weight_keys=None)  # type: ignore[operator]
    except Exception as error:  # a broken file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"{purpose}: pyiqa cannot load {path} as {file.name} ({_URL}): {reason}") from error
    return network


@contextmanager
def _no_download() -> Iterator[None]:
    """Keeps MANIQA from fetching the ViT that its own weight file replaces (346 MB)."""
    from pyiqa.archs.maniqa_arch import timm

    create = timm.create_model

    def without_weights(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(*args, pretrained=False, **kwargs)

    timm.create_model = without_weights
    try:
        yield
    finally:
        timm.create_model = create
