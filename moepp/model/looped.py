"""FFN experts on a CPU: one expert after the other with plain matrix products.

One function for the whole sum over experts, so that rows are gathered once, and each token's rows and what its
zero-computation experts add are summed in place, forward and backward. Autograd over the same products makes
copies in between: without them the layer went from 0.76 to 0.87 of its limit at τ = 0.75, and from 0.60 to 0.74 at
τ = 0.1 (recipes/results/LOG.md).

T tokens, D hidden size, H intermediate size, G = 2H (gate, then up), F = n_ffn, C = n_const, K choices a token,
A = T·K assignments, R rows that FFN experts compute (plan.py), N rows of the expert at hand.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import Plan
from .router import Routing


@torch.compiler.disable
def looped_experts(
    x_TD: Tensor, routing: Routing, w_gate_up_FGD: Tensor, w_down_FDH: Tensor, *terms: Tensor
) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs, and onto that, where there are `terms`
    (experts.Terms), s·x + W·V."""
    # its row counts differ from step to step, which a compiled graph would be specialised on again and again
    plan = Plan.of(routing.experts, routing.computed(), len(w_down_FDH))
    return LoopedExperts.apply(x_TD, routing.gates, w_gate_up_FGD, w_down_FDH, plan, *terms)


def multiple(x_TD: Tensor) -> int:
    """What the rows of an expert's products are rounded up to. oneDNN, which computes bf16 on a CPU, compiles a
    kernel for each shape that it meets, and no two steps send an expert as many tokens: a fifth of a step's time.
    """
    return 16 if x_TD.dtype == torch.bfloat16 else 1


def gather(x_TD: Tensor, plan: Plan) -> Tensor:
    """(R, D), and spare rows of 0 for the last expert's to be rounded up by."""
    R, spare = len(plan.token_R), multiple(x_TD) - 1
    rows_RD = x_TD.new_empty(R + spare, x_TD.shape[1])
    torch.index_select(x_TD, 0, plan.token_R, out=rows_RD[:R])
    rows_RD[R:] = 0
    return rows_RD


def by_expert(plan: Plan, *rows_RX: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
    """(e, N, its (N, X) part of each), rounded up by rows of the experts after it, which are written after it."""
    start, to = 0, multiple(rows_RX[0])
    for e, n in enumerate(plan.count_F.tolist()):
        yield e, n, tuple(rows[start : start + -(-n // to) * to] for rows in rows_RX)
        start += n


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
        *terms: Tensor,
    ) -> Tensor:
        H = w_down_FDH.shape[2]
        x_RD = gather(x_TD, plan)
        out_RD = torch.empty_like(x_RD)
        activations: list[Tensor] = []
        for e, n, (x_ND, out_ND) in by_expert(plan, x_RD, out_RD):
            gate_up_NG = x_ND @ w_gate_up_FGD[e].T
            silu_NH = F.silu(gate_up_NG[:, :H])
            hidden_NH = silu_NH * gate_up_NG[:, H:]
            hidden_NH[n:] = 0  # rows of others
            torch.mm(hidden_NH, w_down_FDH[e].T, out=out_ND)
            activations += gate_up_NG, silu_NH, hidden_NH  # to compute them again would take longer
        y_TD = sum_by_token(plan, out_RD, gates_TK)
        if terms:
            scale_T, weights_TC, constants_CD = terms
            y_TD.addcmul_(x_TD, scale_T[:, None]).addmm_(weights_TC, constants_CD)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, gates_TK, w_gate_up_FGD, w_down_FDH, x_RD, out_RD, *activations, *terms)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x_TD, gates_TK, w_gate_up_FGD, w_down_FDH, x_RD, out_RD, *more = ctx.saved_tensors
        n_ffn, _, H = w_down_FDH.shape
        activations, terms = more[: 3 * n_ffn], more[3 * n_ffn :]
        R = len(plan.token_R)
        grad_out_RD = gather(grad_TD, plan)
        grad_gates_A = torch.zeros_like(gates_TK).flatten()
        grad_gates_A[plan.assignment_R] = torch.linalg.vecdot(grad_out_RD[:R], out_RD[:R]).to(gates_TK.dtype)
        grad_out_RD[:R].mul_(gates_TK.flatten()[plan.assignment_R, None])
        grad_x_RD = torch.empty_like(x_RD)
        grad_w_gate_up_FGD, grad_w_down_FDH = torch.empty_like(w_gate_up_FGD), torch.empty_like(w_down_FDH)
        for e, n, (x_ND, grad_out_ND, grad_x_ND) in by_expert(plan, x_RD, grad_out_RD, grad_x_RD):
            gate_up_NG, silu_NH, hidden_NH = activations[3 * e : 3 * e + 3]
            gate_NH, up_NH = gate_up_NG[:, :H], gate_up_NG[:, H:]
            grad_hidden_NH = grad_out_ND @ w_down_FDH[e]
            torch.mm(grad_out_ND.T, hidden_NH, out=grad_w_down_FDH[e])
            grad_gate_up_NG = torch.empty_like(gate_up_NG)
            torch.mul(grad_hidden_NH, silu_NH, out=grad_gate_up_NG[:, H:])
            grad_silu_NH = grad_hidden_NH.mul_(up_NH)
            torch.ops.aten.silu_backward.grad_input(grad_silu_NH, gate_NH, grad_input=grad_gate_up_NG[:, :H])
            grad_gate_up_NG[n:] = 0
            torch.mm(grad_gate_up_NG.T, x_ND, out=grad_w_gate_up_FGD[e])
            torch.mm(grad_gate_up_NG, w_gate_up_FGD[e], out=grad_x_ND)
        grad_x_TD = sum_by_token(plan, grad_x_RD)
        grad_terms: tuple[Tensor, ...] = ()
        if terms:
            scale_T, weights_TC, constants_CD = terms
            grad_x_TD.addcmul_(grad_TD, scale_T[:, None])
            grad_terms = torch.linalg.vecdot(grad_TD, x_TD), grad_TD @ constants_CD.T, weights_TC.T @ grad_TD
        return grad_x_TD, grad_gates_A.view_as(gates_TK), grad_w_gate_up_FGD, grad_w_down_FDH, None, *grad_terms
