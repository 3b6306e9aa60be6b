"""FFN experts on a CPU: one expert after the other with plain matrix products.

One function for the whole sum over experts, so that rows are gathered once, and each token's rows and what its
zero-computation experts add are summed in place, forward and backward. Autograd over the same products makes
copies in between: without them the layer went from 0.76 to 0.87 of its limit at τ = 0.75, and from 0.60 to 0.74 at
τ = 0.1 (recipes/results/LOG.md).

T tokens, D hidden size, H intermediate size, G = 2H (gate, then up), F = n_ffn, C = n_const, K choices a token,
R rows that FFN experts compute (plan.py), N rows of the expert at hand.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import Plan
from .router import Routing

MULTIPLE = 16  # of an expert's rows, for oneDNN


@torch.compiler.disable
def looped_experts(
    x_TD: Tensor, routing: Routing, w_gate_up_FGD: Tensor, w_down_FDH: Tensor, *terms: Tensor
) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs, and onto that, where there are `terms`
    (experts.Terms), s·x + W·V."""
    # its row counts differ from step to step, which a compiled graph would be specialised on again and again
    plan = Plan.of(routing.experts, routing.computed(), len(w_down_FDH))
    if x_TD.dtype == torch.bfloat16 and not x_TD.is_cuda:
        # oneDNN compiles a kernel for each shape that it meets, and no two steps send an expert as many tokens: a
        # fifth of a step's time
        plan = plan.rounded_up(MULTIPLE)
    with_backward = torch.is_grad_enabled()  # which `forward` itself would never see
    return LoopedExperts.apply(x_TD, routing.gates, w_gate_up_FGD, w_down_FDH, plan, with_backward, *terms)


def by_expert(plan: Plan, *rows_RX: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each expert's (N, X) part of each."""
    return zip(*(rows.split(plan.counts) for rows in rows_RX), strict=True)


def products(plan: Plan, rows_RX: Tensor, w_FXY: Tensor) -> Tensor:
    """(R, Y): each expert's rows times its weights."""
    out_RY = rows_RX.new_empty(len(rows_RX), w_FXY.shape[2])
    for (rows_NX, out_NY), w_XY in zip(by_expert(plan, rows_RX, out_RY), w_FXY, strict=True):
        torch.mm(rows_NX, w_XY, out=out_NY)
    return out_RY


def sum_by_token(plan: Plan, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """(T, D): the sum of each token's rows, weighted by gates. A row is read once, nothing is zeroed first."""
    row_R, first_T = plan.by_token
    gates_R = None if gates_TK is None else gates_TK[plan.computed_TK].to(rows_RD.dtype)
    return F.embedding_bag(row_R, rows_RD, first_T, mode="sum", per_sample_weights=gates_R)


class LoopedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        w_gate_up_FGD: Tensor,
        w_down_FDH: Tensor,
        plan: Plan,
        with_backward: bool,
        *terms: Tensor,
    ) -> Tensor:
        H = w_down_FDH.shape[2]
        x_RD = x_TD.index_select(0, plan.token_R)
        gate_RH, up_RH = products(plan, x_RD, w_gate_up_FGD.mT).split(H, dim=1)
        # d hidden / d gate = up · silu'(gate). Kept, like silu(gate), it leaves backward two elementwise products
        slope_RH = torch.ops.aten.silu_backward(up_RH, gate_RH) if with_backward else None
        silu_RH = F.silu(gate_RH, inplace=True)  # in the place of gate
        hidden_RH = up_RH.mul_(silu_RH)  # in the place of up
        out_RD = products(plan, hidden_RH, w_down_FDH.mT)
        y_TD = sum_by_token(plan, out_RD, gates_TK)
        if terms:
            scale_T, weights_TC, constants_CD = terms
            y_TD.addcmul_(x_TD, scale_T[:, None]).addmm_(weights_TC, constants_CD)
        ctx.plan = plan
        ctx.save_for_backward(
            x_TD, gates_TK, w_gate_up_FGD, w_down_FDH, x_RD, silu_RH, hidden_RH, slope_RH, out_RD, *terms
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x_TD, gates_TK, w_gate_up_FGD, w_down_FDH, x_RD, silu_RH, hidden_RH, slope_RH, out_RD, *terms = (
            ctx.saved_tensors
        )
        grad_out_RD = grad_TD.index_select(0, plan.token_R)
        grad_gate_R = torch.linalg.vecdot(grad_out_RD, out_RD)
        gate_R = gates_TK.new_zeros(len(x_RD))  # of spare rows 0: finite as they are, they count for nothing
        grad_gates_TK = torch.zeros_like(gates_TK)
        row_R, _ = plan.by_token
        gate_R[row_R] = gates_TK[plan.computed_TK]
        grad_gates_TK[plan.computed_TK] = grad_gate_R[row_R].to(gates_TK.dtype)
        grad_out_RD.mul_(gate_R[:, None])  # from here on of the expert's output, before its gate
        grad_hidden_RH = products(plan, grad_out_RD, w_down_FDH)
        H = w_down_FDH.shape[2]
        grad_gate_up_RG, grad_x_RD = x_RD.new_empty(len(x_RD), 2 * H), torch.empty_like(x_RD)
        torch.mul(grad_hidden_RH, slope_RH, out=grad_gate_up_RG[:, :H])  # of gate
        torch.mul(grad_hidden_RH, silu_RH, out=grad_gate_up_RG[:, H:])  # of up
        grad_w_gate_up_FGD, grad_w_down_FDH = torch.empty_like(w_gate_up_FGD), torch.empty_like(w_down_FDH)
        rows = by_expert(plan, x_RD, hidden_RH, grad_out_RD, grad_gate_up_RG, grad_x_RD)
        for e, (x_ND, hidden_NH, grad_out_ND, grad_gate_up_NG, grad_x_ND) in enumerate(rows):
            torch.mm(grad_out_ND.T, hidden_NH, out=grad_w_down_FDH[e])
            torch.mm(grad_gate_up_NG.T, x_ND, out=grad_w_gate_up_FGD[e])
            torch.mm(grad_gate_up_NG, w_gate_up_FGD[e], out=grad_x_ND)
        grad_x_TD = sum_by_token(plan, grad_x_RD)
        grad_terms: tuple[Tensor, ...] = ()
        if terms:
            scale_T, weights_TC, constants_CD = terms
            grad_x_TD.addcmul_(grad_TD, scale_T[:, None])
            grad_terms = torch.linalg.vecdot(grad_TD, x_TD), grad_TD @ constants_CD.T, weights_TC.T @ grad_TD
        return grad_x_TD, grad_gates_TK, grad_w_gate_up_FGD, grad_w_down_FDH, None, None, *grad_terms
