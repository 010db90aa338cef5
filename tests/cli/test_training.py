"""What `luve fit` does with the Trainer's options before there is a Trainer."""

from __future__ import annotations

from jsonargparse import Namespace

from luve_lightning.cli.training import keep_whole_numbers


def test_whole_numbers_stay_whole() -> None:
    """As where jsonargparse tries float first: 1 batch, not all of them."""
    checked = Namespace(
        limit_val_batches=1.0, limit_train_batches=1.0, val_check_interval=0.5, precision="32", max_time=None
    )
    given = {"limit_val_batches": 1, "limit_train_batches": 1.0, "val_check_interval": 0.5, "precision": 32}
    keep_whole_numbers(checked, given)
    assert repr(checked.limit_val_batches) == "1"
    assert repr(checked.limit_train_batches) == "1.0"
    assert (checked.val_check_interval, checked.precision) == (0.5, "32")
