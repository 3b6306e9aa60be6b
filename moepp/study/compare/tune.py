"""`--tune`: before the seeds, each variant looks for its own best options, all in the same way.

One option after the other, in the matrix's order: each of its values beside the best of what was found before.
Every try is a whole run, from a seed that is none of the study's, judged by a half of the held-out text that the
study does not report on.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any

from moepp.model import InputError
from moepp.study.compare.matrix import Matrix, Run, Variant
from moepp.training.metrics import FINAL, LOSS

SEED = 1000  # the study's are below


@dataclass(frozen=True)
class Trial:
    """A variant with values that it may be given, and where that is tried."""

    variant: Variant
    values: dict[str, float]  # of every option that is tuned
    out: Path  # folder of the study

    @cached_property
    def run(self) -> Run:
        name = ",".join(f"{option.rpartition('.')[2]}={value}" for option, value in self.values.items())
        variant = self.variant.with_options(self.values | {"data.val_part": "tune"})
        return Run(variant, SEED, self.out / "tune" / self.variant.name / name)

    @property
    def loss(self) -> float:
        """Infinite where the run has failed."""
        if not self.run.finished:
            return math.inf
        loss = json.loads((self.run.folder / "result.json").read_text())[FINAL + LOSS]
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Search:
    """What has been tried, in order, and what each variant takes."""

    trials: list[Trial]
    best: dict[str, Trial]  # by variant

    def tuned(self, matrix: Matrix) -> Matrix:
        """Every variant with what was best for it, on the other half of the held-out text; the matrix itself, if
        nothing was searched for."""
        if not self.trials:
            return matrix
        report = {"data.val_part": "report"}
        variants = [variant.with_options(self.best[variant.name].values | report) for variant in matrix.variants]
        reference = next(variant for variant in variants if variant.name == matrix.reference.name)
        return replace(matrix, variants=variants, reference=reference)


def search(
    matrix: Matrix, options: dict[str, list[float]], out: Path, execute: Callable[[list[Run]], None]
) -> Search:
    """Try them all; `execute` trains the runs that it is given, unless they are finished.

    Raises:
        InputError: an option is unknown.
    """
    best = {variant.name: Trial(variant, present(matrix, variant, options), out) for variant in matrix.variants}
    trials: dict[Path, Trial] = {}  # by folder: a value may be the present one
    for option, values in options.items():
        stage = [
            Trial(variant, best[variant.name].values | {option: value}, out)
            for value, variant in product(values, matrix.variants)
        ]
        execute([trial.run for trial in stage])
        trials |= {trial.run.folder: trial for trial in stage}
        for variant in matrix.variants:
            tried = [trial for trial in trials.values() if trial.variant is variant]
            best[variant.name] = min(tried, key=lambda trial: trial.loss)
    return Search(list(trials.values()), best)


def present(matrix: Matrix, variant: Variant, options: dict[str, list[float]]) -> dict[str, float]:
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
