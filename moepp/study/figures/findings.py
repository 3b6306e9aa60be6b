"""The paper's five findings about expert load as numbers with intervals, and whether they hold here.

Statistics are computed on sums over passages, and passages are drawn anew within each domain. The interval is the
basic bootstrap's, [2θ - θ*(97.5 %), 2θ - θ*(2.5 %)]. A difference between domains is above 0 by chance alone, and
in a resample θ* more so: percentiles of θ* would take that for a finding, mirrored at θ they do not.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from moepp.study.figures.routing_stats import RoutingCounts, Sums

RESAMPLES, SHUFFLES = 1000, 200
FEWEST_PASSAGES = 8  # of a domain: below, resampling says nothing

Statistic = Callable[[Sums], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A statistic, or an array of them, with 95 % intervals; NaN bounds where the text is too short for them."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Estimate":
        return Estimate(function(self.value), function(self.low), function(self.high))

    def __getitem__(self, index: Any) -> "Estimate":
        return self.map(lambda array: array[index])

    def __str__(self) -> str:
        """Of a scalar, to three digits."""
        interval = "(no interval)" if np.isnan(self.low) else f"[{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g} {interval}"

    def columns(self, name: str) -> dict[str, np.ndarray]:
        """Of a table, with a row for each number of the array."""
        return {name: self.value.ravel(), f"{name}_low": self.low.ravel(), f"{name}_high": self.high.ravel()}

    def table(self, name: str, **axes: Sequence[Any]) -> pd.DataFrame:
        """The numbers by their places along the array's axes."""
        return combinations(**axes).assign(**self.columns(name))


def combinations(**axes: Sequence[Any]) -> pd.DataFrame:
    """A row for each combination of values, in the order of an array with these axes."""
    return pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)


class Bootstrap:
    """What was counted on a text, and resamples of its passages, the same ones for every statistic.

    Attributes:
        sums: over the whole text.
        too_short: domains of too few passages for intervals.
    """

    def __init__(self, counts: RoutingCounts) -> None:
        self.counts, rng = counts, np.random.default_rng(0)
        of_domain = counts.passages.sums
        self.too_short = [domain for domain, passages in of_domain.items() if len(passages) < FEWEST_PASSAGES]
        sums_DPX = [np.array(passages, np.float64) for passages in of_domain.values()]
        sizes_D = [len(sums_PX) for sums_PX in sums_DPX]
        times_drawn_DRP = [rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in sizes_D]
        resampled_DRX = [drawn_RP @ sums_PX for drawn_RP, sums_PX in zip(times_drawn_DRP, sums_DPX, strict=True)]
        pool_PX, starts_D = np.concatenate(sums_DPX), np.cumsum([0, *sizes_D[:-1]])
        shuffled_RDX = [np.add.reduceat(rng.permutation(pool_PX), starts_D) for _ in range(SHUFFLES)]
        self.sums = counts.sums(np.stack([sums_PX.sum(0) for sums_PX in sums_DPX]))
        self.resampled = counts.sums(np.stack(resampled_DRX, 1))
        self.shuffled = counts.sums(np.stack(shuffled_RDX))

    def estimate(self, statistic: Statistic) -> Estimate:
        """The statistic and its interval."""
        value = quietly(statistic, self.sums)
        high, low = 2 * value - np.quantile(quietly(statistic, self.resampled), (0.025, 0.975), axis=0)
        if self.too_short:
            low = high = np.full_like(value, np.nan)
        return Estimate(value, low, high)

    def above_chance(self, statistic: Statistic) -> Estimate:
        """The same of a difference between domains, less what chance adds to it: as much as resampling adds."""
        estimate = self.estimate(statistic)
        return replace(estimate, value=2 * estimate.value - quietly(statistic, self.resampled).mean(0))

    def chance(self, statistic: Statistic) -> np.ndarray:
        """What a difference between domains reaches (97.5 %) where passages are shuffled over domains. What chance
        adds is still in it, though not in `above_chance`: the bar is on the safe side."""
        return np.quantile(quietly(statistic, self.shuffled), 0.975, axis=0)


def quietly(statistic: Statistic, sums: Sums) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that there is nothing to take a mean of: NaN says so
        return statistic(sums)


@dataclass(frozen=True)
class Finding:
    """One claim, measured.

    Attributes:
        number: of the paper's finding.
        claim: what the paper says.
        measure: what stands for it here, with its unit.
        estimate: of a scalar.
        smallest: a value below it would not count.
        chance: what text without the claimed difference reaches. Above `smallest`, the text is too short to deny.
    """

    number: int
    claim: str
    measure: str
    estimate: Estimate
    smallest: float = 0.0
    chance: float = 0.0

    @property
    def threshold(self) -> float:
        """The claim holds above it."""
        return max(self.smallest, self.chance)

    @property
    def holds(self) -> str:
        """`yes` where the whole interval is above the threshold, `no` where it is below what would count, else
        `cannot tell`."""
        if self.estimate.low > self.threshold:
            return "yes"
        return "no" if self.estimate.high < self.smallest else "cannot tell"

    def row(self) -> dict[str, Any]:
        """Of findings.csv."""
        named = {name: getattr(self, name) for name in ("number", "claim", "measure", "threshold", "holds")}
        return named | {name: bound.item() for name, bound in self.estimate.columns("measured").items()}


def findings(bootstrap: Bootstrap) -> list[Finding]:
    """All five, in the words of findings.yaml; of vanilla MoE, which has FFN experts alone, the fifth alone."""
    found = []
    for claim in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")):
        statistic = getattr(Sums, claim.pop("statistic"))
        if "smallest" in claim:
            estimate, chance = bootstrap.above_chance(statistic), float(bootstrap.chance(statistic))
        else:
            estimate, chance = bootstrap.estimate(statistic), 0.0
        found.append(Finding(**claim, estimate=estimate, chance=chance))
    return found if len(bootstrap.sums.kinds) > 1 else found[-1:]
