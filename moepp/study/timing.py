"""Timing functions against each other: in one process, in turn, so that they share the machine's moods."""

import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import torch
from torch import Tensor, nn

MOST_ROUNDS = 200


def in_turn(
    functions: Sequence[Callable[[], object]], device: torch.device, least: int, seconds: float
) -> list[list[float]]:
    """Seconds of each function in each round, after a round that only warms up: `least` rounds, and more until
    `seconds` are over."""
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while len(rounds) <= least or (time.perf_counter() - begun < seconds and len(rounds) <= MOST_ROUNDS):
        # whoever goes second may find the caches warm: take turns at that too
        order = range(len(functions)) if len(rounds) % 2 else reversed(range(len(functions)))
        times = [0.0] * len(functions)
        for i in order:
            synchronize(device)
            start = time.perf_counter()
            functions[i]()
            synchronize(device)
            times[i] = time.perf_counter() - start
        rounds.append(times)
        if len(rounds) == 1:
            begun = time.perf_counter()
    return rounds[1:]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile); of a single value, that value."""
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return lower, middle, upper


class TrainingStep:
    """Forward, backward, clipping and AdamW, as `moepp fit` takes a step. The learning rate is 0: a step costs
    what it costs in training, and all steps are the same.

    Args:
        model: whose parameters are trained.
        loss: computes the scalar loss; called under `autocast`.
        autocast: of the training's precision.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], autocast: torch.autocast) -> None:
        self.model, self.loss, self.autocast = model, loss, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, fused=True)

    def __call__(self) -> None:
        with self.autocast:
            loss = self.loss()
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
