"""Heterogeneous load balance: the loss that spreads tokens over experts, and the capacity that caps them.

T tokens, E experts, K choices a token, A = T·K assignments.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .config import MoEConfig


def count_assignments(experts_TK: Tensor, n_experts: int) -> Tensor:
    """(E,) int64: how many tokens chose each expert. Deterministic, and without a host sync on CUDA."""
    one_hot_EA = torch.arange(n_experts, device=experts_TK.device)[:, None] == experts_TK.flatten()
    return one_hot_EA.sum(1)


def shares(count_XE: Tensor, moe: MoEConfig) -> Tensor:
    """f_i (…, E), the share of tokens that chose expert i: of this device's tokens, or of all devices' in
    `balance_over: batch` (arXiv 2501.11873), where all have to ask for it."""
    if moe.balance_over == "batch" and dist.is_initialized():
        count_XE = count_XE.clone()
        dist.all_reduce(count_XE)
    return count_XE / (count_XE.sum(-1, keepdim=True) / moe.top_k)  # each token has K choices


def load_balance_loss(probs_XTE: Tensor, f_XE: Tensor, moe: MoEConfig) -> Tensor:
    """(…), of each layer: L_b = Σ_i η_i f_i P_i with η = 1 for FFN experts and τ for the others (equation 7).

    f_i (`shares`), counted before any capacity and without the bias that holds a budget, carries no gradient;
    P_i is the mean probability of expert i here: what gradients of several devices are averaged to is that of the
    mean over all tokens. With `balance_groups` both are taken as spread evenly over the FFN experts, and over the
    others: their shares are balanced, single experts are not.
    """
    P_XE = probs_XTE.mean(-2)
    if moe.balance_groups:
        f_XE, P_XE = evened(f_XE, moe), evened(P_XE, moe)
    eta_XE = torch.full_like(P_XE, moe.balance_tau)
    eta_XE[..., moe.kinds["ffn"]] = 1.0
    return (eta_XE * f_XE * P_XE).sum(-1)


def evened(value_XE: Tensor, moe: MoEConfig) -> Tensor:
    """Each group of experts, FFN and others, with its mean."""
    groups = value_XE.split([moe.n_ffn, moe.n_zero_computation], dim=-1)
    return torch.cat([group.mean(-1, keepdim=True).expand_as(group) for group in groups if group.numel()], dim=-1)


def whole_capacities(moe: MoEConfig, n_tokens: int) -> tuple[int, int]:
    """`moe.capacities`, rounded down to whole assignments."""
    ffn, zero_computation = moe.capacities(n_tokens)
    return math.floor(ffn), math.floor(zero_computation)


def within_capacity(experts_BSK: Tensor, moe: MoEConfig) -> Tensor:
    """(B, S, K) bool: which assignments their expert still has room for (equation 8).

    Served in the order of positions, over all sequences of the batch at once: what a token is granted never
    depends on later tokens, so the model stays causal.
    """
    B, S, K = experts_BSK.shape
    ffn, zero_computation = whole_capacities(moe, B * S)
    experts_A = experts_BSK.transpose(0, 1).reshape(-1)  # position first
    order_A = experts_A.argsort(stable=True)  # by expert, within an expert by position
    count_E = count_assignments(experts_A, moe.n_experts)
    first_E = count_E.cumsum(0) - count_E
    rank_A = torch.empty_like(order_A)
    rank_A[order_A] = torch.arange(len(order_A), device=order_A.device) - first_E[experts_A[order_A]]
    capacity_E = torch.full_like(count_E, zero_computation)
    capacity_E[moe.kinds["ffn"]] = ffn
    return (rank_A < capacity_E[experts_A]).view(S, B, K).transpose(0, 1)
