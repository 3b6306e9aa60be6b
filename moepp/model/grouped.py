"""FFN experts on a GPU: grouped products over rows sorted by expert, without a host sync.

T tokens, D hidden size, H intermediate size, G = 2H (gate, then up), F = n_ffn, R rows, those of FFN experts in
front (plan.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .permute import Combine, Dispatch
from .plan import Plan
from .router import Routing


def grouped_experts(x_TD: Tensor, routing: Routing, w_gate_up_FGD: Tensor, w_down_FDH: Tensor) -> Tensor:
    """(T, D): the gate-weighted sum of the FFN experts' outputs."""
    plan = Plan.of(routing.experts, routing.computed(), len(w_down_FDH), routing.max_computed())
    rows_RD = grouped_swiglu(Dispatch.apply(x_TD, plan), w_gate_up_FGD, w_down_FDH, plan.count_F)
    return Combine.apply(rows_RD, routing.gates, plan)


def grouped_swiglu(x_RD: Tensor, w_gate_up_FGD: Tensor, w_down_FDH: Tensor, count_F: Tensor) -> Tensor:
    """All experts in two grouped products, gate and up in one, then down; rows after the last are garbage."""
    offsets_F = count_F.cumsum(0).to(torch.int32)
    gate_RH, up_RH = F.grouped_mm(x_RD, w_gate_up_FGD.transpose(1, 2), offs=offsets_F).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_RH) * up_RH, w_down_FDH.transpose(1, 2), offs=offsets_F)
