"""The experts: SwiGLU FFNs, which cost, and zero, copy and constant experts, which do not.

T tokens, D hidden size, H intermediate size, G = 2H (gate, then up), F = n_ffn, C = n_const.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEConfig
from .dispatch import Dispatcher
from .grouped import grouped_experts
from .looped import looped_experts
from .router import Routing
from .sharding import local


class Terms(NamedTuple):
    """s·x + W·V, what the zero-computation experts of each token come to: s (T,), W (T, C), V (C, D)."""

    scale_T: Tensor
    weights_TC: Tensor
    constants_CD: Tensor

    def value(self, x_TD: Tensor) -> Tensor:
        return (x_TD * self.scale_T[:, None]).addmm(self.weights_TC, self.constants_CD)


class ZeroComputationExperts(nn.Module):
    """Zero (0), copy (x) and constant (a1·x + a2·v, [a1, a2] = softmax(W_c x)) experts (equations 3 to 5).

    Together they are s·x + W·V: one number a token, and one (T, C) by (C, D) product. Nothing is dispatched. These
    terms are what it returns: FFNExperts adds them up with its own rows.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.constants = nn.Parameter(torch.empty(moe.n_const, hidden_size))  # (C, D), v
        # (C, 2, D), W_c: row 0 weighs x, row 1 weighs v
        self.mix = nn.Parameter(torch.empty(moe.n_const, 2, hidden_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Terms:
        gates_TE = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)
        copy_T = gates_TE[:, self.moe.kinds["copy"]].sum(-1)
        const_TC = gates_TE[:, self.moe.kinds["const"]]
        # softmax over two logits is a sigmoid of their difference
        mix_C2D = self.mix
        difference_CD = (mix_C2D[:, 0] - mix_C2D[:, 1]).to(x_TD.dtype)
        a1_TC = F.linear(x_TD, difference_CD).to(gates_TE.dtype).sigmoid()
        scale_T = copy_T + (const_TC * a1_TC).sum(-1)
        weights_TC = const_TC * (1 - a1_TC)
        return Terms(scale_T.to(x_TD.dtype), weights_TC.to(x_TD.dtype), self.constants.to(x_TD.dtype))


class FFNExperts(nn.Module):
    """SwiGLU experts, W_down(silu(W_gate x) · W_up x), without biases, stacked in two parameters.

    Attributes:
        ranks: that the experts are spread over, each with its part of the parameters; None: all are here.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.ranks: dist.ProcessGroup | None = None
        D, H = hidden_size, intermediate_size
        self.w_gate_up = nn.Parameter(torch.empty(moe.n_ffn, 2 * H, D))  # (F, G, D)
        self.w_down = nn.Parameter(torch.empty(moe.n_ffn, D, H))  # (F, D, H)

    def forward(self, x_TD: Tensor, routing: Routing, terms: Terms | None = None) -> Tensor:
        if self.ranks is None:
            return ffn_experts(x_TD, routing, self.w_gate_up, self.w_down, terms)
        return self.spread(x_TD, routing, self.ranks, terms)

    @torch.compiler.disable
    def spread(self, x_TD: Tensor, routing: Routing, ranks: dist.ProcessGroup, terms: Terms | None) -> Tensor:
        """The same with experts on other ranks (dispatch.py)."""
        dispatcher = Dispatcher(routing, ranks)
        w_gate_up, w_down = (local_part(weight, ranks.size()) for weight in (self.w_gate_up, self.w_down))
        y_AD = ffn_experts(*dispatcher.to_experts(x_TD), w_gate_up, w_down)
        y_TD = dispatcher.to_tokens(y_AD)
        return y_TD if terms is None else y_TD + terms.value(x_TD)


def local_part(weight: Tensor, n_ranks: int) -> Tensor:
    """The part of it that is on this rank. Its gradient, of the tokens of all ranks, is the mean over them, as all
    others are."""
    part = local(weight)
    part = part.view_as(part)  # on a parameter itself the hook would stay
    if part.requires_grad:
        part.register_hook(lambda grad: grad / n_ranks)
    return part


def ffn_experts(
    x_TD: Tensor, routing: Routing, w_gate_up_FGD: Tensor, w_down_FDH: Tensor, terms: Terms | None = None
) -> Tensor:
    """(T, D): the gate-weighted sum of their outputs, and on top the `terms` of zero-computation experts."""
    w_gate_up_FGD, w_down_FDH = w_gate_up_FGD.to(x_TD.dtype), w_down_FDH.to(x_TD.dtype)
    if not use_grouped(x_TD, w_down_FDH):
        return looped_experts(x_TD, routing, w_gate_up_FGD, w_down_FDH, *(terms or ()))
    y_TD = grouped_experts(x_TD, routing, w_gate_up_FGD, w_down_FDH)
    return y_TD if terms is None else y_TD + terms.value(x_TD)


def use_grouped(x_TD: Tensor, w_down_FDH: Tensor) -> bool:
    """The one seam: `grouped_mm` where it has a kernel (bf16 on CUDA, rows of whole 16 bytes), else the loop."""
    aligned = w_down_FDH.shape[1] % 8 == 0 and w_down_FDH.shape[2] % 8 == 0
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and aligned
