"""FFN experts on a CPU: one expert after the other with plain matrix products.

An expert's rows are gathered, multiplied, activated and added to the output while they are still in the cache,
forward and backward. Against autograd over the same products this saves the copies in between (figures in
recipes/results/LOG.md).

T tokens, D hidden size, H intermediate size, F = n_ffn, K choices a token, N rows of the expert at hand.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.compiler.disable
def looped_experts(
    x_TD: Tensor, gates_TK: Tensor, w_gate_up: Tensor, w_down: Tensor, experts_TK: Tensor, computed_TK: Tensor
) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs over the assignments in `computed_TK`."""
    # its row counts differ from step to step, which a compiled graph would be specialised on again and again
    return LoopedExperts.apply(x_TD, gates_TK, w_gate_up, w_down, experts_TK, computed_TK)


class LoopedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        experts_TK: Tensor,
        computed_TK: Tensor,
    ) -> Tensor:
        n_ffn, _, H = w_down.shape
        expert_A = torch.where(computed_TK, experts_TK, n_ffn).flatten()
        order_A = expert_A.argsort(stable=True)
        counts = torch.bincount(expert_A, minlength=n_ffn + 1)[:n_ffn].tolist()
        assignments = order_A[: sum(counts)].split(counts)
        y_TD = torch.zeros_like(x_TD)
        saved: list[Tensor] = []
        for e, assignment_N in enumerate(assignments):
            token_N = assignment_N // gates_TK.shape[1]
            x_ND = x_TD[token_N]
            gate_up = x_ND @ w_gate_up[e].T
            hidden_NH = F.silu(gate_up[:, :H]).mul_(gate_up[:, H:])
            out_ND = hidden_NH @ w_down[e].T
            gate_N = gates_TK.flatten()[assignment_N].to(x_TD.dtype)
            y_TD.index_add_(0, token_N, out_ND.mul_(gate_N[:, None]))  # a token meets an expert once: no race
            saved += [token_N, x_ND, gate_up]
        ctx.assignments = assignments
        ctx.save_for_backward(gates_TK, w_gate_up, w_down, *saved)
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gates_TK, w_gate_up, w_down, *saved = ctx.saved_tensors
        H = w_down.shape[2]
        grad_x_TD = torch.zeros_like(grad_TD)
        grad_gates_A = torch.zeros_like(gates_TK).flatten()
        grad_w_gate_up, grad_w_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
        for e, assignment_N in enumerate(ctx.assignments):
            token_N, x_ND, gate_up = saved[3 * e : 3 * e + 3]
            gate_NH, up_NH = gate_up[:, :H], gate_up[:, H:]
            gate_N1 = gates_TK.flatten()[assignment_N, None].to(grad_TD.dtype)
            grad_out_ND = grad_TD[token_N]
            grad_hidden_NH = grad_out_ND @ w_down[e]
            silu_NH = F.silu(gate_NH)
            hidden_NH = silu_NH * up_NH
            # <dL/dy, W h> = <W^T dL/dy, h>: the gate's gradient without the expert's output
            grad_gates_A[assignment_N] = (grad_hidden_NH * hidden_NH).sum(-1).to(grad_gates_A.dtype)
            grad_hidden_NH.mul_(gate_N1)
            torch.mm((grad_out_ND * gate_N1).T, hidden_NH, out=grad_w_down[e])
            grad_gate_up = torch.empty_like(gate_up)
            torch.mul(grad_hidden_NH, silu_NH, out=grad_gate_up[:, H:])
            grad_gate_up[:, :H] = torch.ops.aten.silu_backward(grad_hidden_NH.mul_(up_NH), gate_NH)
            torch.mm(grad_gate_up.T, x_ND, out=grad_w_gate_up[e])
            grad_x_TD.index_add_(0, token_N, grad_gate_up @ w_gate_up[e])
        return grad_x_TD, grad_gates_A.view_as(gates_TK), grad_w_gate_up, grad_w_down, None, None
