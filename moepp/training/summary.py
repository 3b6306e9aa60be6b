"""What a person sees of a run when it is over: result.json, a table, and text that the model writes."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from moepp.model import count_parameters
from moepp.model.generate import generate
from moepp.system.files import replacing
from moepp.system.machine import device_name, provenance
from moepp.training.metrics import BITS, FFN, FINAL, LOSS, PERPLEXITY, aim
from moepp.training.module import LitMoE
from moepp.training.monitor import Monitor

N_SAMPLES, SAMPLE_TOKENS = 3, 48  # beginnings of held-out text, and how far the model takes each


class Summary(L.Callback):
    """At the end of a run: a table of what came out and where it is, and text that the model writes."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun -= state_dict["seconds"]  # a continued run has taken what it took before

    def on_validation_end(self, trainer: L.Trainer, pl_module: LitMoE) -> None:  # type: ignore[override]
        """After the validation on all held-out text that `moepp fit` ends with."""
        final = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(FINAL)}
        if not final:
            return
        if not (trainer.is_global_zero or pl_module.parallel.sharded):
            return
        samples = self.samples(trainer, pl_module)  # by all devices, where each has a part of the model
        if not trainer.is_global_zero:
            return
        run_dir = Path(trainer.default_root_dir)
        seconds = time.perf_counter() - self.begun
        parameters = count_parameters(pl_module.transformer, pl_module.moe)
        result = {
            "step": trainer.global_step,
            "tokens": self.monitor.tokens,
            "data": trainer.datamodule.files.label,  # type: ignore[attr-defined]
            "seconds": round(seconds, 1),
            "device": device_name(pl_module.device),
            "precision": str(trainer.precision),
            **provenance(),
            "parameters": parameters.total,
            "active_parameters": round(parameters.active(final[FINAL + FFN])),
            "ffn_per_token_expected": pl_module.moe.expected_ffn_per_token,
            **final,
        }
        with replacing(run_dir / "result.json") as file:  # where it stands, the run is finished
            file.write(f"{json.dumps(result, indent=2)}\n".encode())
        table = Table(title=f"{trainer.global_step} steps in {timedelta(seconds=int(seconds))}", show_header=False)
        table.add_row("validation loss", f"{final[FINAL + LOSS]:.4f} nats/token")
        table.add_row("perplexity", f"{final[FINAL + PERPLEXITY]:.2f}")
        table.add_row("bits per byte", f"{final[FINAL + BITS]:.4f}")
        for domain in trainer.datamodule.files.domains:  # type: ignore[attr-defined]
            if (bits := final.get(f"{FINAL}{BITS}/{domain}")) is not None:
                table.add_row(f"  {domain}", f"{bits:.4f}")
        table.add_row("FFN experts per token", f"{final[FINAL + FFN]:.3f} ({aim(pl_module.moe)})")
        table.add_row("parameters", f"{parameters.total:,}, {result['active_parameters']:,} active per token")
        table.add_row("device", f"{result['device']}, {result['precision']}, torch {result['torch']}")
        table.add_row("folder", str(run_dir))
        with (run_dir / "train.log").open("a") as log:
            for console in (Console(), Console(file=log, width=120)):
                console.print(table)
                console.print(samples, markup=False, highlight=False)

    def samples(self, trainer: L.Trainer, model: LitMoE) -> str:
        """Beginnings of held-out documents of several domains, continued by the model."""
        tokens = trainer.datamodule.files  # type: ignore[attr-defined]
        lines = []
        domains = zip(tokens.domains, tokens.val_ranges, strict=True)
        for domain, (start, end) in [(name, span) for name, span in domains if span[1] > span[0]][:N_SAMPLES]:
            prompt = torch.from_numpy(tokens.val[start : min(start + 16, end)].astype("int64"))
            length = min(SAMPLE_TOKENS, model.transformer.context_length - len(prompt))
            if length < 1:
                continue
            with trainer.precision_plugin.forward_context():  # which matrices may have been gathered for
                whole = generate(model.model, prompt.to(model.device), length).tolist()
            after = whole[len(prompt) :]
            if tokens.end_of_text in after:  # not where it is written: no device may stop before the others
                after = after[: after.index(tokens.end_of_text) + 1]
            before, after = map(tokens.tokenizer.decode, (whole[: len(prompt)], after))
            lines.append(f"— {domain}: {before}⟶{after}")
        return "\n\n".join(lines)
