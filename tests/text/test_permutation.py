"""A computed permutation: a bijection, in constant memory, and nothing to tell it from a drawn one."""

import math
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from moepp.text.permutation import Permutation
from tests.text.conftest import permuted


def keyed(n: int, seed: int = 0) -> Permutation:
    return Permutation(n, np.random.Generator(np.random.Philox(key=seed)))


@pytest.mark.parametrize("n", [*range(1, 20), 97, 256, 257, 1023, 1024, 4095, 4096, 65_537, 10**5 + 3])
def test_each_number_once(n: int) -> None:
    for seed in range(3):
        assert np.array_equal(np.sort(keyed(n, seed)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 1000, 3_906_250_001, 2**40 + 15, 2**62])
def test_it_is_that_of_the_oracle_in_whatever_pieces_one_asks(n: int) -> None:
    permutation = keyed(n, 7)
    keys = permutation.keys.flatten().tolist()
    rng = np.random.default_rng(0)
    indices = np.concatenate([[0, n - 1, n // 2], rng.integers(n, size=20)])
    expected = [permuted(int(index), n, keys) for index in indices]
    assert permutation(indices).tolist() == expected
    assert [int(permutation(indices[i : i + 1])[0]) for i in range(len(indices))] == expected
    assert permutation(indices).dtype == np.int64


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_are_equally_frequent(n: int) -> None:
    seen = Counter(tuple(keyed(n, seed)(np.arange(n)).tolist()) for seed in range(50 * math.factorial(n)))
    assert chisquare([seen[order] for order in permutations(range(n))]).pvalue > 0.001


@pytest.mark.parametrize("n", [29, 1009])
def test_places_and_distances_of_neighbours_are_uniform(n: int) -> None:
    orders = np.stack([keyed(n, seed)(np.arange(n)) for seed in range(1000)])
    for column in (0, 1, n // 2, n - 1):  # where one index goes
        assert chisquare(np.bincount(orders[:, column], minlength=n)).pvalue > 0.001
    for lag in (1, 2, math.isqrt(n) + 1):  # the last: R of the network is one more, L the same
        distances = (orders[:, lag:] - orders[:, :-lag]) % n
        assert chisquare(np.bincount(distances.flatten(), minlength=n)[1:]).pvalue > 0.001
        correlation = np.corrcoef(orders[:, lag:].flatten(), orders[:, :-lag].flatten())[0, 1]
        assert abs(correlation + 1 / (n - 1)) < 5 / math.sqrt(1000 * (n - lag))
    assert abs((orders == np.arange(n)).sum(1).mean() - 1) < 5 / math.sqrt(1000)  # fixed points are Poisson(1)


def test_many_windows_are_spread_evenly() -> None:
    n = 4 * 10**9
    places = keyed(n)(np.arange(100_000))
    assert len(set(places.tolist())) == 100_000
    assert chisquare(np.histogram(places, bins=100, range=(0, n))[0]).pvalue > 0.001
    assert chisquare(np.histogram(np.diff(places) % n, bins=100, range=(0, n))[0]).pvalue > 0.001


def test_another_key_is_another_order() -> None:
    first, second = keyed(10_000, 0)(np.arange(10_000)), keyed(10_000, 1)(np.arange(10_000))
    assert (first == second).sum() < 10  # Poisson(1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_memory_is_constant() -> None:
    tracemalloc.start()
    for n in (10**3, 4 * 10**9, 2**62):  # a permutation that is held takes 32 GB for the second
        keyed(n)(np.arange(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
