"""Tokens to the rows of a plan and back, as two functions that gather both ways: no atomic adds, no host sync.

T tokens, D hidden size, K choices a token, R rows (plan.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import Plan


def gather_sum(plan: Plan, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """(T, D): for each token the sum of its rows, weighted by gates. Deterministic: no atomic adds."""
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(len(plan.row_TK), rows_RD.shape[1])
    rows_TKD = rows_RD[plan.row_TK].where(plan.computed_TK[:, :, None], 0.0)  # no product: NaN · 0 is NaN
    if gates_TK is not None:
        rows_TKD = rows_TKD * gates_TK[:, :, None].to(rows_TKD.dtype)
    return rows_TKD.sum(1, dtype=rows_TKD.dtype)  # autocast on CUDA would return float32


class Dispatch(torch.autograd.Function):
    """x (T, D) → rows (R, D). Backward gathers as well, where autograd's own would scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_TD[plan.token_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return gather_sum(ctx.plan, grad_RD), None


class Combine(torch.autograd.Function):
    """rows (R, D), gates (T, K) → (T, D), the gate-weighted sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_TK: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows_RD, gates_TK)
        return gather_sum(plan, rows_RD, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        plan: Plan = ctx.plan
        rows_RD, gates_TK = ctx.saved_tensors
        grad_rows_RD = grad_TD[plan.token_R]
        gates_R = gates_TK.flatten()[plan.assignment_R]
        dot_R = (grad_rows_RD * rows_RD).sum(-1, dtype=gates_TK.dtype)
        grad_A = torch.zeros_like(gates_TK).flatten()
        grad_A[plan.assignment_R] = dot_R
        grad_gates_TK = grad_A.view_as(gates_TK).where(plan.computed_TK, 0.0)
        return grad_rows_RD * gates_R[:, None].to(grad_rows_RD.dtype), grad_gates_TK, None
