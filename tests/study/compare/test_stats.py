"""Statistics against values worked out by hand."""

import math

import pandas as pd
import pytest

from moepp.study.compare.stats import Paired, paired


def by_seed(losses: dict[int, float]) -> pd.Series:
    return pd.Series(losses, dtype=float)


def test_paired_interval_and_p_by_hand() -> None:
    """Differences −0.1, −0.2, −0.3: mean −0.2, s.d. 0.1, standard error 0.1/√3; t(0.975, 2) = 4.302653.

    For two degrees of freedom the two-sided p of t is 1 − |t| / √(t² + 2).
    """
    result = paired(by_seed({0: 2.9, 1: 3.3, 2: 1.7}), by_seed({0: 3.0, 1: 3.5, 2: 2.0}))
    half = 4.302653 * 0.1 / math.sqrt(3)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert result.mean == pytest.approx(-0.2)
    assert (result.low, result.high) == (
        pytest.approx(-0.2 - half, abs=1e-6),
        pytest.approx(-0.2 + half, abs=1e-6),
    )
    assert result.p == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-6)
    assert result.p == pytest.approx(0.0742, abs=1e-4)
    assert result.verdict == "no difference shown"  # the interval reaches above zero


def test_only_common_seeds_are_paired() -> None:
    result = paired(by_seed({7: 100.0, 1: 2.0, 0: 1.0}), by_seed({0: 2.0, 1: 4.0, 5: -100.0}))
    assert result.mean == -1.5
    # one degree of freedom: t(0.975, 1) = 12.7062, standard error 0.5
    assert result.high == pytest.approx(-1.5 + 12.7062 * 0.5, abs=1e-4)


@pytest.mark.parametrize(("seed", "mean"), [(3, -1.0), (4, math.nan)])
def test_no_interval_below_two_seeds(seed: int, mean: float) -> None:
    result = paired(by_seed({3: 1.0}), by_seed({seed: 2.0}))
    assert result == pytest.approx((mean, math.nan, math.nan, math.nan, Paired(mean).verdict), nan_ok=True)
    assert "2 seeds" in result.verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.3, -0.2, -0.25], "better"),
        ([0.3, 0.2, 0.25], "worse"),
        ([-0.3, 0.2, 0.25], "no difference shown"),
        ([0.0, 0.0, 0.0], "no difference shown"),
    ],
)
def test_words_need_an_interval_without_zero(differences: list[float], verdict: str) -> None:
    result = paired(pd.Series(differences), pd.Series([0.0, 0.0, 0.0]))
    assert result.verdict == verdict
    assert (result.low > 0 or result.high < 0) == (verdict in ("better", "worse"))
