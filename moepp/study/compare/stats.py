"""Paired differences: a seed gives both variants the same data in the same order and the same initial weights."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Variant minus reference over `n` common seeds, of something of which less is better.

    `low` and `high` bound the mean at 95 % confidence (t-distribution), `p` is of the paired t-test, two-sided.
    All three are NaN below two seeds.
    """

    n: int
    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan

    @property
    def verdict(self) -> str:
        """A word for it; one that takes sides only where the interval excludes zero."""
        if self.n < 2:
            return "no interval: needs 2 seeds or more"
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference shown"


def paired(variant: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """Compares by seed; a seed that only one of them has is left out."""
    seeds = sorted(variant.keys() & reference.keys())
    if not seeds:
        return Paired(0, math.nan)
    ours, theirs = (np.array([side[seed] for seed in seeds]) for side in (variant, reference))
    mean = float((ours - theirs).mean())
    if len(seeds) < 2:
        return Paired(1, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns where all differences are the same
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(CONFIDENCE)
    return Paired(len(seeds), mean, float(interval.low), float(interval.high), float(test.pvalue))


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN below two values."""
    if len(values) == 0:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
