"""Load balance against values worked out term by term (tests/model/reference/balance_cases.json)."""

import json
from pathlib import Path

import pytest
import torch

from moepp.model import MoEConfig
from moepp.model.balance import count_assignments, load_balance_loss, shares, within_capacity

CASES = json.loads((Path(__file__).parent / "reference" / "balance_cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_reference_cases(case: dict) -> None:
    moe = MoEConfig(
        n_ffn=case["n_ffn"],
        n_const=case["n_zero_computation"],
        n_zero=0,
        n_copy=0,
        top_k=case["top_k"],
        tau=case["tau"],
        capacity_factor=case["capacity_factor"],
    )
    logits = torch.tensor(case["logits"], dtype=torch.float64)
    experts = logits.topk(moe.top_k).indices
    assert count_assignments(experts, moe.n_experts).tolist() == case["selected_per_expert"]
    f = shares(count_assignments(experts, moe.n_experts).double(), moe)
    loss = load_balance_loss(logits.softmax(-1), f, moe)
    assert loss.item() == pytest.approx(case["load_balance_loss"], rel=1e-6)
    loss32 = load_balance_loss(logits.float().softmax(-1), f.float(), moe)
    assert loss32.item() == pytest.approx(case["load_balance_loss"], rel=1e-6)
    assert moe.capacities(len(logits)) == pytest.approx((case["capacity_ffn"], case["capacity_zero_computation"]))
    assert moe.ffn_share == pytest.approx(case["expected_ffn_share"])


def test_gradient_flows_through_probabilities_alone() -> None:
    """dL/dP_i = η_i f_i / T for every token."""
    moe = MoEConfig(n_ffn=2, n_zero=1, n_copy=0, n_const=0, top_k=1, tau=0.5)
    probs = torch.full((4, 3), 1 / 3, requires_grad=True)
    load_balance_loss(probs, torch.tensor([0.5, 0.25, 0.25]), moe).backward()
    assert probs.grad.tolist() == [pytest.approx([0.5 / 4, 0.25 / 4, 0.5 * 0.25 / 4])] * 4


def test_capacity_serves_earlier_positions_of_all_sequences_first() -> None:
    moe = MoEConfig(n_ffn=1, n_zero=1, n_copy=0, n_const=0, top_k=1, tau=1.0, capacity_factor=1.0)
    experts = torch.zeros(2, 3, 1, dtype=torch.long)  # 2 sequences, 3 positions, all on expert 0, room for 3
    assert within_capacity(experts, moe).squeeze(-1).tolist() == [[True, True, False], [True, False, False]]


def test_capacity_is_floored_and_exact_per_expert() -> None:
    moe = MoEConfig(n_ffn=3, n_zero=1, n_copy=1, n_const=1, top_k=2, tau=0.3, capacity_factor=0.9)
    experts = torch.rand(4, 50, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices
    kept = within_capacity(experts, moe)
    wanted = count_assignments(experts.flatten(0, 1), 6)
    granted = torch.stack([(kept & (experts == i)).sum() for i in range(6)])
    ffn, zero_computation = moe.capacities(200)
    room = torch.tensor([int(ffn)] * 3 + [int(zero_computation)] * 3)
    assert torch.equal(granted, torch.minimum(wanted, room))
    assert (wanted > room).any()
