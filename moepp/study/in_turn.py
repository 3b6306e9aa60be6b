"""Timing functions against each other: in one process, in turn, so that they share the machine's moods."""

import time
from collections.abc import Callable, Sequence

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SECONDS = 3.0  # for a measurement, once the least number of rounds is done


def in_turn(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    least: int = LEAST_ROUNDS,
    seconds: float | None = None,
) -> list[list[float]]:
    """Seconds of each function in each round, after a round that only warms up: `least` rounds, and more until
    `seconds` (by default SECONDS) are over."""
    seconds_in_all = SECONDS if seconds is None else seconds
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while len(rounds) <= least or (time.perf_counter() - begun < seconds_in_all and len(rounds) <= MOST_ROUNDS):
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
