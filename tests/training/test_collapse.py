"""The warning of a collapsed router: after a while, and once."""

import torch

from moepp.model import MoEConfig
from moepp.training.collapse import PATIENCE, CollapseWatch

MOE = MoEConfig(n_ffn=2, n_zero=1, n_copy=1, n_const=2, top_k=2)
EVEN = torch.tensor([[30.0, 30, 40, 40, 30, 30]] * 3)  # of 100 tokens, in three layers


def changed(layer: int, counts: list[float]) -> torch.Tensor:
    counts_LE = EVEN.clone()
    counts_LE[layer] = torch.tensor(counts)
    return counts_LE


def test_an_even_router_is_not_warned_of() -> None:
    watch = CollapseWatch()
    assert not any(watch.look(EVEN, 100, MOE) for _ in range(3 * PATIENCE))


def test_a_kind_without_tokens_is_warned_of_once() -> None:
    watch = CollapseWatch()
    empty = changed(1, [60.0, 60, 40, 40, 0, 0])
    said = [watch.look(empty, 100, MOE) for _ in range(3 * PATIENCE)]
    assert [len(lines) for lines in said] == [0] * (PATIENCE - 1) + [2] + [0] * (2 * PATIENCE)
    assert "no token takes a copy expert in layer 2" in said[PATIENCE - 1][0]
    assert "no token takes a zero expert in layer 2" in said[PATIENCE - 1][1]
    assert "balance_weight" in said[PATIENCE - 1][0]


def test_one_expert_with_nearly_all_tokens() -> None:
    watch = CollapseWatch()
    greedy = changed(2, [20.0, 95, 20, 25, 20, 20])
    said = [line for _ in range(PATIENCE) for line in watch.look(greedy, 100, MOE)]
    assert len(said) == 1
    assert "expert 1 of layer 3 takes 95% of the tokens" in said[0]


def test_in_between_it_starts_over() -> None:
    watch = CollapseWatch()
    empty = changed(0, [60.0, 60, 40, 40, 0, 0])
    for _ in range(2):
        assert not any(watch.look(empty, 100, MOE) for _ in range(PATIENCE - 1))
        assert not watch.look(EVEN, 100, MOE)


def test_where_every_expert_takes_every_token_nothing_has_collapsed() -> None:
    dense = MoEConfig(n_ffn=1, n_zero=0, n_copy=0, n_const=0, top_k=1, gating_residual=False)
    watch = CollapseWatch()
    assert not any(watch.look(torch.tensor([[100.0]]), 100, dense) for _ in range(2 * PATIENCE))
