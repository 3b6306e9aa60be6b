"""A compute budget that is held: how many FFN experts tokens take, by a bias on who is chosen.

In training a sequence's bias is the leave-one-out quantile of its own device's micro-batch (margins.py). What no
micro-batch knows is added here: how a budget over the whole model divides over its layers, and what the steps
before have spent too much or too little. The load balance is of the choice without the bias, so that the router
comes to the budget by itself (`Routing.unbiased_tokens_per_expert`).

A batch of one sequence goes by the batches before, by an average of their margins' quantiles, and so does
evaluation on the way. At the end text of the training is read again with the weights as they are then, for
evaluation to go by (`calibrate`). All quantiles are kept, so that a trained model can be given another budget.

C margins of a layer, L layers, X = 1 for all of them together or L, N micro-batches, Q quantiles, M = Q - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .margins import level_of, margins
from .router import Router, Routing

QUANTILES = 1025  # with 129, straight lines between them spend 2 % too little at a budget of 0.2
WEIGHT = 0.3  # of the last step's quantiles in the average. Large batches' drift by more than they scatter
REPAID = 0.8  # of the debt, in the next step


def alone(figures: Tensor) -> Tensor:
    """Those of all devices, where there is one."""
    return figures


class Budget(nn.Module):
    """The quantiles of a model's margins over training, and what it owes. Buffers, which checkpoints keep.

    What a step spends too much or too little is a debt that the next step repays.

    Args:
        moe: with an `ffn_budget`.
        routers: of the L layers, whose `choice_bias` and `ffn_offset` it sets.

    Attributes:
        aim: FFN experts per token, the budget itself.
        quantiles_LQ: the margins' quantiles, at Q equal steps from 0 to 1.
        debt_X: FFN experts per token spent above the budget and not yet repaid or forgiven.
        steps: () int64, optimizer steps that they are of.
    """

    quantiles_LQ: Tensor
    debt_X: Tensor
    steps: Tensor

    def __init__(self, moe: MoEConfig, routers: list[Router]) -> None:
        super().__init__()
        assert moe.ffn_budget is not None
        self.moe, self.aim = moe, moe.ffn_budget
        self.routers = tuple(routers)  # not as submodules: they have an owner
        self.register_buffer("quantiles_LQ", torch.zeros(len(routers), QUANTILES))
        self.register_buffer("debt_X", torch.zeros(1 if moe.budget_over == "model" else len(routers)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.pending: list[Tensor] = []  # of the micro-batches of this step: (L, Q + 1)

    @torch.no_grad()
    def observe(self, routings: list[Routing]) -> None:
        """Take the quantiles of a micro-batch's margins, and what it spent."""
        margins_LC = torch.stack([margins(routing.scores, self.moe).flatten() for routing in routings])
        spent_L = torch.stack([routing.computed().sum(1).float().mean() for routing in routings])
        self.pending.append(torch.cat((quantiles_of(margins_LC.float()), spent_L[:, None]), dim=1))

    @torch.no_grad()
    def step(self, ffn_per_token: float, mean_over_devices: Callable[[Tensor], Tensor] = alone) -> None:
        """Update quantiles and debt after a step that was to spend `ffn_per_token`. Quantiles that are not finite
        are left out. `mean_over_devices` makes of this device's figures those of all."""
        figures_LF = mean_over_devices(torch.stack(self.pending).mean(0)).to(self.quantiles_LQ)
        now_LQ, spent_L1 = figures_LF.split((QUANTILES, 1), dim=1)
        self.pending.clear()
        debt_X = self.debt_X + spent_L1.view(len(self.debt_X), -1).mean(1) - ffn_per_token
        # no more than one step can repay: in the first steps the router runs ahead of the average, and all of that
        # debt would cost many steps without any FFN expert
        fewest, most = self.moe.ffn_range
        debt_X = debt_X.clamp(ffn_per_token - most, ffn_per_token - fewest)
        weight = (1 / (self.steps + 1)).clamp(min=WEIGHT)  # the first steps all count alike
        quantiles_LQ = torch.lerp(self.quantiles_LQ, now_LQ, weight.to(now_LQ))
        finite = now_LQ.isfinite().all()
        self.quantiles_LQ.copy_(quantiles_LQ.where(finite, self.quantiles_LQ))
        self.debt_X.copy_(debt_X.where(finite, self.debt_X))
        self.steps += finite

    @torch.no_grad()
    def calibrate(self, of_all_devices: Callable[[Tensor], Tensor] = alone) -> None:
        """Go by what was observed since the last step alone: by the quantiles of all of these margins together,
        which an average of batches' quantiles is not. `of_all_devices` stacks the devices' quantiles."""
        quantiles_NLQ = of_all_devices(torch.stack(self.pending)[..., :QUANTILES])
        self.pending.clear()
        middles_LNM = middles(quantiles_NLQ.flatten(0, -3)).transpose(0, 1)
        self.quantiles_LQ.copy_(quantiles_of(middles_LNM.flatten(1)))
        self.debt_X.zero_()

    @torch.no_grad()
    def spend(self, ffn_per_token: float) -> None:
        """Set the routers' biases so that tokens like those seen take so many FFN experts each, in the mean; and
        how many each layer takes, for the leave-one-out quantiles."""
        training_X = ffn_per_token - REPAID * self.debt_X.float()
        evaluation_X = torch.full_like(training_X, ffn_per_token)
        margins_XlM = self.margins_seen()
        bias_X = self.bias(training_X, margins_XlM)
        bias_X2 = torch.stack((bias_X, self.bias(evaluation_X, margins_XlM)), dim=1)
        bias_L2 = bias_X2.repeat_interleave(margins_XlM.shape[1], dim=0)
        ffn_L = self.ffn_by_layer(training_X, bias_X, margins_XlM)
        for router, bias_2, ffn in zip(self.routers, bias_L2, ffn_L, strict=True):
            assert router.choice_bias is not None
            router.choice_bias.copy_(bias_2)
            router.ffn_offset.copy_(ffn - self.moe.expected_ffn_per_token)

    def margins_seen(self) -> Tensor:
        """(X, l, M): of each of the l layers that share a bias M margins, one between any two quantiles."""
        return middles(self.quantiles_LQ.float()).unflatten(0, (len(self.debt_X), -1))

    def bias(self, ffn_X: Tensor, margins_XlM: Tensor) -> Tensor:
        """(X,): under which tokens take `ffn_X` FFN experts: a quantile of all margins that share it."""
        levels_X = level_of(ffn_X, self.moe)
        rows = zip(margins_XlM.flatten(1), levels_X, strict=True)
        return torch.stack([torch.quantile(margins_A, level) for margins_A, level in rows])

    def ffn_by_layer(self, ffn_X: Tensor, bias_X: Tensor, margins_XlM: Tensor) -> Tensor:
        """(L,): how many FFN experts each layer takes at a bias: the fewest there can be, and more by the share of
        its margins above the bias. Their mean is made `ffn_X` (before the first step all margins are 0)."""
        fewest, most = self.moe.ffn_range
        above_Xl = (margins_XlM > bias_X[:, None, None]).float().mean(2)
        return (ffn_X[:, None] + (most - fewest) * (above_Xl - above_Xl.mean(1, keepdim=True))).flatten()


def quantiles_of(values_LA: Tensor) -> Tensor:
    """(L, Q), of each layer's values."""
    levels_Q = torch.linspace(0, 1, QUANTILES, dtype=values_LA.dtype, device=values_LA.device)
    return torch.quantile(values_LA, levels_Q, dim=1).T


def middles(quantiles: Tensor) -> Tensor:
    """(..., Q) → (..., M). Between any two quantiles lie as many margins."""
    return (quantiles[..., 1:] + quantiles[..., :-1]) / 2
