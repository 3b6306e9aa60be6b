"""The plan of the FFN experts' work against a search by hand, and how each back-end adds up a token's rows."""

import pytest
import torch

from moepp.model.looped import sum_by_token
from moepp.model.permute import gather_sum
from moepp.model.plan import Plan


def assignments(computed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(9, 2) experts out of six, and which of them are computed."""
    torch.manual_seed(0)
    experts_TK = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    return experts_TK, {"some": experts_TK < 4, "none": experts_TK < 0, "all": experts_TK < 6}[computed]


@pytest.mark.parametrize("surplus", [None, 0, 3])
@pytest.mark.parametrize("computed", ["some", "none", "all"])
def test_whose_rows_are_whose(computed: str, surplus: int | None) -> None:
    """`surplus`: rows that the device has beyond those that are computed; None where the host counts them."""
    experts_TK, computed_TK = assignments(computed)
    n_rows = int(computed_TK.sum())
    plan = Plan.of(experts_TK, computed_TK, 6, None if surplus is None else n_rows + surplus)
    assert len(plan.token_R) == (n_rows if surplus is None else min(18, max(1, n_rows + surplus)))
    expected = [
        (t, k) for e in range(6) for t in range(9) for k in range(2) if computed_TK[t, k] and experts_TK[t, k] == e
    ]
    rows = zip(plan.token_R.tolist(), (plan.assignment_R % 2).tolist(), strict=True)
    assert list(rows)[:n_rows] == expected
    assert [int(plan.row_TK[t, k]) for t, k in expected] == list(range(n_rows))
    assert plan.row_TK[~computed_TK].eq(0).all()
    assert plan.count_F.tolist() == [int(((experts_TK == e) & computed_TK).sum()) for e in range(6)]
    values_RD, gates_TK = torch.full((len(plan.token_R), 3), float("nan")), torch.rand(9, 2)
    values_RD[:n_rows] = torch.randn(n_rows, 3)
    sums_TD, weighted_TD = torch.zeros(9, 3), torch.zeros(9, 3)
    for value_D, (t, k) in zip(values_RD, expected, strict=False):
        sums_TD[t] += value_D
        weighted_TD[t] += gates_TK[t, k] * value_D
    for add in (sum_by_token, gather_sum) if surplus is not None else (sum_by_token,):
        torch.testing.assert_close(add(plan, values_RD), sums_TD)
        torch.testing.assert_close(add(plan, values_RD, gates_TK), weighted_TD)


@pytest.mark.parametrize("computed", ["some", "none", "all"])
def test_rounded_up(computed: str) -> None:
    """Counts are multiples, the rows that tokens have stay in order, spare ones belong to nobody."""
    experts_TK, computed_TK = assignments(computed)
    exact = Plan.of(experts_TK, computed_TK, 6)
    plan = exact.rounded_up(4)
    assert plan.count_F.tolist() == [-(-n // 4) * 4 for n in exact.count_F.tolist()]
    assert len(plan.token_R) == plan.count_F.sum()
    rows, expected = (one.assignment_R.split(one.count_F.tolist()) for one in (plan, exact))
    for assignment_N, expected_N in zip(rows, expected, strict=True):
        assert torch.equal(assignment_N[: len(expected_N)], expected_N)
    assert plan.token_R.tolist() == (plan.assignment_R // 2).tolist()
    assert plan.assignment_R[plan.row_TK[computed_TK]].tolist() == computed_TK.flatten().nonzero()[:, 0].tolist()
    assert torch.equal(plan.computed_TK, computed_TK)
    values_RD = torch.full((len(plan.token_R), 3), float("nan"))
    values_RD[plan.row_TK[computed_TK]] = 1.0
    torch.testing.assert_close(sum_by_token(plan, values_RD)[:, 0], computed_TK.sum(1).float())
