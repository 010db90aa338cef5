"""Ending a prediction or a measurement when the process is asked to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L

from luve_lightning.callbacks.graceful_stop import StopRequested


class StopPredictionOnSigterm(L.Callback):
    """Raise StopRequested, a SystemExit, on SIGTERM while a Trainer predicts, tests or validates.

    `GracefulStop` is for training.

    Lightning's own handler only makes a note, which the predict loop never reads, so that `kill PID` would do
    nothing; a test that it ends has the exit status of one that is done. With several processes it also broadcasts
    inside the handler, which can hang.

    Python drops what a handler raises while an object is being finalised, and prints it with a traceback. So nothing is
    raised in a `__del__`; where no frame tells, as in a callback of a weak reference, the print is left out. Then the
    next batch ends the prediction.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._received = 0
        self._tells, self._goes_on = True, ""
        self._reported: Callable[[Any], Any] = sys.unraisablehook

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal over, after Lightning did."""
        if threading.current_thread() is threading.main_thread():
            self._received = 0
            self._tells = trainer.is_global_zero
            predicts = trainer.state.fn == "predict"
            self._goes_on = "; what is stored stays, the same command goes on" if predicts else ""
            self._before = signal.signal(signal.SIGTERM, self._stop)
            self._reported = sys.unraisablehook
            sys.unraisablehook = self._report

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal over, after Lightning did."""
        self.on_predict_start(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal over, after Lightning did."""
        if trainer.state.fn == "validate":
            self.on_predict_start(trainer, pl_module)

    def on_predict_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """End it if the signal came without an exception, or that was lost."""
        if self._received:
            raise self._stopped()

    def on_test_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """End it likewise."""
        self.on_predict_batch_start(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """End it likewise."""
        self.on_predict_batch_start(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give it back, after callbacks have used and written what was measured."""
        self._give_back()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give it back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            sys.unraisablehook = self._reported
            self._before = None

    def _report(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, StopRequested):
            self._reported(dropped)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if not _finalising(frame):
            raise self._stopped()

    def _stopped(self) -> StopRequested:
        name = signal.Signals(self._received).name
        return StopRequested(128 + self._received, f"{name}: stopped{self._goes_on}" if self._tells else "")


def _finalising(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
