"""The experts: SwiGLU FFNs, which cost, and zero, copy and constant experts, which do not.

T tokens, D hidden size, H intermediate size, F = n_ffn, C = n_const, K choices a token, A = T·K assignments,
R rows: the assignments to FFN experts, sorted by expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.model import balance
from moepp.model.config import MoEConfig
from moepp.model.router import Routing


class ZeroComputationExperts(nn.Module):
    """Zero (0), copy (x) and constant (a1·x + a2·v, [a1, a2] = softmax(W_c x)) experts (equations 3 to 5).

    Together they are s·x + G·V: one number a token, and one (T, C) by (C, D) product. Nothing is dispatched.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.constants = nn.Parameter(torch.empty(moe.n_const, hidden_size))  # v
        self.mix = nn.Parameter(torch.empty(moe.n_const, 2, hidden_size))  # W_c: row 0 weighs x, row 1 weighs v

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        gates_TE = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)
        scale_T = gates_TE[:, self.moe.kinds["copy"]].sum(-1)
        if self.moe.n_const == 0:
            return x_TD * scale_T[:, None].to(x_TD.dtype)
        const_gates_TC = gates_TE[:, self.moe.kinds["const"]]
        # softmax over two logits is a sigmoid of their difference
        mix_CD = (self.mix[:, 0] - self.mix[:, 1]).to(x_TD.dtype)
        a1_TC = F.linear(x_TD, mix_CD).to(gates_TE.dtype).sigmoid()
        scale_T = scale_T + (const_gates_TC * a1_TC).sum(-1)
        weights_TC = (const_gates_TC * (1 - a1_TC)).to(x_TD.dtype)
        return x_TD * scale_T[:, None].to(x_TD.dtype) + weights_TC @ self.constants.to(x_TD.dtype)


class FFNExperts(nn.Module):
    """F SwiGLU experts, W_down(silu(W_gate x) · W_up x), without biases, stacked in two parameters."""

    def __init__(self, hidden_size: int, intermediate_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.w_gate_up = nn.Parameter(torch.empty(moe.n_ffn, 2 * intermediate_size, hidden_size))  # gate, then up
        self.w_down = nn.Parameter(torch.empty(moe.n_ffn, hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        grouped = use_grouped(x_TD, self.w_down)
        plan = Plan.of(routing, static=grouped)
        rows_RD = Dispatch.apply(x_TD, plan)
        compute = grouped_swiglu if grouped else looped_swiglu
        rows_RD = compute(rows_RD, self.w_gate_up.to(x_TD.dtype), self.w_down.to(x_TD.dtype), plan.count_F)
        return Combine.apply(rows_RD, routing.gates, plan)


@dataclass
class Plan:
    """Which assignments go to FFN experts, and in which row each of them is computed.

    Attributes:
        count_F: (F,) int64, rows of each expert; rows are sorted by expert.
        token_R: (R,) the token of each row.
        assignment_R: (R,) the assignment (t·K + k) of each row.
        row_TK: (T, K) the row of each assignment, R or more where no FFN expert computes it.
        computed_TK: (T, K) bool, where some FFN expert computes the assignment.

    R is the number of rows. On CUDA that number lives on the device, and waiting for it would stall the stream:
    a `static` plan has R = A instead, and the rows after the last expert's are garbage (NaN too) that nothing
    may read.
    """

    count_F: Tensor
    token_R: Tensor
    assignment_R: Tensor
    row_TK: Tensor
    computed_TK: Tensor

    @staticmethod
    def of(routing: Routing, static: bool) -> "Plan":
        T, K = routing.experts.shape
        n_ffn = routing.moe.n_ffn
        computed_TK = routing.experts < n_ffn
        if routing.kept is not None:
            computed_TK = computed_TK & routing.kept
        expert_A = torch.where(computed_TK, routing.experts, n_ffn).flatten()  # all others behind the FFN experts
        order_A = expert_A.argsort(stable=True)
        row_A = torch.empty_like(order_A)
        row_A[order_A] = torch.arange(T * K, device=order_A.device)
        count_F = balance.count_assignments(expert_A[:, None], n_ffn)
        assignment_R = order_A if static else order_A[: int(count_F.sum())]
        return Plan(count_F, assignment_R // K, assignment_R, row_A.view(T, K), computed_TK)

    def gather_sum(self, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
        """(T, D): for each token the sum of its rows, weighted by gates. Deterministic: no atomic adds."""
        if len(rows_RD) == 0:
            return rows_RD.new_zeros(len(self.row_TK), rows_RD.shape[1])
        rows_TKD = rows_RD[self.row_TK.clamp(max=len(rows_RD) - 1)]
        rows_TKD = rows_TKD.where(self.computed_TK[:, :, None], 0.0)  # not a product: NaN · 0 is NaN
        if gates_TK is not None:
            rows_TKD = rows_TKD * gates_TK[:, :, None].to(rows_TKD.dtype)
        return rows_TKD.sum(1)


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


def use_grouped(x_TD: Tensor, w_down_FDH: Tensor) -> bool:
    """The one seam: `grouped_mm` where it has a kernel (bf16 on CUDA, rows of whole 16 bytes), else the loop."""
    aligned = w_down_FDH.shape[1] % 8 == 0 and w_down_FDH.shape[2] % 8 == 0
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and aligned


def looped_swiglu(x_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, count_F: Tensor) -> Tensor:
    """One expert after the other with plain matrix products: the fastest on a CPU."""
    outputs = [
        F.linear(swiglu(F.linear(x, gate_up)), down)
        for x, gate_up, down in zip(x_RD.split(count_F.tolist()), w_gate_up.unbind(), w_down.unbind(), strict=True)
    ]
    return torch.cat(outputs)


def grouped_swiglu(x_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, count_F: Tensor) -> Tensor:
    """All experts in one grouped product each way, without a host sync; rows after the last are garbage."""
    offsets_F = count_F.cumsum(0).to(torch.int32)
    hidden = swiglu(F.grouped_mm(x_RD, w_gate_up.transpose(1, 2), offs=offsets_F))
    return F.grouped_mm(hidden, w_down.transpose(1, 2), offs=offsets_F)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
