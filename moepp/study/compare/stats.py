"""Paired differences: a seed gives both variants the same data in the same order and the same initial weights."""

import math
import warnings
from typing import NamedTuple

import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Variant minus reference over common seeds, of something of which less is better; NaN is what they do not tell.

    `low` and `high` bound the mean at 95 % confidence (t-distribution), `p` is of the paired t-test, two-sided.
    All three need two seeds.
    """

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def paired(variant: pd.Series, reference: pd.Series) -> Difference:
    """Compares by seed, the index of both; a seed that only one of them has is left out."""
    ours, theirs = variant.align(reference, join="inner")
    if len(ours) < 2:
        return Difference(float((ours - theirs).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns where all differences are the same
        test = stats.ttest_rel(ours, theirs)
        low, high = test.confidence_interval(CONFIDENCE)
    return Difference(float((ours - theirs).mean()), float(low), float(high), float(test.pvalue))


def verdict(low: float, high: float) -> str:
    """A word for an interval; one that takes sides only where it excludes zero."""
    if math.isnan(low):
        return "no interval: needs 2 seeds or more"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "no difference shown"
