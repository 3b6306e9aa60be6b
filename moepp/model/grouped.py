"""FFN experts on a GPU: one grouped product each way over rows sorted by expert, without a host sync.

T tokens, D hidden size, H intermediate size, F = n_ffn, K choices a token, A = T·K assignments, R rows: those of
FFN experts in front, sorted by expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.model.balance import count_assignments, inverse
from moepp.model.router import Routing


def grouped_experts(x_TD: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs."""
    plan = Plan.of(routing.experts, routing.computed(), len(w_down), routing.max_computed())
    rows_RD = grouped_swiglu(Dispatch.apply(x_TD, plan), w_gate_up, w_down, plan.count_F)
    return Combine.apply(rows_RD, routing.gates, plan)


def grouped_swiglu(x_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, count_F: Tensor) -> Tensor:
    """All experts in one grouped product each way, without a host sync; rows after the last are garbage."""
    offsets_F = count_F.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_RD, w_gate_up.transpose(1, 2), offs=offsets_F).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=offsets_F)


@dataclass
class Plan:
    """Which assignments go to FFN experts, and in which row each of them is computed.

    Attributes:
        count_F: (F,) int64, rows of each expert; rows are sorted by expert.
        token_R: (R,) the token of each row.
        assignment_R: (R,) the assignment (t·K + k) of each row.
        row_TK: (T, K) the row of each assignment that is computed, 0 (so there is one at least) for the others.
        computed_TK: (T, K) bool, where some FFN expert computes the assignment.

    How many rows FFN experts have is known on the device alone, and waiting for it would stall the stream. So R is
    the most there can be, A without a capacity, and the rows after the last expert's are garbage (NaN too) that
    nothing may read.
    """

    count_F: Tensor
    token_R: Tensor
    assignment_R: Tensor
    row_TK: Tensor
    computed_TK: Tensor

    @staticmethod
    def of(experts_TK: Tensor, computed_TK: Tensor, n_ffn: int, max_rows: int) -> "Plan":
        expert_A = torch.where(computed_TK, experts_TK, n_ffn).flatten()  # all others behind the FFN experts
        order_A = expert_A.argsort(stable=True)
        count_F = count_assignments(expert_A[:, None], n_ffn)
        assignment_R = order_A[: max(1, max_rows)]
        token_R = assignment_R // experts_TK.shape[1]
        row_TK = inverse(order_A).view_as(experts_TK).where(computed_TK, 0)
        return Plan(count_F, token_R, assignment_R, row_TK, computed_TK)

    def gather_sum(self, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
        """(T, D): for each token the sum of its rows, weighted by gates. Deterministic: no atomic adds."""
        rows_TKD = rows_RD[self.row_TK].where(self.computed_TK[:, :, None], 0.0)  # no product: NaN · 0 is NaN
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
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.gather_sum(grad_RD), None


class Combine(torch.autograd.Function):
    """rows (R, D), gates (T, K) → (T, D), the gate-weighted sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_TK: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows_RD, gates_TK)
        return plan.gather_sum(rows_RD, gates_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        plan: Plan = ctx.plan
        rows_RD, gates_TK = ctx.saved_tensors
        grad_rows_RD = grad_TD[plan.token_R]
        gates_R = gates_TK.flatten()[plan.assignment_R]
        dot_R = (grad_rows_RD * rows_RD).sum(-1).to(gates_TK.dtype)
        grad_A = torch.zeros_like(gates_TK).flatten()
        grad_A[plan.assignment_R] = dot_R
        grad_gates_TK = grad_A.view_as(gates_TK).where(plan.computed_TK, 0.0)
        return grad_rows_RD * gates_R[:, None].to(grad_rows_RD.dtype), grad_gates_TK, None
