"""A compute budget that is held: how many FFN experts tokens take, by a bias on who is chosen.

A token's j-th best FFN expert is among its K choices if its score is above that of the (K-j+1)-th best
zero-computation expert: the difference of the two is one of the token's *margins*. A bias b on the scores of
zero-computation experts, for the choice alone, leaves those FFN experts in whose margin is above b. So the bias
that spends a budget on given tokens is a quantile of their margins, exactly: there is nothing to search for.

A token must not be chosen for by others of its batch, which would look into the future. So training goes by the
batches before: by an average of their quantiles. At its end, text of the training is read again with the weights
as they are then, for evaluation to go by (`calibrate`). All quantiles are kept, so that a trained model can be
given another budget.

T tokens, E experts, K choices and J margins a token, L layers, X = 1 for all layers together or L, Q quantiles.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .router import Router, Routing

QUANTILES = 129
WEIGHT = 0.3  # of the last step's quantiles in the average. Large batches' drift by more than they scatter
REPAID = 0.8  # of the debt, in the next step
DEBT_WEIGHT = 0.05  # of the last step's debt in its average


def margins(scores_TE: Tensor, moe: MoEConfig) -> Tensor:
    """(T, J), falling: of the FFN experts that a bias can take from a token or give to it."""
    fewest, most = moe.ffn_range
    ffn_TF, others_TN = scores_TE.split([moe.n_ffn, moe.n_zero_computation], dim=1)
    best_ffn_TJ = ffn_TF.topk(most, dim=1).values[:, fewest:]
    best_others_TJ = others_TN.topk(moe.top_k - fewest, dim=1).values[:, moe.top_k - most :]
    return best_ffn_TJ - best_others_TJ.flip(1)


class Budget(nn.Module):
    """The quantiles of a model's margins over training, and what it owes. Buffers, which checkpoints keep.

    What a step spends too much or too little, for a batch is not like the batches before, is a debt that the next
    step repays. Its average is what quantiles of the past are off by, which evaluation takes into account as well.

    Args:
        moe: with an `ffn_budget`.
        routers: of the L layers, whose `choice_bias` it sets.

    Attributes:
        quantiles_XQ: the margins' quantiles, at Q equal steps from 0 to 1.
        debt_2X: FFN experts per token spent above the budget and not yet repaid or forgiven: now, in the average.
        seen: () int64, optimizer steps that they are of.
    """

    quantiles_XQ: Tensor
    debt_2X: Tensor
    seen: Tensor

    def __init__(self, moe: MoEConfig, routers: list[Router]) -> None:
        super().__init__()
        self.moe = moe
        self.routers = tuple(routers)  # not as submodules: they have an owner
        n_shared = 1 if moe.budget_over == "model" else len(routers)
        self.register_buffer("quantiles_XQ", torch.zeros(n_shared, QUANTILES))
        self.register_buffer("debt_2X", torch.zeros(2, n_shared))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.pending: list[Tensor] = []  # of the micro-batches of this step: (X, Q + 1)

    @torch.no_grad()
    def observe(self, routings: list[Routing]) -> None:
        """Take the quantiles of a micro-batch's margins, and what it spent."""
        n_shared = len(self.quantiles_XQ)
        margins_LA = torch.stack([margins(routing.scores, self.moe).flatten() for routing in routings])
        levels_Q = torch.linspace(0, 1, QUANTILES, device=margins_LA.device)
        quantiles_QX = torch.quantile(margins_LA.reshape(n_shared, -1).float(), levels_Q, dim=1)
        spent_L = torch.stack([routing.computed().sum(1).float().mean() for routing in routings])
        self.pending.append(
            torch.cat((quantiles_QX.T, spent_L.reshape(n_shared, -1).mean(1, keepdim=True)), dim=1)
        )

    @torch.no_grad()
    def step(self, ffn_per_token: float, mean_over_devices: Callable[[Tensor], Tensor]) -> None:
        """Learn from what a step observed, whose budget this was. What is not finite is left out."""
        figures_XF = mean_over_devices(torch.stack(self.pending).mean(0)).to(self.quantiles_XQ)
        now_XQ, spent_X1 = figures_XF.split((QUANTILES, 1), dim=1)
        self.pending.clear()
        weight = (1 / (self.seen + 1)).clamp(min=WEIGHT)  # the first steps all count alike
        begun = self.seen > 0  # before, nobody was asked to keep to a budget
        debt_X = self.debt_2X[0] + (spent_X1[:, 0] - ffn_per_token) * begun
        # no more than one step can repay: the first steps, in which the router runs ahead of the average, would
        # else be paid for with many steps without any FFN expert
        fewest, most = self.moe.ffn_range
        debt_X = debt_X.clamp(ffn_per_token - most, ffn_per_token - fewest)
        averaged_X = torch.lerp(self.debt_2X[1], debt_X, DEBT_WEIGHT)
        finite = now_XQ.isfinite().all()
        quantiles_XQ = torch.lerp(self.quantiles_XQ, now_XQ, weight.to(now_XQ))
        self.quantiles_XQ.copy_(quantiles_XQ.where(finite, self.quantiles_XQ))
        self.debt_2X.copy_(torch.stack((debt_X, averaged_X)).where(finite, self.debt_2X))
        self.seen += finite

    @torch.no_grad()
    def calibrate(self, of_all_devices: Callable[[Tensor], Tensor]) -> None:
        """Go by what was observed since the last step alone: by the quantiles of all of these margins together,
        which an average of batches' quantiles is not."""
        quantiles_NXQ = of_all_devices(torch.stack(self.pending)[..., :QUANTILES])
        self.pending.clear()
        # between two quantiles lie as many margins as between any other two
        middles_NXA = ((quantiles_NXQ[..., 1:] + quantiles_NXQ[..., :-1]) / 2).flatten(0, -3)
        levels_Q = torch.linspace(0, 1, QUANTILES, device=middles_NXA.device)
        self.quantiles_XQ.copy_(torch.quantile(middles_NXA.transpose(0, 1).flatten(1), levels_Q, dim=1).T)
        self.debt_2X.zero_()

    @torch.no_grad()
    def spend(self, ffn_per_token: float) -> None:
        """Set the routers' biases so that tokens like those seen take so many FFN experts each, in the mean."""
        fewest, most = self.moe.ffn_range
        aim_2X = ffn_per_token - REPAID * self.debt_2X
        position_2X = ((1 - (aim_2X - fewest) / (most - fewest)) * (QUANTILES - 1)).clamp(0, QUANTILES - 1)
        below_2X = position_2X.long().clamp(max=QUANTILES - 2)
        low_2X, high_2X = (self.quantiles_XQ.T.gather(0, below_2X + i) for i in (0, 1))
        bias_2L = torch.lerp(low_2X, high_2X, position_2X - below_2X).expand(2, len(self.routers))
        for router, bias_2 in zip(self.routers, bias_2L.T, strict=True):
            assert router.choice_bias is not None
            router.choice_bias.copy_(bias_2)
