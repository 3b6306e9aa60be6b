"""Steps whose gradient is not finite: LitMoE skips them, here they are counted, and too many end the run."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from moepp.training.checkpoint import last_checkpoint
from moepp.training.module import LitMoE
from moepp.training.run_folder import say
from moepp.training.saving import within_step


class BadSteps(L.Callback):
    """Counts the skipped steps; after `optim.max_bad_steps` in a row it ends the run.

    The counts stay on the device and are looked at when metrics are logged, so that no step waits for them. Since
    skipped steps leave the weights alone, the batch at hand is then as bad as the first of the row was, unless a
    good step has followed. It is written with the weights to checkpoints/bad-step-<n>.ckpt, which reproduces what
    happened.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = self.longest_row = torch.zeros(())
        self.batches: list[dict[str, Tensor]] = []  # of the step at hand
        self.step_ended = False

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row, "longest_row": self.longest_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitMoE, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.batches = [batch] if self.step_ended else [*self.batches, batch]
        self.step_ended = not within_step(trainer)
        if not self.step_ended:
            return
        bad = pl_module.bad_step
        self.total = self.total.to(bad.device) + bad
        self.in_a_row = (self.in_a_row.to(bad.device) + 1) * bad
        self.longest_row = self.longest_row.to(bad.device).maximum(self.in_a_row)

    def require_good(self, trainer: L.Trainer, model: LitMoE) -> None:
        """Called when metrics are logged.

        Raises:
            SystemExit: too many steps in a row were bad.
        """
        row = int(self.longest_row)
        if row < model.optim.max_bad_steps:
            self.longest_row = self.in_a_row
            return
        step, run_dir = trainer.global_step, Path(trainer.default_root_dir)
        where = f"in {row} steps in a row, {'up to' if self.in_a_row else 'before'} step {step}"
        dump = run_dir / "checkpoints" / f"bad-step-{step:08d}.ckpt"
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in self.batches]
        if trainer.world_size > 1:  # whose it was nobody knows
            of_devices: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_devices, batches)
            batches = [batch for part in of_devices for batch in part]
        content: dict[str, Any] = {"state_dict": model.state_dict(), "batches": batches}
        model.on_save_checkpoint(content)
        trainer.strategy.save_checkpoint(content, dump)
        line = (
            f"loss or gradient was not finite {where}: {dump} has that step's batch and weights, the last good "
            f"checkpoint is {last_checkpoint(run_dir) or 'none'}; a lower model.optim.lr or data without bad text "
            "may help"
        )
        say(trainer, line)
        raise SystemExit(f"moepp fit: {line}")
