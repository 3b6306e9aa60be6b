"""How fast each variant is, relative to the reference: both in one process, in turn, on the same text.

Runs of their own, hours apart on a machine that others use, would compare the machine's moods. Here the two models
of a pair alternate, and what counts is the ratio within each round.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from moepp.model import MoELayer, Routing
from moepp.study.compare.matrix import Run, Variant
from moepp.study.timing import in_turn
from moepp.system.machine import device_name, keep_freed_memory
from moepp.text.data_module import TokenDataModule
from moepp.training.checkpoint import last_checkpoint, read_checkpoint
from moepp.training.module import LitMoE


@dataclass(frozen=True)
class Ratio:
    """Reference time / variant time over rounds: above 1 the variant is faster."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


@dataclass(frozen=True)
class Speed:
    """Of one variant. `expert_forward` is of FFN and zero-computation experts alone, given the routing."""

    tokens_per_second: float  # training: the reference's in the least disturbed comparison, times the ratio
    training: Ratio
    expert_forward: Ratio


def measure(runs: list[Run], reference: Run, cache: Path) -> dict[str, Speed]:
    """Speed of each variant's trained model (one run of each in `runs`) by variant name.

    Reads `cache` where it holds the same runs on the same device, and writes it otherwise.
    """
    where = best_device(reference.variant)
    trained = {run.name: hashlib.sha256((run.folder / "result.json").read_bytes()).hexdigest() for run in runs}
    key = {"device": device_name(where), "runs": trained}
    if cache.is_file():
        saved = json.loads(cache.read_text())
        if saved["key"] == key:
            return {name: read_speed(speed) for name, speed in saved["speeds"].items()}
    keep_freed_memory(where)  # as `moepp fit` does
    speeds = {}
    for run in runs:
        try:
            speeds[run.variant.name] = compare(run, reference, where)
        except torch.OutOfMemoryError:
            print(f"speed of {run.variant.name}: not measured, two models do not fit the memory", flush=True)
    quietest = max((speed.tokens_per_second for speed in speeds.values()), default=0.0)
    speeds = {
        name: replace(speed, tokens_per_second=quietest * speed.training.median) for name, speed in speeds.items()
    }
    saved = {"key": key, "speeds": {name: asdict(speed) for name, speed in speeds.items()}}
    cache.write_text(json.dumps(saved, indent=1) + "\n")
    return speeds


def read_speed(saved: dict[str, Any]) -> Speed:
    return Speed(saved["tokens_per_second"], Ratio(**saved["training"]), Ratio(**saved["expert_forward"]))


def compare(run: Run, reference: Run, device: torch.device) -> Speed:
    """Of the run's model; `tokens_per_second` is still the reference's, as it was during this comparison."""
    subjects = [Subject(run, device), Subject(reference, device)]
    steps = in_turn([subject.training_step for subject in subjects], device)
    experts = in_turn([subject.expert_forward() for subject in subjects], device)
    reference_speed = subjects[1].batch["inputs"].numel() / median(seconds for _, seconds in steps)
    return Speed(reference_speed, ratio(steps), ratio(experts))


class Subject:
    """A trained model with a batch of training text (held-out batches may be padded), at the study's own sizes."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.device = device
        data = TokenDataModule(**run.options["data"])
        data.setup()
        self.batch = {name: value.to(device) for name, value in next(iter(data.train_dataloader())).items()}
        self.model = untrained(run.variant).to(device)
        trained = last_checkpoint(run.folder)
        assert trained is not None
        self.model.load_state_dict(read_checkpoint(trained)["state_dict"])
        precision = json.loads((run.folder / "result.json").read_text())["precision"]
        self.dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        self.autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)
        # a rate of 0: the step costs what it costs in training, and the routing stays the trained model's
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def training_step(self) -> None:
        """Forward, backward and optimizer step on the batch."""
        self.model.train()
        with self.autocast:
            loss = self.model.training_step(self.batch, 0)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def expert_forward(self) -> Callable[[], None]:
        """A function that runs the experts of every layer on what these receive from the batch, already routed."""
        received: list[tuple[MoELayer, Tensor, Routing]] = []

        def receive(moe: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Routing]) -> None:
            assert isinstance(moe, MoELayer)
            dtype = self.dtype or inputs[0].dtype
            received.append((moe, inputs[0].flatten(0, 1).to(dtype), output[1]))

        layers = [module for module in self.model.modules() if isinstance(module, MoELayer)]
        hooks = [layer.register_forward_hook(receive) for layer in layers]
        self.model.eval()
        with torch.no_grad(), self.autocast:
            self.model.model(self.batch["inputs"])
        for hook in hooks:
            hook.remove()

        def run() -> None:
            with torch.no_grad(), self.autocast:
                for moe, x_TD, routing in received:
                    moe.experts(x_TD, routing)

        return run


def ratio(rounds: list[list[float]]) -> Ratio:
    """Of the second function's time to the first's, round by round."""
    ratios = [theirs / ours for ours, theirs in rounds]
    lower, middle, upper = quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, lower, upper, len(ratios))


def step_seconds(variant: Variant) -> float:
    """Seconds of one optimizer step of an untrained model on random tokens, measured now."""
    device = best_device(variant)
    model = untrained(variant).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    data, trainer = variant.options["data"], variant.options["trainer"]
    tokens = torch.randint(variant.transformer.vocab_size, (data["batch_size"], data["seq_len"]), device=device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model.training_step({"inputs": tokens, "targets": tokens}, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return min(seconds for (seconds,) in in_turn([step], device)[:3]) * trainer["accumulate_grad_batches"]


def untrained(variant: Variant) -> LitMoE:
    return LitMoE(variant.transformer, variant.moe, compile=variant.options["model"]["compile"])


def best_device(variant: Variant) -> torch.device:
    """Where the variant's runs train: the GPU, if there is one and it is not refused."""
    wanted = variant.options["trainer"]["accelerator"]
    return torch.device("cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")
