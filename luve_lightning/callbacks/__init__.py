"""Lightning callbacks."""

from luve_lightning.callbacks.checkpoint_io import AtomicCheckpointIO, CheckpointError
from luve_lightning.callbacks.checkpoints import Checkpoints
from luve_lightning.callbacks.progress import TrainingProgress
from luve_lightning.callbacks.provenance import WandbRecord
from luve_lightning.callbacks.repeatable import CPUThreads, RandomState
from luve_lightning.callbacks.reports import ExpertLosses, UpsamplerComparison, ValidationReport
from luve_lightning.callbacks.sample_metrics import SampleMetrics
from luve_lightning.callbacks.sample_strips import DenoisingSpectra, SampleStrips
from luve_lightning.callbacks.step_times import StepParts
from luve_lightning.callbacks.stops import GracefulStop, NaNGuard, NonFiniteLoss, StopRequested
from luve_lightning.callbacks.weights import EMA, Export

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "CPUThreads",
    "CheckpointError",
    "Checkpoints",
    "DenoisingSpectra",
    "ExpertLosses",
    "Export",
    "GracefulStop",
    "NaNGuard",
    "NonFiniteLoss",
    "RandomState",
    "SampleMetrics",
    "SampleStrips",
    "StepParts",
    "StopRequested",
    "TrainingProgress",
    "UpsamplerComparison",
    "ValidationReport",
    "WandbRecord",
]
