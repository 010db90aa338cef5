"""The sigmas of diffusers' schedulers, computed anew."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from luve_lightning.functional.noise_bands import shift_sigma

SchedulerName = Literal["unipc", "euler"]


def sampling_sigmas(
    steps: int, shift: float, skip: int = 0, *, scheduler: SchedulerName = "unipc", train_timesteps: int = 1000
) -> Tensor:
    """The sigmas that a sampler visits, equal to those of diffusers' schedulers.

    - "unipc": `UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
      flow_shift=shift)`, the scheduler of Wan's pipelines: `steps` values evenly spaced from 1 towards 1/1000,
      excluding 1/1000, then shifted. Its first sigma is 1 - 1e-6, which keeps a logarithm finite.
    - "euler": `FlowMatchEulerDiscreteScheduler(shift=shift)`: evenly spaced from 1 to the *shifted* 1/1000,
      including both, then shifted, so its last step starts lower (0.024 against 0.097 at 50 steps, shift 5).

    `scheduler.timesteps` are 1000 * sigma; UniPC rounds them down to integers. With 50 steps, shift 5 and skip 10,
    either scheduler has 11 timesteps >= 875 and 29 below (LuVe's low- and high-frequency expert).

    Args:
        steps: number of steps in the whole schedule, >= 1.
        shift: greater than 0.
        skip: number of first steps to leave out (LuVe's S), 0 <= skip < steps.
        scheduler: "unipc" or "euler".
        train_timesteps: the scheduler's `num_train_timesteps`.

    Returns:
        float32, shape (steps - skip + 1,), decreasing; the last is 0.

    Raises:
        ValueError: for arguments outside these ranges.
    """
    if steps < 1 or not 0 <= skip < steps:
        raise ValueError(f"sampling needs steps >= 1 and 0 <= skip < steps, got steps={steps}, skip={skip}")
    if scheduler not in get_args(SchedulerName):
        raise ValueError(f"unknown scheduler {scheduler!r}, expected one of {', '.join(get_args(SchedulerName))}")
    shift_sigma(1.0, shift)  # refuses other shifts
    # numpy in float64, as in diffusers: equal to the last bit.
    if scheduler == "unipc":
        even = np.linspace(1, 1 / train_timesteps, steps + 1)[:-1]
    else:
        even = np.linspace(1, shift_sigma(1 / train_timesteps, shift), steps)
    sigmas = np.append(shift * even / (1 + (shift - 1) * even), 0.0)
    if scheduler == "unipc" and sigmas[0] > 1 - 1e-6:
        sigmas[0] -= 1e-6
    return torch.from_numpy(sigmas[skip:].astype(np.float32))
