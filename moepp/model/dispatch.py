"""Expert parallelism: the FFN experts of a layer are spread over ranks, and the rows of tokens travel to them.

Attention, router and all zero-computation experts are on every rank, where the tokens are: of an assignment to
zero, copy or constant experts nothing is sent (the paper's §3.4, "deployment friendly").

T tokens, D hidden size, F = n_ffn, N ranks, E = F/N experts on each, R rows that the tokens here want, A rows that
arrive from all ranks for the experts here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import MoEConfig
from .permute import Combine, Dispatch
from .plan import Plan
from .router import Routing


class Exchange(torch.autograd.Function):
    """rows (R, D), sorted by the rank that they go to → the rows (A, D) that arrive, by the rank they come from.

    Backward is the inverse, which with both counts exchanged is an exchange as well.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, sent_N: list[int], arriving_N: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.inverse = arriving_N, sent_N, group
        return exchange(rows_RD, sent_N, arriving_N, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad_AD, *ctx.inverse), None, None, None


def exchange(rows_RD: Tensor, sent_N: list[int], arriving_N: list[int], group: dist.ProcessGroup) -> Tensor:
    rows_AD = rows_RD.new_empty(sum(arriving_N), rows_RD.shape[1])
    dist.all_to_all_single(rows_AD, rows_RD.contiguous(), arriving_N, sent_N, group=group)
    return rows_AD


class Dispatcher:
    """The tokens' way to the experts of all ranks and back, for one layer's routing.

    Args:
        routing: of the T tokens here.
        group: the N ranks, the first with the first F/N experts, and so on.
    """

    def __init__(self, routing: Routing, group: dist.ProcessGroup) -> None:
        self.routing, self.group = routing, group
        plan = Plan.of(routing.experts, routing.computed(), routing.moe.n_ffn, routing.max_computed())
        sent_NE = plan.count_F.view(group.size(), -1)
        arriving_NE = torch.empty_like(sent_NE)
        dist.all_to_all_single(arriving_NE, sent_NE, group=group)
        # the host has to know how much to receive: the one time that it waits for the device
        self.sent_N, self.arriving_N = torch.stack((sent_NE.sum(1), arriving_NE.sum(1))).tolist()
        self.plan = plan.first(sum(self.sent_N))
        n_here = sent_NE.shape[1]
        experts_A = torch.arange(n_here, device=sent_NE.device).repeat(len(sent_NE))
        self.expert_A = experts_A.repeat_interleave(arriving_NE.flatten(), output_size=sum(self.arriving_N))
        self.moe = MoEConfig(n_ffn=n_here, n_zero=0, n_copy=0, n_const=0, top_k=1, gating_residual=False)

    def to_experts(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """(A, D), and their routing: each row that arrives is a token of one choice whose gate is 1. Its own gate
        is applied where it came from."""
        rows_RD = Dispatch.apply(x_TD, self.plan)
        rows_AD = Exchange.apply(rows_RD, self.sent_N, self.arriving_N, self.group)
        ones_A1 = torch.ones(len(rows_AD), 1, dtype=self.routing.gates.dtype, device=x_TD.device)
        return rows_AD, Routing(ones_A1, self.expert_A[:, None], ones_A1, ones_A1, None, self.moe)

    def to_tokens(self, rows_AD: Tensor) -> Tensor:
        """(T, D): back where they came from, each token's sum of them, weighted by its gates."""
        rows_RD = Exchange.apply(rows_AD, self.arriving_N, self.sent_N, self.group)
        return Combine.apply(rows_RD, self.routing.gates, self.plan)
