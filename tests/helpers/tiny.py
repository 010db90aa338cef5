"""The smallest LightningModule and LightningDataModule that the command line can run."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyModule(LightningModule):
    """One linear layer pulled towards zero.

    Args:
        lr: Step size, > 0.
        width: Number of inputs.
        losses: Losses by name; null switches one off.
        backbone: A folder that must exist, or None.
        fail_at: Raise a KeyError, as a bug would, at this step.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        width: int = 4,
        losses: dict[str, nn.Module | None] | None = None,
        backbone: Path | None = None,
        fail_at: int | None = None,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        if backbone is not None and not backbone.is_dir():
            raise FileNotFoundError(f"backbone folder not found: {backbone}")
        self.save_hyperparameters()
        self.lr = lr
        self.fail_at = fail_at
        self.losses = nn.ModuleDict({name: loss for name, loss in (losses or {}).items() if loss is not None})
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise KeyError("a bug")
        output = self.layer(batch[0])
        terms = [loss(output, torch.zeros_like(output)) for loss in self.losses.values()]
        total = sum(terms) if terms else output.square().mean()
        self.log("loss", total)
        return total

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch[0]).square().mean())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class TinyData(LightningDataModule):
    """Eight rows of noise.

    Args:
        batch_size: Rows a batch, at most 8.
        share: Checked in setup, not before.
    """

    def __init__(self, batch_size: int = 2, share: float = 0.5) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.share = share

    def setup(self, stage: str) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        self.rows = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

    def manifest_hash(self) -> str:
        return "0" * 64

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.rows, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
