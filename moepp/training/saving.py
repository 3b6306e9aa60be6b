"""When a run's state is written down, and which checkpoints are kept."""

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.fit_loop import _FitLoop

from moepp.model.config import require
from moepp.system.files import fsync_folder, put_in_place, remove
from moepp.training.checkpoint import (
    step_checkpoints,
    step_of,
    step_path,
)
from moepp.training.csv_log import CSVLog
from moepp.training.devices import Agreement
from moepp.training.metrics import LOSS, VAL
from moepp.training.run_folder import say


class Checkpoints(Checkpoint):
    """Writes checkpoints/step-<n>.ckpt at every validation and at the end, and keeps the last ones and the best.

    best.ckpt, the one with the lowest validation loss, is a second name (hard links) of its step's file or folder.

    Ctrl-C and SIGTERM (a cluster's pre-emption) end a run with one, too, after the optimizer step at hand, as
    gradients that are half accumulated are in no checkpoint; of several devices all do, a step after any was told.
    The exit code is then 130 (Ctrl-C) or 143 (SIGTERM). A second signal is obeyed at once.

    Args:
        keep: how many of the last ones stay. With two or more, a damaged one has one before it.
        every_n_steps: write one that often as well, for runs that validate seldom.
    """

    def __init__(self, keep: int = 2, every_n_steps: int | None = None) -> None:
        for name, number in (("keep", keep), ("every_n_steps", every_n_steps)):
            require(number is None or number >= 1, f"checkpoints.{name}", number, "must be at least 1")
        self.keep, self.every_n_steps = keep, every_n_steps
        self.best_loss, self.best_step = float("inf"), -1
        self.validation_due = False  # written after a step, before the validation that belongs to it
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}  # handlers
        self.agreement: Agreement  # from the start of training

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best_loss", "best_step", "validation_due")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # when it is through, Lightning brings back those from before the run
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        self.agreement = Agreement()
        # Lightning's own question after SIGTERM, whose answer is always no here, costs a collective in every batch
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.is_global_zero:
            for unfinished in Path(trainer.default_root_dir).glob("checkpoints/*.tmp"):  # a kill came in between
                remove(unfinished)
            for path in step_checkpoints(Path(trainer.default_root_dir)):
                if step_of(path) > trainer.global_step and not trainer.fit_loop.done:
                    remove(path)  # damaged: this run goes on from the one before
            self.name_best(trainer)  # a kill may have come in between
        if self.validation_due:
            validate(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if within_step(trainer):
            return
        if self.agreement.any(self.received is not None):
            self.leave(trainer, validation_is_due(trainer))
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, validation_is_due(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":  # after the training, whose checkpoint is written: leave at once
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, exit_by)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "validate" and isinstance(exception, SystemExit):
            say(
                trainer,
                "stopped amid the last validation: the training is whole, and --ckpt_path=last validates it",
            )

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        amid_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if amid_training and self.agreement.any(self.received is not None):
            self.leave(trainer, validation_due=True)  # begun anew by the run that goes on from here

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics[VAL + LOSS])
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
        self.save(trainer)

    def save(self, trainer: L.Trainer, validation_due: bool = False) -> Path:
        """Write the state after the step at hand; remove what is no longer kept."""
        self.validation_due = validation_due
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.sync()
        run_dir = Path(trainer.default_root_dir)
        path = step_path(run_dir, trainer.global_step)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self.name_best(trainer)
            for old in step_checkpoints(run_dir)[self.keep :]:
                remove(old)
            fsync_folder(path.parent)
        return path

    def name_best(self, trainer: L.Trainer) -> None:
        """Make best.ckpt a name of this step's file, if it is the best so far."""
        path = step_path(Path(trainer.default_root_dir), trainer.global_step)
        if trainer.global_step == self.best_step and path.exists():
            beside = path.with_name("best.ckpt.tmp")
            remove(beside)
            if path.is_dir():
                shutil.copytree(path, beside, copy_function=link)
            else:
                link(path, beside)
            put_in_place(path.with_name("best.ckpt"), beside)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def on_train_end(self, *_: Any) -> None:
        self.agreement.answer()

    def leave(self, trainer: L.Trainer, validation_due: bool) -> NoReturn:
        path = self.save(trainer, validation_due)
        told = self.received or signal.SIGTERM
        stopped = f"stopped by {told.name} after step {trainer.global_step}"
        say(trainer, f"{stopped}: {path} is written, --ckpt_path=last goes on with it")
        raise SystemExit(128 + told)


def exit_by(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def link(path: str | Path, name: str | Path) -> None:
    """A second name for a file; a copy, on a file system without hard links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


# What Lightning's loops know and do not tell


class FitLoop(_FitLoop):
    """A run that was cut after its last step has an end before it: a validation that is due, a budget to be set.
    Lightning's own would find no step left, and leave."""

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 or (super().skip and self.trainer.global_step == 0)


def within_step(trainer: L.Trainer) -> bool:
    """More batches are to be accumulated before the optimizer steps."""
    return trainer.fit_loop._should_accumulate()


def validation_is_due(trainer: L.Trainer) -> bool:
    """Once this step's callbacks are through."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate(trainer: L.Trainer) -> None:
    """What the training loop does where a validation is due."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False  # from its first batch
    trainer.validating = True
    val_loop.run()
    trainer.training = True
