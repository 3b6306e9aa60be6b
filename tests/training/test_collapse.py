"""The warning of a collapsed router: after a while, and once as long as it lasts."""

from dataclasses import replace

import torch

from moepp.model import MoEConfig
from moepp.training.collapse import PATIENCE, watch

MOE = MoEConfig(n_ffn=2, n_zero=1, n_copy=1, n_const=2, top_k=2)
EVEN = torch.tensor([[30.0, 30, 40, 40, 30, 30]] * 3)  # of 100 tokens, in three layers


def changed(layer: int, counts: list[float]) -> torch.Tensor:
    counts_LE = EVEN.clone()
    counts_LE[layer] = torch.tensor(counts)
    return counts_LE


def said(*looks_LE: torch.Tensor, moe: MoEConfig = MOE) -> list[list[str]]:
    """What is warned of at each of these looks at 100 tokens."""
    looks: dict[str, int] = {}
    lines = []
    for counts_LE in looks_LE:
        looks, now = watch(looks, counts_LE, 100, moe)
        lines.append(now)
    return lines


def test_an_even_router_is_not_warned_of() -> None:
    assert not any(said(*[EVEN] * 3 * PATIENCE))


def test_a_kind_without_tokens_is_warned_of_once() -> None:
    lines = said(*[changed(1, [60.0, 60, 40, 40, 0, 0])] * 3 * PATIENCE)
    assert [len(now) for now in lines] == [0] * (PATIENCE - 1) + [2] + [0] * (2 * PATIENCE)
    assert "no token takes a copy expert in layer 2" in lines[PATIENCE - 1][0]
    assert "no token takes a zero expert in layer 2" in lines[PATIENCE - 1][1]
    assert "balance_weight" in lines[PATIENCE - 1][0]


def test_a_layer_without_ffn_experts_is_what_a_budget_of_the_whole_model_may_come_to() -> None:
    without = changed(1, [0.0, 0, 50, 50, 50, 50])
    assert "no token takes an ffn expert" in said(*[without] * PATIENCE)[-1][0]
    for budget_over, warned in (("model", False), ("layer", True)):
        moe = replace(MOE, ffn_budget=0.4, budget_over=budget_over)
        assert any(said(*[without] * PATIENCE, moe=moe)) == warned


def test_one_expert_with_nearly_all_tokens() -> None:
    *before, (line,) = said(*[changed(2, [20.0, 95, 20, 25, 20, 20])] * PATIENCE)
    assert not any(before)
    assert "expert 1 of layer 3 takes 95% of the tokens" in line


def test_in_between_it_starts_over() -> None:
    empty = changed(0, [60.0, 60, 40, 40, 0, 0])
    assert not any(said(*[*[empty] * (PATIENCE - 1), EVEN] * 2))


def test_where_every_expert_takes_every_token_nothing_has_collapsed() -> None:
    dense = MoEConfig(n_ffn=1, n_zero=0, n_copy=0, n_const=0, top_k=1, gating_residual=False)
    assert not any(said(*[torch.tensor([[100.0]])] * 2 * PATIENCE, moe=dense))
