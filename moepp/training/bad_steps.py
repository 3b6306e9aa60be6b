"""Steps whose gradient is not finite: LitMoE skips them, here they are counted, and too many end the run."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from moepp.training.checkpoint import last_checkpoint, write_checkpoint
from moepp.training.module import LitMoE
from moepp.training.monitor import say
from moepp.training.saving import within_step


class BadSteps(L.Callback):
    """Counts the skipped steps and logs their number; after `optim.max_bad_steps` in a row it ends the run.

    The counts stay on the device and are looked at when metrics are logged, so that no step waits for them. Since
    skipped steps leave the weights alone, the batch at hand is then as bad as the first of the row was: it is
    written with the weights to checkpoints/bad-step-<n>.ckpt, which reproduces what happened.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.total = self.in_a_row = torch.zeros(())
        self.batches: list[dict[str, Tensor]] = []  # of the step at hand

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitMoE, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.batches.append(batch)
        if within_step(trainer):
            return
        bad = pl_module.bad_step
        self.total = self.total.to(bad.device) + bad
        self.in_a_row = (self.in_a_row.to(bad.device) + 1) * bad
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due or trainer.global_step == trainer.estimated_stepping_batches:
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": float(self.total)}, step=trainer.global_step)
            if self.in_a_row >= pl_module.optim.max_bad_steps:
                self.give_up(trainer, pl_module)
        self.batches = []

    def give_up(self, trainer: L.Trainer, pl_module: LitMoE) -> None:
        step = trainer.global_step
        dump = self.run_dir / "checkpoints" / f"bad-step-{step:08d}.ckpt"
        content: dict[str, Any] = {"state_dict": pl_module.state_dict(), "batches": self.batches}
        pl_module.on_save_checkpoint(content)
        if trainer.is_global_zero:
            write_checkpoint(dump, content)
        line = (
            f"loss or gradient was not finite in {int(self.in_a_row)} steps in a row, up to step {step}: "
            f"{dump} has the batch and the weights, the last good checkpoint is "
            f"{last_checkpoint(self.run_dir) or 'none'}; a lower model.optim.lr or data without bad text may help"
        )
        say(trainer, line)
        raise SystemExit(f"moepp fit: {line}")
