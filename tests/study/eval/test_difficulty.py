"""The fourth finding's second half, on counts made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from moepp.model import MoEConfig
from moepp.study.eval.difficulty import correlate, difficulty, score_of
from moepp.study.figures.findings import Bootstrap
from moepp.study.figures.routing_stats import DocumentPassages, RoutingCounts

MOE = MoEConfig(n_ffn=2, n_zero=1, n_copy=0, n_const=0, top_k=1)


def measured(zero_of_20: dict[str, int]) -> Bootstrap:
    """One layer, two documents a task, and so many of 20 choices that are the zero expert, 2."""
    counts = RoutingCounts(MOE, 1, ["a"], DocumentPassages(dict.fromkeys(zero_of_20, 2)))
    for task, n in zero_of_20.items():
        for document in range(2):
            experts = np.array([2] * n + [0] * (20 - n)).reshape(2, 10)[document].reshape(10, 1, 1)
            counts.add((task, document), np.zeros(10, int), np.full(10, -1), experts)
    return Bootstrap(counts)


def test_the_correlation_is_of_ranks() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    found = correlate(x, np.exp(y))
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.low < found.value < found.high


def test_the_interval_covers_what_it_should() -> None:
    """In 95 % of draws of nine tasks from two normals whose rank correlation is known: 6/π asin(ρ/2)."""
    rng = np.random.default_rng(0)
    rho, draws = 0.6, 1000
    truth = 6 / np.pi * np.arcsin(rho / 2)
    x, e = rng.normal(size=(2, draws, 9))
    y = rho * x + np.sqrt(1 - rho**2) * e
    covers = [found.low < truth < found.high for found in map(correlate, x, y)]
    assert 0.94 < np.mean(covers) < 0.975


def test_a_perfect_order_of_few_tasks_is_no_proof() -> None:
    four, nine = (correlate(np.arange(n), np.arange(n)) for n in (4, 9))
    assert four.value == nine.value == pytest.approx(1)
    assert four.low < 0 < 0.8 < nine.low
    assert np.isnan(correlate(np.arange(3), np.arange(3)).value)
    assert np.isnan(correlate(np.arange(9), np.zeros(9)).value)


def test_scores_are_read_by_lm_evals_names() -> None:
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7, "alias": "x"}
    assert score_of(results, "accuracy") == 0.5
    assert score_of({"exact_match,strict": 0.25, "exact_match,flexible": 0.5}, "accuracy") == 0.25
    assert score_of({"bits_per_byte,none": 1.5}, "bits per byte") == 1.5
    assert np.isnan(score_of(results, "bits per byte"))


def test_easier_tasks_by_either_score() -> None:
    shares = {f"task{i}": 2 * i for i in range(8)}
    results: dict[str, dict[str, Any]] = {f"task{i}": {"acc,none": 0.1 * i} for i in range(8)}
    ((finding,), (picture,), missing) = difficulty(results, measured(shares))
    assert (finding.number, finding.holds, missing) == (4, "yes", {})
    assert float(finding.estimate.value) == pytest.approx(1)
    table, sentence, _ = picture.draw(measured(shares))
    assert table["zero_share"].tolist() == pytest.approx([0.1 * i for i in range(8)])
    assert "Over 8 tasks accuracy" in sentence
    results = {f"task{i}": {"bits_per_byte,none": 0.1 * i} for i in range(8)}  # more bits, harder
    ((finding,), _, _) = difficulty(results, measured(shares))
    assert finding.holds == "no"


def test_too_few_tasks_cannot_tell_and_say_so() -> None:
    shares = {"a": 1, "b": 2, "c": 3, "d": 4}
    results = {task: {"acc,none": n / 10} for task, n in shares.items()} | {"d": {"perplexity,none": 2.0}}
    ((finding,), pictures, missing) = difficulty(results, measured(shares))
    assert (finding.holds, pictures) == ("cannot tell", [])
    assert missing == {"finding4_accuracy": "3 tasks have accuracy, and a correlation over tasks needs 4"}


def test_vanilla_has_no_zero_experts_to_take() -> None:
    vanilla = SimpleNamespace(counts=SimpleNamespace(kinds={"ffn": slice(0, 2)}))
    assert difficulty({}, vanilla) == ([], [], {})  # type: ignore[arg-type]
