"""A budget of FFN experts: margins, quantiles, and what may not change by it."""

import pytest
import torch

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.model.budget import Budget, margins
from moepp.model.router import Router, Routing

SIZES = TransformerConfig(50, 2, 32, 48, 2, context_length=32)
KINDS = [  # (n_ffn, n_zero, n_copy, n_const, top_k), and the fewest and most FFN experts
    ((8, 1, 1, 2, 2), (0, 2)),
    ((4, 1, 0, 0, 2), (1, 2)),  # one zero expert: an FFN expert is always left
    ((1, 1, 1, 1, 3), (0, 1)),
    ((2, 1, 1, 0, 3), (1, 2)),
    ((3, 2, 2, 2, 1), (0, 1)),
]


def config(kinds: tuple[int, ...], **more: object) -> MoEConfig:
    return MoEConfig(*kinds, **more)  # type: ignore[arg-type]


def step(budget: Budget, routings: list[Routing], ffn_per_token: float = 1.2) -> None:
    budget.observe(routings)
    budget.step(ffn_per_token, lambda figures: figures)


@pytest.mark.parametrize(("kinds", "extremes"), KINDS)
def test_a_bias_leaves_the_ffn_experts_whose_margin_is_above_it(
    kinds: tuple[int, ...], extremes: tuple[int, int]
) -> None:
    moe = config(kinds)
    assert moe.ffn_range == extremes
    scores_TE = torch.randn(200, moe.n_experts, generator=torch.Generator().manual_seed(0))
    margins_TJ = margins(scores_TE, moe)
    assert margins_TJ.shape == (200, extremes[1] - extremes[0])
    for bias in (-30.0, -1.0, 0.0, 0.7, 30.0):
        biased_TE = scores_TE.clone()
        biased_TE[:, moe.n_ffn :] += bias
        n_ffn_T = (biased_TE.topk(moe.top_k).indices < moe.n_ffn).sum(1)
        assert torch.equal(n_ffn_T, extremes[0] + (margins_TJ > bias).sum(1))


@pytest.mark.parametrize(("kinds", "extremes"), KINDS)
@pytest.mark.parametrize("over", ["model", "layer"])
def test_a_budget_is_spent_on_the_tokens_it_was_taken_from(
    kinds: tuple[int, ...], extremes: tuple[int, int], over: str
) -> None:
    torch.manual_seed(0)
    fewest, most = extremes
    for share in (0.1, 0.5, 0.95):
        aim = fewest + share * (most - fewest)
        model = Transformer(SIZES, config(kinds, ffn_budget=aim, budget_over=over)).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.moe.router.weights[0].normal_()  # as unequal as after training
        tokens = torch.randint(50, (32, 32))
        for _ in range(3):  # a layer's tokens depend on the biases of the layers before
            step(model.budget, model.hidden(tokens)[1], aim)
            model.budget.debt_2X.zero_()  # nothing of the first batches is to be repaid
            model.set_ffn_budget(aim)
        spent_L = torch.tensor([float(r.computed().sum(1).float().mean()) for r in model.hidden(tokens)[1]])
        assert spent_L.mean() == pytest.approx(aim, abs=0.02 * (most - fewest))
        if over == "layer":
            assert spent_L.tolist() == pytest.approx([aim, aim], abs=0.04 * (most - fewest))


def test_debts_are_repaid_in_training_and_evaluation_knows_their_average() -> None:
    """Margins that are all shifted by as much in every step, so that quantiles of the past are always behind."""
    moe = MoEConfig(ffn_budget=1.2)
    router = Router(16, moe)
    budget = Budget(moe, [router])
    generator = torch.Generator().manual_seed(0)
    spent, evaluated = [], []
    for n in range(200):
        scores_TE = torch.randn(4096, 12, generator=generator)
        scores_TE[:, :8] += 0.02 * n
        for kept, bias in zip((spent, evaluated), router.choice_bias, strict=True):
            experts_TK = router.choose(router.biased(scores_TE, bias))
            kept.append(float((experts_TK < 8).sum(1).float().mean()))
            if kept is spent:
                routing = Routing(scores_TE, experts_TK, torch.ones(experts_TK.shape), scores_TE, None, moe)
        step(budget, [routing])
        budget.spend(1.2)
    assert sum(spent[50:100]) / 50 == pytest.approx(1.2, rel=0.002)
    assert sum(spent[150:]) / 50 == pytest.approx(1.2, rel=0.002)
    assert sum(evaluated[150:]) / 50 == pytest.approx(1.2, rel=0.01)


def test_calibrated_it_is_spent_on_all_that_was_observed_however_unlike_its_parts_are() -> None:
    """An average of the parts' quantiles is off by far; so are debts of before. Two devices are as one."""
    moe = MoEConfig(ffn_budget=0.2)
    shifts = (-2.0, -1.0, 0.0, 3.0)
    parts = [torch.randn(4096, 12, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    for scores_TE, shift in zip(parts, shifts, strict=True):
        scores_TE[:, :8] += shift - 2

    def spent(budget: Budget) -> float:
        budget.spend(0.2)
        (router,) = budget.routers
        experts_NTK = torch.stack([router.choose(router.biased(part, router.choice_bias[1])) for part in parts])
        return float((experts_NTK < 8).sum(-1).float().mean())

    averaged, pooled, *two = (Budget(moe, [Router(16, moe)]) for _ in range(4))
    for scores_TE in parts:
        step(averaged, [routing_of(scores_TE, moe)], 0.2)
        pooled.observe([routing_of(scores_TE, moe)])
    averaged.debt_2X.zero_()
    assert abs(spent(averaged) / 0.2 - 1) > 0.2
    pooled.debt_2X.fill_(0.5)
    pooled.calibrate(lambda quantiles: quantiles)
    assert spent(pooled) == pytest.approx(0.2, rel=0.02)
    for budget, some in zip(two, (parts[:2], parts[2:]), strict=True):
        for scores_TE in some:
            budget.observe([routing_of(scores_TE, moe)])
    both = torch.stack([torch.stack(budget.pending)[..., :-1] for budget in two])
    two[0].calibrate(lambda quantiles: both)
    assert torch.equal(two[0].quantiles_XQ, pooled.quantiles_XQ)
    assert not pooled.pending


def test_gates_know_nothing_of_it() -> None:
    torch.manual_seed(0)
    moe = MoEConfig(ffn_budget=1.2)
    router = Router(16, moe)
    torch.nn.init.normal_(router.weights[0])
    router.choice_bias.fill_(1.5)
    routing = router(torch.randn(1, 64, 16))
    chosen_TK = routing.scores.gather(1, routing.experts)
    assert torch.equal(routing.scores, routing.logits)
    is_zero_TK = routing.experts == moe.n_experts - 1
    expected_TK = chosen_TK.exp().masked_fill(is_zero_TK, 0)
    expected_TK = expected_TK / expected_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.gates, expected_TK)
    plain_T = (routing.logits.topk(2).indices < 8).sum(1)
    assert (routing.computed().sum(1) <= plain_T).all()
    assert routing.computed().sum() < plain_T.sum()


def test_the_average_forgets_and_leaves_out_what_is_not_finite() -> None:
    moe = MoEConfig(ffn_budget=1.2)
    budget = Budget(moe, [Router(16, moe)])
    scores = [torch.randn(64, 12) + shift * torch.eye(12)[0] for shift in range(30)]
    for n, scores_TE in enumerate(scores, 1):
        step(budget, [routing_of(scores_TE, moe)])
        if n == 3:  # the first steps count alike
            each = [torch.quantile(margins(s, moe).flatten(), torch.linspace(0, 1, 129)) for s in scores[:3]]
            torch.testing.assert_close(budget.quantiles_XQ[0], torch.stack(each).mean(0))
    before = budget.quantiles_XQ.clone()
    step(budget, [routing_of(torch.full((64, 12), torch.nan), moe)])
    assert torch.equal(budget.quantiles_XQ, before)
    assert budget.seen == 30


def routing_of(scores_TE: torch.Tensor, moe: MoEConfig) -> Routing:
    experts_TK = scores_TE.topk(moe.top_k).indices
    return Routing(scores_TE, experts_TK, torch.ones(experts_TK.shape), scores_TE, None, moe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_in_the_dtype_of_its_model(dtype: torch.dtype) -> None:
    model = Transformer(SIZES, MoEConfig(ffn_budget=1.2)).to(dtype)
    step(model.budget, model.hidden(torch.randint(50, (4, 32)))[1])
    model.set_ffn_budget(0.9)
    assert all(value.dtype == dtype for name, value in model.state_dict().items() if name != "budget.seen")


def test_evaluation_leaves_it_as_it_is() -> None:
    model = Transformer(SIZES, MoEConfig(ffn_budget=1.2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randint(50, (2, 32)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {"budget.quantiles_XQ", "budget.seen", "blocks.0.moe.router.choice_bias"} <= set(before)


def test_what_no_choice_can_spend_is_refused() -> None:
    for kinds, budget in (((8, 1, 1, 2, 2), 2.0), ((8, 1, 1, 2, 2), 0.0), ((4, 1, 0, 0, 2), 0.9)):
        with pytest.raises(InputError, match=r"moe\.ffn_budget: must be above \d and below \d, got"):
            config(kinds, ffn_budget=budget)
    with pytest.raises(InputError, match=r"moe\.ffn_budget: needs zero-computation experts"):
        config((8, 0, 0, 0, 2), ffn_budget=1.5)
    with pytest.raises(InputError, match="only what was trained with one"):
        Transformer(SIZES, MoEConfig()).set_ffn_budget(1.0)
