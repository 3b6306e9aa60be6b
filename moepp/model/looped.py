"""FFN experts on a CPU: one expert after the other with plain matrix products.

One function for the whole sum over experts, so that rows are gathered once, and each token's rows and what its
zero-computation experts add are summed in place, forward and backward. Autograd over the same products makes
copies in between: without them the layer went from 0.76 to 0.87 of its limit at τ = 0.75, and from 0.60 to 0.74 at
τ = 0.1 (recipes/results/LOG.md).

T tokens, D hidden size, H intermediate size, F = n_ffn, C = n_const, K choices a token, R assignments that FFN
experts compute, sorted by expert, N rows of the expert at hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.model.balance import inverse
from moepp.model.router import Routing


@torch.compiler.disable
def looped_experts(x_TD: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor, *terms: Tensor) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs, and onto that, where there are `terms`
    (experts.Terms), s·x + G·V."""
    # its row counts differ from step to step, which a compiled graph would be specialised on again and again
    rows = Rows.of(routing.experts, routing.computed(), len(w_down))
    return LoopedExperts.apply(x_TD, routing.gates, w_gate_up, w_down, rows, *terms)


@dataclass
class Rows:
    """The R assignments that FFN experts compute, as rows sorted by expert.

    Attributes:
        counts: rows of each expert.
        token: (R,) the token of each row.
        assignment: (R,) the assignment (t·K + k) of each row.
        in_token_order: (R,) the rows, those of the first token first.
        first_T: where in `in_token_order` each token's rows begin.
    """

    counts: list[int]
    token: Tensor
    assignment: Tensor
    in_token_order: Tensor
    first_T: Tensor

    @staticmethod
    def of(experts_TK: Tensor, computed_TK: Tensor, n_ffn: int) -> "Rows":
        computed = computed_TK.flatten().nonzero()[:, 0]
        expert = experts_TK.flatten()[computed]
        order = expert.argsort(stable=True)
        assignment = computed[order]
        count_T = computed_TK.sum(1)
        return Rows(
            counts=expert.bincount(minlength=n_ffn).tolist(),
            token=assignment // experts_TK.shape[1],
            assignment=assignment,
            in_token_order=inverse(order),
            first_T=count_T.cumsum(0) - count_T,
        )

    def by_expert(self, *rows_RX: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(e, its (N, X) part of each)."""
        return enumerate(zip(*(rows.split(self.counts) for rows in rows_RX), strict=True))

    def sum_by_token(self, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
        """(T, D): the sum of each token's rows, weighted by gates. A row is read once, nothing is zeroed first."""
        gates = None
        if gates_TK is not None:
            gates = gates_TK.flatten()[self.assignment].to(rows_RD.dtype)[self.in_token_order]
        return F.embedding_bag(self.in_token_order, rows_RD, self.first_T, mode="sum", per_sample_weights=gates)


class LoopedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        rows: Rows,
        *terms: Tensor,
    ) -> Tensor:
        H = w_down.shape[2]
        x_RD = x_TD.index_select(0, rows.token)
        out_RD = torch.empty_like(x_RD)
        gate_ups = []
        for e, (x_ND, out_ND) in rows.by_expert(x_RD, out_RD):
            gate_up = x_ND @ w_gate_up[e].T
            hidden_NH = F.silu(gate_up[:, :H]).mul_(gate_up[:, H:])
            torch.mm(hidden_NH, w_down[e].T, out=out_ND)
            gate_ups.append(gate_up)
        y_TD = rows.sum_by_token(out_RD, gates_TK)
        if terms:
            scale_T, weights_TC, constants_CD = terms
            y_TD.addcmul_(x_TD, scale_T[:, None]).addmm_(weights_TC, constants_CD)
        ctx.rows = rows
        ctx.save_for_backward(x_TD, gates_TK, w_gate_up, w_down, x_RD, out_RD, *gate_ups, *terms)
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        x_TD, gates_TK, w_gate_up, w_down, x_RD, out_RD, *more = ctx.saved_tensors
        n_ffn, _, H = w_down.shape
        gate_ups, terms = more[:n_ffn], more[n_ffn:]
        grad_out_RD = grad_TD.index_select(0, rows.token)
        grad_gates_A = torch.zeros_like(gates_TK).flatten()
        grad_gates_A[rows.assignment] = torch.linalg.vecdot(grad_out_RD, out_RD).to(gates_TK.dtype)
        grad_out_RD.mul_(gates_TK.flatten()[rows.assignment, None])
        grad_x_RD = torch.empty_like(x_RD)
        grad_w_gate_up, grad_w_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
        for e, (x_ND, grad_out_ND, grad_x_ND) in rows.by_expert(x_RD, grad_out_RD, grad_x_RD):
            gate_NH, up_NH = gate_ups[e][:, :H], gate_ups[e][:, H:]
            grad_hidden_NH = grad_out_ND @ w_down[e]
            silu_NH = F.silu(gate_NH)
            grad_gate_up = torch.empty_like(gate_ups[e])
            torch.mul(grad_hidden_NH, silu_NH, out=grad_gate_up[:, H:])
            torch.mm(grad_out_ND.T, silu_NH.mul_(up_NH), out=grad_w_down[e])
            grad_silu_NH = grad_hidden_NH.mul_(up_NH)
            torch.ops.aten.silu_backward.grad_input(grad_silu_NH, gate_NH, grad_input=grad_gate_up[:, :H])
            torch.mm(grad_gate_up.T, x_ND, out=grad_w_gate_up[e])
            torch.mm(grad_gate_up, w_gate_up[e], out=grad_x_ND)
        grad_x_TD = rows.sum_by_token(grad_x_RD)
        grad_terms: tuple[Tensor, ...] = ()
        if terms:
            scale_T, weights_TC, constants_CD = terms
            grad_x_TD.addcmul_(grad_TD, scale_T[:, None])
            grad_terms = torch.linalg.vecdot(grad_TD, x_TD), grad_TD @ constants_CD.T, weights_TC.T @ grad_TD
        return grad_x_TD, grad_gates_A.view_as(gates_TK), grad_w_gate_up, grad_w_down, None, *grad_terms
