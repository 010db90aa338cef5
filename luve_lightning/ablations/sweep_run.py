"""A call of `luve ablate` as a run of a Weights & Biases sweep, when a sweep's agent started it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from luve_lightning.ablations.results import Values

# The stages are processes of their own: with these they would log into the sweep's run, over each other.
_OF_THE_RUN = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_SERVICE")


@contextmanager
def sweep_run(
    table: str, rows: Sequence[str], seeds: Sequence[int], prefix: str
) -> Iterator[Callable[[Values], None]]:
    """The sweep's run for the duration of the context; it fails when the context does. Nothing without a sweep.

    Args:
        table: name of the table, the run's group.
        rows: rows of this call; they and the seeds are the run's configuration and tags.
        seeds: seeds of this call.
        prefix: prefix of a metric's name, where dashboards look for results.

    Yields:
        Logs results, by row, seed and metric, under the prefix: means over this call's rows and seeds (an agent
        gives one each).
    """
    if "WANDB_SWEEP_ID" not in os.environ:
        yield lambda values: None
        return
    import wandb

    row, seed = (",".join(map(str, some)) for some in (rows, seeds))
    run = wandb.init(
        job_type="ablation",
        group=table,
        name=f"{table} {row} seed {seed}",
        tags=["ablation", table, f"seed {seed}"],
        config={"table": table, "row": row, "seed": seed},
        allow_val_change=True,
    )
    kept = {name: os.environ.pop(name) for name in _OF_THE_RUN if name in os.environ}

    def log(values: Values) -> None:
        found: dict[str, list[float]] = {}
        for metrics in (values.get(name, {}).get(number, {}) for name in rows for number in seeds):
            for metric, value in metrics.items():
                found.setdefault(f"{prefix}{metric}", []).append(value)
        run.log({metric: sum(some) / len(some) for metric, some in found.items()})

    failed = True
    try:
        yield log
        failed = False
    finally:
        os.environ.update(kept)
        run.finish(exit_code=int(failed))
