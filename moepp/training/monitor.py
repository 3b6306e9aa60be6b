"""What a person sees of a run: the monitor's metrics and status line, and the summary at the end."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moepp.model import count_parameters, flops_per_token
from moepp.model.generate import generate
from moepp.system.files import replacing
from moepp.system.machine import device_name, peak_flops, provenance
from moepp.text.token_files import END_OF_TEXT_ID
from moepp.training.collapse import CollapseWatch
from moepp.training.csv_log import CSVLog
from moepp.training.module import LitMoE


class Monitor(L.Callback):
    """Logs means over the `log_every_n_steps` optimizer steps since the last log, and prints them as one line.

    Gradient norm (before clipping) and learning rate are those of the last step and of the one to come.
    Everything is summed on the device; it is waited for only when a line is due. The clock stops during
    validation. All loggers receive the same numbers at the same steps.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.logged_step = self.tokens = 0
        self.clock = self.paused = 0.0
        self.watch = CollapseWatch()

    def state_dict(self) -> dict[str, Any]:
        kept = {"logged_step": self.logged_step, "tokens": self.tokens}
        return {"sums": dict(self.sums), **kept, "watch": self.watch.looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums, self.logged_step = dict(state_dict["sums"]), state_dict["logged_step"]
        self.tokens = state_dict["tokens"]
        self.watch.looks = state_dict["watch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: LitMoE) -> None:  # type: ignore[override]
        self.clock, self.begun, self.begun_step = time.perf_counter(), time.perf_counter(), trainer.global_step
        # sums of the process that this one continues belong to the means, not to this one's speed
        self.tokens_before = float(self.sums.get("tokens", 0.0))
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitMoE, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        n_tokens = torch.tensor(float(batch["inputs"].numel()))
        for name, value in (outputs | {"batches": torch.ones(()), "tokens": n_tokens}).items():
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value.clone()
        due = trainer.global_step >= self.logged_step + trainer.log_every_n_steps  # type: ignore[attr-defined]
        if due or trainer.global_step == trainer.estimated_stepping_batches > self.logged_step:
            self.report(trainer, pl_module)

    def report(self, trainer: L.Trainer, model: LitMoE) -> None:
        n_batches, n_tokens = float(self.sums.pop("batches")), float(self.sums.pop("tokens"))  # of each device
        sums = {
            name: trainer.strategy.reduce(value.float(), reduce_op="mean") for name, value in self.sums.items()
        }
        self.tokens += round(n_tokens) * trainer.world_size
        counts_LE = sums.pop("tokens_per_expert_LE")
        del sums["loss"]  # Lightning has divided it by accumulate_grad_batches
        means = {f"train/{name}": float(value) / n_batches for name, value in sums.items()}
        balance_scaled = model.moe.balance_weight * means["train/balance"]
        shares_E = counts_LE.sum(0) / counts_LE.sum()
        ffn_LF = counts_LE[:, model.moe.kinds["ffn"]]
        ffn_per_token = n_batches * means.pop("train/ffn_assignments") / (model.transformer.n_layers * n_tokens)
        now = time.perf_counter()
        timed_tokens = trainer.world_size * (n_tokens - self.tokens_before)
        tokens_per_second = timed_tokens / (now - self.clock - self.paused)
        seq_len = trainer.datamodule.seq_len  # type: ignore[attr-defined]
        flops = 3 * flops_per_token(model.transformer, model.moe, seq_len, ffn_per_token)
        metrics = {
            **means,
            "train/balance_scaled": balance_scaled,
            "train/loss": means["train/cross_entropy"] + balance_scaled,
            "train/gradient_norm": float(model.gradient_norm),
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/tokens": self.tokens,
            "routing/ffn_per_token": ffn_per_token,
            **{f"routing/share/{kind}": float(shares_E[where].sum()) for kind, where in model.moe.kinds.items()},
            "routing/imbalance": float((ffn_LF.amax(1) / ffn_LF.mean(1)).mean()),
            "speed/tokens_per_second": tokens_per_second,
            "speed/tflops_per_second": flops * tokens_per_second / 1e12,
        }
        if peak := peak_flops(model.device, str(trainer.precision)):
            metrics["speed/mfu"] = flops * tokens_per_second / (trainer.world_size * peak)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.print_status(trainer, metrics, model.moe.top_k)
        for warning in self.watch.look(counts_LE, n_tokens, model.moe):
            say(trainer, warning)
        self.sums, self.logged_step = {}, trainer.global_step
        self.clock, self.paused, self.tokens_before = time.perf_counter(), 0.0, 0.0

    def print_status(self, trainer: L.Trainer, metrics: dict[str, float], top_k: int) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        per_step = (time.perf_counter() - self.begun) / max(1, step - self.begun_step)
        parts = [
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {metrics['train/cross_entropy']:.3f}",
            f"FFN {metrics['routing/ffn_per_token']:.2f} of {top_k}",
            f"imbalance {metrics['routing/imbalance']:.2f}",
            f"{metrics['speed/tokens_per_second']:,.0f} tokens/s",
            f"MFU {metrics['speed/mfu']:.1%}" if "speed/mfu" in metrics else "",
            f"{timedelta(seconds=int(per_step * (total - step)))} left",
        ]
        say(trainer, " │ ".join(part for part in parts if part))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_start = time.perf_counter()
        if trainer.state.fn != "fit":
            say(trainer, "validating on all held-out text")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused += time.perf_counter() - self.validation_start
        if trainer.state.fn == "fit":
            loss, bits = (trainer.callback_metrics[f"val/{name}"] for name in ("loss", "bits_per_byte"))
            say(trainer, f"validated after step {trainer.global_step}: {loss:.3f} nats, {bits:.3f} bits/byte")


class Summary(L.Callback):
    """At the end of a run: a table of what came out and where it is, and text that the model writes."""

    def __init__(self, run_dir: Path, sample_tokens: int = 48, n_samples: int = 3) -> None:
        self.run_dir, self.sample_tokens, self.n_samples = run_dir, sample_tokens, n_samples
        self.begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun -= state_dict["seconds"]  # a continued run has taken what it took before

    def on_validation_end(self, trainer: L.Trainer, pl_module: LitMoE) -> None:  # type: ignore[override]
        """After the validation on all held-out text that `moepp fit` ends with."""
        final = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("final/")
        }
        if not final or not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self.begun
        parameters = count_parameters(pl_module.transformer, pl_module.moe)
        result = {
            "step": trainer.global_step,
            "seconds": round(seconds, 1),
            "device": device_name(pl_module.device),
            "precision": str(trainer.precision),
            **provenance(),
            "parameters": parameters.total,
            "active_parameters": round(parameters.active(final["final/ffn_per_token"])),
            "ffn_per_token_expected": pl_module.moe.expected_ffn_per_token,
            **final,
        }
        text = json.dumps(result, indent=2) + "\n"
        with replacing(self.run_dir / "result.json") as file:  # where it stands, the run is finished
            file.write(text.encode())
        table = Table(title=f"{trainer.global_step} steps in {timedelta(seconds=int(seconds))}", show_header=False)
        table.add_row("validation loss", f"{final['final/loss']:.4f} nats/token")
        table.add_row("perplexity", f"{final['final/perplexity']:.2f}")
        table.add_row("bits per byte", f"{final['final/bits_per_byte']:.4f}")
        for domain in pl_module.domains:
            if (bits := final.get(f"final/bits_per_byte/{domain}")) is not None:
                table.add_row(f"  {domain}", f"{bits:.4f}")
        expected = result["ffn_per_token_expected"]
        table.add_row("FFN experts per token", f"{final['final/ffn_per_token']:.3f} (at balance {expected:.3f})")
        table.add_row("parameters", f"{parameters.total:,}, {result['active_parameters']:,} active per token")
        table.add_row("device", f"{result['device']}, {result['precision']}, torch {result['torch']}")
        table.add_section()
        for what, name in (
            ("metrics", "metrics.csv"),
            ("TensorBoard", "tensorboard/"),
            ("checkpoints", "checkpoints/"),
            ("config", "config.yaml"),
            ("result", "result.json"),
            ("log", "train.log"),
        ):
            table.add_row(what, str(self.run_dir / name))
        samples = self.samples(trainer, pl_module)
        with (self.run_dir / "train.log").open("a") as log:
            for console in (Console(), Console(file=log, width=120)):
                console.print(table)
                console.print(samples, markup=False, highlight=False)

    def samples(self, trainer: L.Trainer, model: LitMoE) -> str:
        """Beginnings of held-out documents of several domains, continued by the model."""
        tokens = trainer.datamodule.files  # type: ignore[attr-defined]
        lines = []
        held_out = [(domain, *span) for domain, span in zip(tokens.domains, tokens.val_ranges, strict=True)]
        for domain, start, end in [span for span in held_out if span[2] > span[1]][: self.n_samples]:
            prompt = torch.from_numpy(tokens.val[start : min(start + 16, end)].astype("int64"))
            room = min(self.sample_tokens, model.transformer.context_length - len(prompt))
            if room < 1:
                continue
            whole = generate(model.model, prompt.to(model.device), room, stop=END_OF_TEXT_ID).tolist()
            before, after = (
                tokens.tokenizer.decode(part) for part in (whole[: len(prompt)], whole[len(prompt) :])
            )
            lines.append(f"— {domain}: {before}⟶{after}")
        return "\n\n".join(lines)


def say(trainer: L.Trainer, line: str) -> None:
    """One line for the person watching (above the progress bar, where there is one) and for train.log."""
    if trainer.is_global_zero:
        print(line, flush=True, file=sys.stdout)
        with (Path(trainer.default_root_dir) / "train.log").open("a") as log:
            log.write(line + "\n")
