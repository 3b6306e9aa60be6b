"""What a person sees of a run while it trains: its metrics, for every logger, and a line of them."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from torch import Tensor

from moepp.model import training_flops_per_token
from moepp.system.machine import peak_flops
from moepp.training.bad_steps import BadSteps
from moepp.training.collapse import watch
from moepp.training.metrics import BITS, CROSS_ENTROPY, FFN_PER_TOKEN, LOSS, MFU, TOKENS, TOKENS_PER_SECOND, VAL
from moepp.training.module import LitMoE
from moepp.training.run_folder import say


class Monitor(L.Callback):
    """Logs means over the `log_every_n_steps` optimizer steps since the last log, and prints them as one line.

    The gradient norm (before clipping) is the last step's, the learning rate the next one's.
    Everything is summed on the device; it is waited for only when a line is due. The clock stops from the
    beginning of a validation to the next batch. All loggers receive the same numbers at the same steps.
    """

    def __init__(self, bad_steps: BadSteps) -> None:
        self.bad_steps = bad_steps
        self.sums: dict[str, Tensor] = {}
        self.logged_step = self.tokens = 0
        self.clock = 0.0  # when the tokens at hand began to be trained on, later by the time of validations since
        self.validating_since: float | None = None
        self.watch: dict[str, int] = {}  # signs of a collapse, and how long they have been there

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("logged_step", "tokens", "sums", "watch")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitMoE, checkpoint: dict[str, Any]
    ) -> None:
        """Each device has its own sums, and the checkpoint holds those of one: their mean, then."""
        if trainer.world_size > 1:
            checkpoint["callbacks"][self.state_key]["sums"] = self.mean_sums(trainer)

    def mean_sums(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Over the devices. Counts, and what a checkpoint gave back, are on the CPU, where NCCL sums nothing."""
        reduce, device = trainer.strategy.reduce, trainer.strategy.root_device
        # it reduces in place
        copies = {name: value.to(device, torch.float32, copy=True) for name, value in self.sums.items()}
        return {name: reduce(value, reduce_op="mean") for name, value in copies.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: LitMoE) -> None:  # type: ignore[override]
        self.clock, self.begun, self.begun_step = time.perf_counter(), time.perf_counter(), trainer.global_step
        # sums of the process that this one continues belong to the means, not to this one's speed
        self.tokens_before = float(self.sums.get("tokens", 0.0))
        self.print_data(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        self.start_clock()

    def start_clock(self) -> None:
        """Again, if a validation has stopped it, after which a checkpoint was written."""
        if self.validating_since is not None:
            self.clock += time.perf_counter() - self.validating_since
            self.validating_since = None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitMoE, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        n_tokens = torch.tensor(float(batch["inputs"].numel()))
        for name, value in (outputs | {"batches": torch.ones(()), "tokens": n_tokens}).items():
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value.clone()
        due = trainer.global_step >= self.logged_step + trainer.log_every_n_steps  # type: ignore[attr-defined]
        last = trainer.global_step == trainer.estimated_stepping_batches
        if due or (last and trainer.global_step > self.logged_step):
            self.report(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: LitMoE) -> None:  # type: ignore[override]
        """What max_time or early stopping has ended may have steps that no row tells of."""
        if trainer.global_step > self.logged_step:
            self.start_clock()
            self.report(trainer, pl_module)

    def report(self, trainer: L.Trainer, model: LitMoE) -> None:
        n_batches, n_tokens = float(self.sums.pop("batches")), float(self.sums.pop("tokens"))  # of each device
        sums = self.mean_sums(trainer)
        self.tokens += round(n_tokens) * trainer.world_size
        counts_LE = sums.pop("tokens_per_expert_LE")
        del sums["loss"]  # Lightning has divided it by accumulate_grad_batches
        means = {f"train/{name}": float(value) / n_batches for name, value in sums.items()}
        balance_scaled = model.moe.balance_weight * means["train/balance"]
        loss = means[CROSS_ENTROPY] + balance_scaled
        if model.teacher is not None:
            loss += model.distill.weight * (means["train/distillation"] - means[CROSS_ENTROPY])
        shares_E = counts_LE.sum(0) / counts_LE.sum()
        ffn_per_token = n_batches * means.pop("train/ffn_assignments") / (model.transformer.n_layers * n_tokens)
        timed_tokens = trainer.world_size * (n_tokens - self.tokens_before)
        tokens_per_second = timed_tokens / (time.perf_counter() - self.clock)
        seq_len = trainer.datamodule.seq_len  # type: ignore[attr-defined]
        teacher = None if model.teacher is None else model.teacher.configs
        flops = training_flops_per_token((model.transformer, model.moe), seq_len, ffn_per_token, teacher)
        metrics = {
            **means,
            "train/balance_scaled": balance_scaled,
            "train/loss": loss,
            "train/gradient_norm": float(model.gradient_norm),
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            TOKENS: self.tokens,
            FFN_PER_TOKEN: ffn_per_token,
            **{f"routing/share/{kind}": float(shares_E[where].sum()) for kind, where in model.moe.kinds.items()},
            "routing/imbalance": imbalance(counts_LE[:, model.moe.kinds["ffn"]]),
            TOKENS_PER_SECOND: tokens_per_second,
            "speed/tflops_per_second": flops * tokens_per_second / 1e12,
        }
        if peak := peak_flops(model.device, str(trainer.precision)):
            metrics[MFU] = flops * tokens_per_second / (trainer.world_size * peak)
        metrics["train/skipped_steps"] = float(self.bad_steps.total)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.print_status(trainer, metrics, model.moe.top_k)
        self.watch, warnings = watch(self.watch, counts_LE, n_tokens, model.moe)
        for warning in warnings:
            say(trainer, warning)
        self.sums, self.logged_step = {}, trainer.global_step
        self.clock, self.tokens_before = time.perf_counter(), 0.0
        self.bad_steps.require_good(trainer, model)

    def print_data(self, trainer: L.Trainer) -> None:
        """What is trained on, how often, and what is held out."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        steps, ranges = int(trainer.estimated_stepping_batches), data.files.val_ranges
        epochs = steps * trainer.accumulate_grad_batches / data.order().batches
        of_domains = f"of {len(ranges)} domain{'s' * (len(ranges) > 1)}"
        held_out = f"{sum(end - begin for begin, end in ranges):,} tokens {of_domains} are held out"
        say(trainer, f"{data.files.label}: {steps:,} steps are {epochs:.2g} epochs; {held_out}")

    def print_status(self, trainer: L.Trainer, metrics: dict[str, float], top_k: int) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        per_step = (time.perf_counter() - self.begun) / max(1, step - self.begun_step)
        parts = [
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {metrics[CROSS_ENTROPY]:.3f}",
            f"FFN {metrics[FFN_PER_TOKEN]:.2f} of {top_k}",
            f"imbalance {metrics['routing/imbalance']:.2f}",
            f"{metrics[TOKENS_PER_SECOND]:,.0f} tokens/s",
            f"MFU {metrics[MFU]:.1%}" if MFU in metrics else "",
            f"{timedelta(seconds=int(per_step * (total - step)))} left",
        ]
        say(trainer, " │ ".join(part for part in parts if part))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating_since = time.perf_counter()
        if trainer.state.fn != "fit":
            say(trainer, "validating on all held-out text")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            loss, bits = (trainer.callback_metrics[VAL + name] for name in (LOSS, BITS))
            say(trainer, f"validated after step {trainer.global_step}: {loss:.3f} nats, {bits:.3f} bits/byte")


def imbalance(tokens_per_expert_LF: Tensor) -> float:
    """Tokens of a layer's fullest FFN expert over their mean; mean over the layers that have any, as one may have
    left all of a budget to others."""
    counts_LF = tokens_per_expert_LF.float()
    return float((counts_LF.amax(1) / counts_LF.mean(1)).nanmean())
