"""What finished runs left in their folders: the final metrics and the validation curve."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moepp.model import InputError, flops_per_token
from moepp.study.compare.matrix import Run


@dataclass(frozen=True)
class Curve:
    """Validation loss in the course of one run; all arrays have one entry for each validation."""

    tokens: np.ndarray  # trained on so far
    flops: np.ndarray  # spent so far on training steps, with the FFN experts per token as measured
    loss: np.ndarray  # nats per token

    def at_flops(self, flops: float) -> float:
        """The loss where `flops` were spent, between two validations on the straight line."""
        return float(np.interp(flops, self.flops, self.loss))


@dataclass(frozen=True)
class Result:
    """One finished run."""

    run: Run
    final: dict[str, Any]  # result.json
    curve: Curve
    flops: float  # of all training steps, as measured

    @property
    def domains(self) -> dict[str, float]:
        """Bits per byte by domain."""
        prefix = "final/bits_per_byte/"
        return {name.removeprefix(prefix): v for name, v in self.final.items() if name.startswith(prefix)}


def read_result(run: Run) -> Result:
    """The result of a finished run.

    Raises:
        InputError: its metrics.csv is missing or holds no training step.
    """
    path = run.folder / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{path}: is missing; remove {run.folder} to train it again")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(name: str, wanted: Callable[[dict[str, str]], bool]) -> np.ndarray:
        return np.array([float(row[name]) for row in rows if wanted(row)])

    def trained(row: dict[str, str]) -> bool:
        return bool(row.get("train/tokens"))

    def validated(row: dict[str, str]) -> bool:
        return bool(row.get("val/loss"))

    steps, tokens = column("step", trained), column("train/tokens", trained)
    if len(steps) == 0:
        raise InputError(f"{path}: has no training step; remove {run.folder} to train it again")
    variant = run.variant
    seq_len = variant.options["data"]["seq_len"]
    per_token = [
        3 * flops_per_token(variant.transformer, variant.moe, seq_len, ffn)
        for ffn in column("routing/ffn_per_token", trained)
    ]
    flops = np.cumsum(np.diff(tokens, prepend=0) * np.array(per_token))
    val_steps = column("step", validated)
    curve = Curve(
        tokens=np.interp(val_steps, [0, *steps], [0, *tokens]),
        flops=np.interp(val_steps, [0, *steps], [0, *flops]),
        loss=column("val/loss", validated),
    )
    return Result(run, json.loads((run.folder / "result.json").read_text()), curve, float(flops[-1]))


def at_equal_flops(
    variant: dict[int, Result], reference: dict[int, Result]
) -> dict[int, tuple[float, float, float]]:
    """By seed: the most FLOPs that both runs reached, and the validation loss of each there."""
    found = {}
    for seed in variant.keys() & reference.keys():
        ours, theirs = variant[seed].curve, reference[seed].curve
        if len(ours.flops) and len(theirs.flops):
            budget = min(ours.flops[-1], theirs.flops[-1])
            if budget >= max(ours.flops[0], theirs.flops[0]):  # before the first validation nothing is known
                found[seed] = (float(budget), ours.at_flops(budget), theirs.at_flops(budget))
    return found
