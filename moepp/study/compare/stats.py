"""Paired differences: a seed gives both variants the same data in the same order and the same initial weights."""

import math
import warnings
from typing import NamedTuple

import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """Variant minus reference over common seeds, of something of which less is better.

    `low` and `high` bound the mean at 95 % confidence (t-distribution), `p` is of the paired t-test, two-sided.
    All three are NaN below two seeds. `verdict` is a word for it, one that takes sides only where the interval
    excludes zero.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    verdict: str = "no interval: needs 2 seeds or more"


def paired(variant: pd.Series, reference: pd.Series) -> Paired:
    """Compares by seed, the index of both; a seed that only one of them has is left out."""
    ours, theirs = variant.align(reference, join="inner")
    mean = float((ours - theirs).mean())
    if len(ours) < 2:
        return Paired(mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns where all differences are the same
        test = stats.ttest_rel(ours, theirs)
        low, high = map(float, test.confidence_interval(CONFIDENCE))
    verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return Paired(mean, low, high, float(test.pvalue), verdict)
