"""Ctrl-C and SIGTERM (a cluster's pre-emption) end a run with a checkpoint that it can be continued from."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L

from moepp.training.callbacks import say


class StopOnSignal(L.Callback):
    """Finishes the optimizer step at hand, writes `checkpoint`, and leaves with 130 (Ctrl-C) or 143 (SIGTERM).

    A step, because gradients that are half accumulated are in no checkpoint. A second signal is obeyed at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self.validated = False  # since the last step
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.validated = False
        loop = trainer.fit_loop
        if self.received is None or loop._should_accumulate():
            return
        if loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return  # a resume would not make up for this validation
        trainer.save_checkpoint(self.checkpoint)
        self.leave(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated = True

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.received is not None and self.validated:
            self.leave(trainer)  # ModelCheckpoint has just written the checkpoint

    def leave(self, trainer: L.Trainer) -> NoReturn:
        assert self.received is not None
        say(
            trainer,
            f"stopped by {self.received.name} after step {trainer.global_step}: {self.checkpoint} is written",
        )
        raise SystemExit(128 + self.received)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.restore()
