"""What is counted, against naive loops; intervals, verdicts, and kinds of experts in the pathway."""

import numpy as np
import pytest

from moepp.model import MoEConfig
from moepp.study.figures.finding_figures import pathway
from moepp.study.figures.findings import Bootstrap, Estimate, Finding
from moepp.study.figures.parts_of_speech import (
    CLASSES,
    NONE,
)
from moepp.study.figures.routing_stats import (
    MOST_PASSAGES,
    SCORE_BINS,
    Passages,
    RoutingCounts,
    Sums,
    moments,
)
from moepp.study.style import KIND_COLOURS


def test_counts_are_those_of_a_naive_loop() -> None:
    moe, L, V, B, S = MoEConfig(n_ffn=3, n_const=2), 3, 11, 4, 6
    rng = np.random.default_rng(0)
    counts = RoutingCounts(moe, L, [""] * V)
    seen = []  # (domain, token, class, experts of each layer) of every token
    for _ in range(3):
        domains = [str(name) for name in rng.choice(["a", "b"], B)]
        experts = np.array([[[rng.permutation(7)[:2] for _ in range(L)] for _ in range(S)] for _ in range(B)])
        tokens, classes = rng.integers(V, size=(B, S)), rng.integers(NONE, len(CLASSES), (B, S))
        lengths = rng.integers(1, S + 1, B)
        for b, n in enumerate(lengths):
            counts.add(domains[b], tokens[b, :n], classes[b, :n], experts[b, :n])
            seen += [(domains[b], tokens[b, s], classes[b, s], experts[b, s].tolist()) for s in range(n)]

    def kind(e: int) -> int:
        return 0 if e < 3 else 1 if e < 5 else 2 if e < 6 else 3

    def ffn(choices: list[int]) -> int:
        return sum(e < 3 for e in choices)

    sums = Bootstrap(counts).sums
    names = list(counts.passages.sums)
    for d, name in enumerate(names):
        mine = [experts for domain, _, _, experts in seen if domain == name]
        assert sums.n_D[d] == len(mine)
        for layer in range(L):
            mean = np.mean([ffn(experts[layer]) for experts in mine])
            assert sums.ffn_DL[d, layer] == pytest.approx(mean)
            for e in range(7):
                assert sums.chosen_DLE[d, layer, e] == sum(e in experts[layer] for experts in mine)
        const = np.mean([[e in experts[layer] for e in (3, 4) for layer in range(L)] for experts in mine])
        assert sums.activations()[d, 1] == pytest.approx(const)
    loads = np.array([[ffn(choices) for choices in experts] for *_, experts in seen])
    assert sums.correlation() == pytest.approx(np.corrcoef(loads.T))
    assert sums.adjacent_correlation() == pytest.approx((np.corrcoef(loads.T)[[0, 1], [1, 2]]).mean())
    assert sums.spread() == pytest.approx(np.var([sums.ffn_DL[0].mean(), sums.ffn_DL[1].mean()], ddof=1))
    first, between, last = (np.var(sums.ffn_DL[:, layer], ddof=1) for layer in range(L))
    assert sums.outer_excess() == pytest.approx(min(first, last) - between)
    for c in range(len(CLASSES)):
        of_class = [load.mean() for load, (_, _, its, _) in zip(loads, seen, strict=True) if its == c]
        assert sums.class_n_DC[:, c].sum() == len(of_class)
        assert not of_class or sums.ffn_by_class()[c] == pytest.approx(np.mean(of_class))
    for token in range(V):
        of_token = [load.sum() for load, (_, its, _, _) in zip(loads, seen, strict=True) if its == token]
        assert counts.token_n[token] == len(of_token)
        assert counts.token_ffn[token] == sum(of_token)
        assert counts.token_ffn_squared[token] == sum(n * n for n in of_token)
    flow = np.zeros((L - 1, 4, 4))
    for *_, experts in seen:
        for layer in range(L - 1):
            for e in experts[layer]:
                for following in experts[layer + 1]:
                    flow[layer, kind(e), kind(following)] += 1
    assert (counts.flow_Lkk == flow).all()
    p = [sums.chosen_DLE[d, 0] / sums.chosen_DLE[d, 0].sum() for d in range(2)]
    kl = [np.sum(q * np.log2(q / np.mean(p, 0))) for q in p]  # Jensen–Shannon by its definition
    assert sums.divergence_by_layer()[0] == pytest.approx(np.mean(kl))


def test_scores_are_those_of_a_naive_loop() -> None:
    values = np.random.default_rng(0).random((50, 2, 2)).astype(np.float32)
    counts = RoutingCounts(MoEConfig(), 2, [""])
    for part in (values[:20], values[20:]):
        counts.add_scores("it", part)
    for rank in range(2):
        mine = values[:, :, rank].astype(np.float64)
        found = list(moments(counts.scores_LRX["it"].sum(0)[rank]).values())
        assert found == pytest.approx([mine.mean(), mine.var(), mine.min(), mine.max()], abs=1 / SCORE_BINS)
        assert found[1] == pytest.approx(mine.var(), rel=1e-3)
    expected, _ = np.histogram(values[:, 1, 0], SCORE_BINS, (0, 1))
    assert (counts.scores_LRX["it"][1, 0] == expected).all()


def test_passages_are_consecutive_and_few_however_long_the_text() -> None:
    passages = Passages()
    for i in range(1000):
        passages.add("long", np.array([1, i]))
        if i % 4 == 0:
            passages.add("short", np.array([1, 0]))
    assert passages.windows == 8
    assert MOST_PASSAGES / 2 < len(passages.sums["long"]) <= MOST_PASSAGES
    assert [n for n, _ in passages.sums["long"]] == [8] * 125
    assert passages.sums["long"][3][1] == sum(range(24, 32))
    assert [n for n, _ in passages.sums["short"]] == [8] * 31 + [2]


def counted(rates: list[float], n_windows: int, seed: int) -> Bootstrap:
    """Two layers, an FFN and a zero expert, one choice: in domain d a token takes the FFN expert at rates[d]."""
    rng = np.random.default_rng(seed)
    counts = RoutingCounts(MoEConfig(n_ffn=1, n_const=0, n_copy=0, top_k=1), 2, ["a", "b"])
    for d, rate in enumerate(rates):
        experts = (rng.random((n_windows, 16, 2, 1)) > rate).astype(int)
        for experts_SLK in experts:
            counts.add(str(d), np.zeros(16, int), np.full(16, NONE), experts_SLK)
    return Bootstrap(counts)


def test_chance_is_no_finding_and_a_difference_is_one() -> None:
    alike = [counted([0.5] * 4, 16, seed).estimate(Sums.spread) for seed in range(20)]
    assert sum(estimate.low > 0 for estimate in alike) <= 2
    apart = counted([0.3, 0.4, 0.5, 0.6], 40, seed=0)
    for statistic, truth in ((Sums.spread, np.var([0.3, 0.4, 0.5, 0.6], ddof=1)), (Sums.zero_excess, 0.1)):
        estimate = apart.estimate(statistic)
        assert 0 < estimate.low < truth < estimate.high
    above, plain = apart.above_chance(Sums.divergence), apart.estimate(Sums.divergence)
    assert apart.chance(Sums.divergence) < above.low < above.value < plain.value
    few = counted([0.3, 0.6], 5, seed=0)
    assert few.too_short == ["0", "1"]
    assert np.isnan(few.estimate(Sums.spread).low)


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.1, 0.3, "yes"), (-0.3, -0.1, "no"), (-0.1, 0.1, "cannot tell"), (np.nan, np.nan, "cannot tell")],
)
def test_a_verdict_takes_sides_where_the_interval_does(low: float, high: float, holds: str) -> None:
    estimate = Estimate(*(np.array(x) for x in ((low + high) / 2, low, high)))
    assert Finding(1, "", "", estimate, 0.0).holds == holds


@pytest.mark.parametrize(("high", "holds"), [(0.1, "no"), (0.3, "cannot tell")])
def test_a_difference_that_would_count_is_not_denied_for_want_of_text(high: float, holds: str) -> None:
    """Below what shuffled text reaches (0.5), but not below what would count (0.2)."""
    estimate = Estimate(*(np.array(x) for x in (0.05, 0.0, high)))
    assert Finding(3, "", "", estimate, 0.2, chance=0.5).holds == holds


def test_a_kind_that_the_first_layer_does_not_use_stays_in_the_pathway() -> None:
    counts = RoutingCounts(MoEConfig(n_ffn=2, n_const=0), 3, ["a", "b"])  # experts 0 and 1, copy 2, zero 3
    experts = np.tile([[0, 1], [0, 3], [1, 2]], (16, 1, 1))
    counts.add("a", np.zeros(16, int), np.full(16, NONE), experts)
    table, _, _ = pathway.draw(Bootstrap(counts))
    assert [*zip(table["layer"], table["from"], table["to"], strict=True)] == (
        [(layer, a, b) for layer in (1, 2) for a in ("ffn", "copy", "zero") for b in ("ffn", "copy", "zero")]
    )
    assert table.groupby("layer")["share_of_choices"].sum().tolist() == pytest.approx([1, 1])
    of_layer_2 = table[(table["layer"] == 2) & (table["from"] == "zero")].set_index("to")
    assert of_layer_2["share_of_choices"].to_dict() == {"ffn": 0.25, "copy": 0.25, "zero": 0}


def test_kinds_differ_in_brightness_too() -> None:
    """So that they can be told apart without any colour vision."""
    rgb = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in KIND_COLOURS.values()]
    brightness = sorted(np.array(rgb) @ [0.2126, 0.7152, 0.0722])
    assert np.diff(brightness).min() > 10
