"""A budget of FFN experts: margins, quantiles, and what may not change by it."""

import pytest
import torch

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.model.budget import QUANTILES, Budget
from moepp.model.margins import leave_one_out_bias, margins
from moepp.model.router import Router, Routing
from tests.conftest import assert_same

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
            model.set_ffn_budget(aim)
        spent_L = torch.tensor([float(r.computed().sum(1).float().mean()) for r in model.hidden(tokens)[1]])
        assert spent_L.mean() == pytest.approx(aim, abs=0.02 * (most - fewest))
        if over == "layer":
            assert spent_L.tolist() == pytest.approx([aim, aim], abs=0.04 * (most - fewest))


def test_each_sequence_goes_by_all_others_of_its_batch() -> None:
    """The others' FFN experts are the budget with its bias, and no token is chosen for by its own sequence."""
    torch.manual_seed(0)
    moe = MoEConfig(ffn_budget=0.7)
    router = Router(16, moe)
    torch.nn.init.normal_(router.weights[0])
    x_BSD = torch.randn(5, 64, 16)
    x_BSD[2] += 2  # one that is unlike the others
    before = router(x_BSD)
    bias_T1 = router.budget_bias(before.scores, 5)
    assert bias_T1.shape == (320, 1)
    bias_BS, scores_BSE = bias_T1.view(5, 64), before.scores.view(5, 64, 12)
    for i in range(5):
        assert len(bias_BS[i].unique()) == 1
        others_TE = torch.cat((scores_BSE[:i], scores_BSE[i + 1 :])).flatten(0, 1)
        chosen_TK = router.choose(router.biased(others_TE, bias_BS[i, 0]))
        assert (chosen_TK < 8).sum(1).float().mean() == pytest.approx(0.7, abs=1 / 256)
    x_BSD[0] += 3
    after = router(x_BSD)
    assert torch.equal(router.budget_bias(after.scores, 5)[:64], bias_T1[:64])
    assert not torch.equal(after.experts[64:], before.experts[64:])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("B", "S"), [(2, 1), (2, 7), (3, 16), (5, 2)])
def test_the_bias_is_the_nth_of_the_others_margins_with_ties_or_without(B: int, S: int, rounded: bool) -> None:
    for kinds, (fewest, most) in KINDS:
        moe = config(kinds)
        generator = torch.Generator().manual_seed(B)
        scores_TE = torch.randn(B * S, moe.n_experts, generator=generator, dtype=torch.float64)
        if rounded:
            scores_TE = (2 * scores_TE).round() / 2
        margins_BA = margins(scores_TE, moe).view(B, -1)
        for share in (0.0, 0.13, 0.47, 0.91, 1.0):
            ffn = torch.tensor(fewest + share * (most - fewest))
            bias_BS = leave_one_out_bias(scores_TE, B, ffn, moe).view(B, S)
            for i in range(B):
                others = sorted(margins_BA[torch.arange(B) != i].flatten().tolist())
                n = min(max(round((1 - share) * (len(others) + 1)), 1), len(others))
                assert bias_BS[i].tolist() == [others[n - 1]] * S


def test_what_batches_differ_by_cancels() -> None:
    """Sequences of very different margins: a bias for all of them is off by a fifth of the budget."""
    moe = MoEConfig(ffn_budget=0.2)
    router = Router(16, moe)
    generator = torch.Generator().manual_seed(0)
    spent: dict[str, list[float]] = {"one": [], "by the others": []}
    for _ in range(100):
        scores_BSE = torch.randn(16, 128, 12, generator=generator)
        scores_BSE[..., :8] += torch.randn(16, 1, 1, generator=generator) * 0.7 - 2
        scores_TE = scores_BSE.flatten(0, 1)
        for name, bias in (("one", torch.tensor(0.35)), ("by the others", router.budget_bias(scores_TE, 16))):
            chosen_TK = router.choose(router.biased(scores_TE, bias))
            spent[name].append(float((chosen_TK < 8).sum(1).float().mean()))
    mean = {name: sum(values) / len(values) / 0.2 for name, values in spent.items()}
    deviation = {name: torch.tensor(values).std() / 0.2 for name, values in spent.items()}
    assert deviation["one"] > 0.2
    assert deviation["by the others"] < 0.05
    assert mean["by the others"] == pytest.approx(1, rel=0.05)


def test_a_batch_of_one_sequence_goes_by_the_batches_before_and_repays_its_debts() -> None:
    """Margins that are all shifted by as much in every step, so that quantiles of the past are always behind."""
    moe = MoEConfig(ffn_budget=1.2)
    router = Router(16, moe)
    budget = Budget(moe, [router])
    generator = torch.Generator().manual_seed(0)
    spent = []
    for n in range(200):
        scores_TE = torch.randn(4096, 12, generator=generator)
        scores_TE[:, :8] += 0.02 * n
        bias = router.budget_bias(scores_TE, 1)
        assert bias is not None
        assert bias.dim() == 0
        routing = routing_of(scores_TE, moe, router.biased(scores_TE, bias))
        spent.append(float(routing.computed().sum(1).float().mean()))
        step(budget, [routing])
        budget.spend(1.2)
    assert sum(spent[50:100]) / 50 == pytest.approx(1.2, rel=0.002)
    assert sum(spent[150:]) / 50 == pytest.approx(1.2, rel=0.002)


@pytest.mark.parametrize("over", ["model", "layer"])
def test_layers_differ_as_they_like_where_the_model_has_the_budget(over: str) -> None:
    moe = MoEConfig(ffn_budget=1.2, budget_over=over)  # type: ignore[arg-type]
    budget = Budget(moe, [Router(16, moe) for _ in range(3)])
    budget.spend(1.2)
    assert [float(router.ffn_offset) for router in budget.routers] == pytest.approx(
        [0.0] * 3
    )  # nobody knows better
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(4096, 12, generator=generator) for _ in range(3)]
    for scores_TE, shift in zip(scores, (-1.0, 0.0, 1.0), strict=True):
        scores_TE[:, :8] += shift
    step(budget, [routing_of(scores_TE, moe) for scores_TE in scores])
    budget.debt_X.fill_(0.1)
    budget.spend(1.2)
    more = [float(router.ffn_offset) for router in budget.routers]
    assert sum(more) / 3 == pytest.approx(-0.08)  # of the debt 0.8 are repaid
    if over == "layer":
        assert more == pytest.approx([-0.08] * 3)
        return
    # as many as with the bias that all share
    bias = budget.routers[0].choice_bias
    assert bias is not None
    routings = [routing_of(s, moe, budget.routers[0].biased(s, bias[0])) for s in scores]
    assert [1.2 + n for n in more] == pytest.approx(
        [float(routing.computed().sum(1).float().mean()) for routing in routings], abs=0.02
    )
    assert more[2] - more[0] > 0.5


def test_calibrated_it_is_spent_on_all_that_was_observed_however_unlike_its_parts_are() -> None:
    """An average of the parts' quantiles is off by far. Two devices are as one."""
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
    assert abs(spent(averaged) / 0.2 - 1) > 0.2
    pooled.debt_X.fill_(0.5)
    pooled.calibrate()
    assert spent(pooled) == pytest.approx(0.2, rel=0.02)
    for budget, some in zip(two, (parts[:2], parts[2:]), strict=True):
        for scores_TE in some:
            budget.observe([routing_of(scores_TE, moe)])
    both = torch.stack([torch.stack(budget.pending)[..., :-1] for budget in two])
    two[0].calibrate(lambda quantiles: both)
    assert torch.equal(two[0].quantiles_LQ, pooled.quantiles_LQ)
    assert pooled.debt_X == 0
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
            each = [torch.quantile(margins(s, moe).flatten(), torch.linspace(0, 1, QUANTILES)) for s in scores[:3]]
            torch.testing.assert_close(budget.quantiles_LQ[0], torch.stack(each).mean(0))
    before = budget.quantiles_LQ.clone()
    step(budget, [routing_of(torch.full((64, 12), torch.nan), moe)])
    assert torch.equal(budget.quantiles_LQ, before)
    assert budget.steps == 30


def routing_of(scores_TE: torch.Tensor, moe: MoEConfig, biased_TE: torch.Tensor | None = None) -> Routing:
    experts_TK = (scores_TE if biased_TE is None else biased_TE).topk(moe.top_k).indices
    return Routing(scores_TE, experts_TK, torch.ones(experts_TK.shape), scores_TE, None, moe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_in_the_dtype_of_its_model(dtype: torch.dtype) -> None:
    model = Transformer(SIZES, MoEConfig(ffn_budget=1.2)).to(dtype)
    step(model.budget, model.hidden(torch.randint(50, (4, 32)))[1])
    model.set_ffn_budget(0.9)
    assert all(value.dtype == dtype for name, value in model.state_dict().items() if name != "budget.steps")


def test_evaluation_leaves_it_as_it_is() -> None:
    model = Transformer(SIZES, MoEConfig(ffn_budget=1.2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randint(50, (2, 32)))
    assert_same(model.state_dict(), before)
    assert {"budget.quantiles_LQ", "budget.steps", "blocks.0.moe.router.choice_bias"} <= set(before)


def test_what_no_choice_can_spend_is_refused() -> None:
    for kinds, budget in (((8, 1, 1, 2, 2), 2.0), ((8, 1, 1, 2, 2), 0.0), ((4, 1, 0, 0, 2), 0.9)):
        with pytest.raises(InputError, match=r"moe\.ffn_budget: must be above \d and below \d, got"):
            config(kinds, ffn_budget=budget)
    with pytest.raises(InputError, match=r"moe\.ffn_budget: needs zero-computation experts"):
        config((8, 0, 0, 0, 2), ffn_budget=1.5)
    with pytest.raises(InputError, match="only what was trained with one"):
        Transformer(SIZES, MoEConfig()).set_ffn_budget(1.0)
    with pytest.raises(InputError, match="only what was trained with one"):  # of vanilla no budget is possible
        Transformer(SIZES, config((8, 0, 0, 0, 2))).set_ffn_budget(1.0)
