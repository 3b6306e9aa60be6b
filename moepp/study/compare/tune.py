"""`--tune`: before the seeds, each variant looks for its own best options, all in the same way.

One option after the other, in the matrix's order: each of its values beside the best of what was found before.
Every try is a run to the end of its schedule, as long as the study's or a stated part of that, or the mean of
several such runs, from seeds that are none of the study's, judged by a half of the held-out text that the study
does not report on. One that has failed is lost, and not repeated until its folder is removed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product
from operator import getitem
from pathlib import Path
from statistics import fmean
from typing import Any

from moepp.model import InputError
from moepp.study.compare.matrix import Matrix, Run, Variant, last_part, with_equal_flops
from moepp.training.metrics import FINAL, LOSS

SEED = 1000  # the first of a try; the study's are below


@dataclass(frozen=True)
class Trial:
    """A variant with values that it may be given, and where that is tried."""

    variant: Variant
    values: dict[str, float]  # of every option that is tuned
    out: Path  # folder of the study
    part_of_steps: float  # of a whole run's
    seeds: int

    @property
    def steps(self) -> int:
        return max(1, round(self.variant.steps * self.part_of_steps))

    @cached_property
    def runs(self) -> list[Run]:
        """One for each seed."""
        name = ",".join(f"{last_part(option)}={value}" for option, value in self.values.items())
        tried = self.variant.with_options(self.values | {"data.val_part": "tune", "trainer.max_steps": self.steps})
        folder = self.out / "tune" / self.variant.name
        return [Run(tried, seed, folder / f"{name},seed={seed}") for seed in range(SEED, SEED + self.seeds)]

    @property
    def failed(self) -> Run | None:
        return next((run for run in self.runs if run.failure), None)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def loss(self) -> float:
        """The mean; infinite where a run has failed, or has not been made."""
        losses = [run.result[FINAL + LOSS] for run in self.finished]
        return fmean(losses) if len(losses) == self.seeds and all(map(math.isfinite, losses)) else math.inf


@dataclass(frozen=True)
class Search:
    """What has been tried, in order, and what each variant takes."""

    trials: list[Trial]
    best: dict[str, Trial]  # by variant

    def tuned(self, matrix: Matrix) -> Matrix:
        """Every variant with what was best for it, on the other half of the held-out text, those with a `flops_of`
        for as many steps as that then gives; the matrix itself, if nothing was searched for."""
        if not self.trials:
            return matrix
        report = {"data.val_part": "report"}
        variants = {v.name: v.with_options(self.best[v.name].values | report) for v in matrix.variants}
        variants = with_equal_flops(variants)
        return replace(matrix, variants=list(variants.values()), reference=variants[matrix.reference.name])


def search(
    matrix: Matrix,
    options: dict[str, list[float]],
    part_of_steps: float,
    seeds: int,
    out: Path,
    execute: Callable[[list[Run]], None],
) -> Search:
    """Try them all for `part_of_steps` of a run's, from so many seeds; `execute` trains what it is given, unless
    finished or failed.

    Raises:
        InputError: an option is unknown, or a variant has failed with all values of one.
    """
    best = {
        v.name: Trial(v, current_values(matrix, v, options), out, part_of_steps, seeds) for v in matrix.variants
    }
    trials: dict[Path, Trial] = {}  # by first folder: a value may be the present one
    for option, values in options.items():
        stage = [
            replace(best[variant.name], values=best[variant.name].values | {option: value})
            for value, variant in product(values, matrix.variants)
            if matters(option, variant)
        ]
        execute([run for trial in stage for run in trial.runs])
        trials |= {trial.runs[0].folder: trial for trial in stage}
        for variant in (variant for variant in matrix.variants if matters(option, variant)):
            failed = [trial.failed for trial in stage if trial.variant is variant]
            if last := all(failed) and failed[-1]:
                raise InputError(
                    f"tune: {variant.name} has failed with every value of {option}, the last time with "
                    f"{last.failure}; see {last.folder}, and remove what is to be tried again"
                )
            tried = [trial for trial in trials.values() if trial.variant is variant]
            best[variant.name] = min(tried, key=lambda trial: trial.loss)
    return Search(list(trials.values()), best)


def matters(option: str, variant: Variant) -> bool:
    """β has nothing to balance where there is one expert."""
    return option != "model.moe.balance_weight" or variant.moe.n_experts > 1


def current_values(matrix: Matrix, variant: Variant, options: dict[str, list[float]]) -> dict[str, float]:
    """The values that the variant has without a search."""

    def value(option: str) -> Any:
        return reduce(getitem, option.split("."), variant.options)

    try:
        values = {option: value(option) for option in options}
    except (KeyError, TypeError) as error:
        raise InputError(f"{matrix.path}: tune: one of {', '.join(options)} is no option of a run") from error
    for option, number in values.items():
        if type(number) not in (int, float):
            raise InputError(
                f"{matrix.path}: tune: {option} is {number} in {variant.name}, not a number to go from"
            )
    return values
