"""Statistics against values worked out by hand."""

import math

import pytest

from moepp.study.compare.stats import Paired, mean_sd, paired


def test_paired_interval_and_p_by_hand() -> None:
    """Differences −0.1, −0.2, −0.3: mean −0.2, s.d. 0.1, standard error 0.1/√3; t(0.975, 2) = 4.302653.

    For two degrees of freedom the two-sided p of t is 1 − |t| / √(t² + 2).
    """
    reference = {0: 3.0, 1: 3.5, 2: 2.0}
    variant = {0: 2.9, 1: 3.3, 2: 1.7}
    result = paired(variant, reference)
    half = 4.302653 * 0.1 / math.sqrt(3)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert result.n == 3
    assert result.mean == pytest.approx(-0.2)
    assert (result.low, result.high) == (
        pytest.approx(-0.2 - half, abs=1e-6),
        pytest.approx(-0.2 + half, abs=1e-6),
    )
    assert result.p == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-6)
    assert result.p == pytest.approx(0.0742, abs=1e-4)
    assert result.verdict == "no difference shown"  # the interval reaches above zero


def test_only_common_seeds_are_paired() -> None:
    result = paired({0: 1.0, 1: 2.0, 7: 100.0}, {0: 2.0, 1: 4.0, 5: -100.0})
    assert (result.n, result.mean) == (2, -1.5)
    # one degree of freedom: t(0.975, 1) = 12.7062, standard error 0.5
    assert result.high == pytest.approx(-1.5 + 12.7062 * 0.5, abs=1e-4)


def test_no_interval_below_two_seeds() -> None:
    one = paired({3: 1.0}, {3: 2.0})
    assert (one.n, one.mean) == (1, -1.0)
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert "2 seeds" in one.verdict
    none = paired({0: 1.0}, {1: 1.0})
    assert none.n == 0
    assert math.isnan(none.mean)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.3, -0.1, "better"),
        (0.1, 0.3, "worse"),
        (-0.1, 0.1, "no difference shown"),
        (-0.1, 0.0, "no difference shown"),
    ],
)
def test_words_need_an_interval_without_zero(low: float, high: float, verdict: str) -> None:
    assert Paired(3, (low + high) / 2, low, high, 0.5).verdict == verdict


def test_mean_sd() -> None:
    assert mean_sd([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_sd([5.0])[0] == 5.0
    assert math.isnan(mean_sd([5.0])[1])
