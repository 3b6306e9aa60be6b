"""The MoE++ layer as the paper's equations read: one token, one expert at a time, in float64, by plain loops."""

import math

import torch
from torch import Tensor

from moepp.model import MoEConfig, MoELayer


def oracle_layer(
    layer: MoELayer, x_TD: Tensor, previous_TE: Tensor | None = None, training: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (T, D), logits (T, E), L_b). Tokens are positions of one sequence. Differentiable by plain autograd."""
    moe, E = layer.moe, layer.moe.n_experts
    room = capacities(moe, len(x_TD)) if training and moe.capacity_factor else [math.inf] * E
    outputs, logits, unbiased_by_token, probs_by_token = [], [], [], []
    for t, x in enumerate(x_TD):
        g = x
        for i, weight in enumerate(layer.router.weights):
            g = weight @ (g.tanh() if i else g)
        if previous_TE is not None and layer.router.residual is not None:
            g = g + layer.router.residual @ previous_TE[t]
        scores = g
        if moe.score_bias:
            scores = torch.stack([g[i] + (0 if kind(moe, i) == "ffn" else layer.router.bias) for i in range(E)])
        probs = [
            torch.exp(scores[i] - scores.max()) / sum(torch.exp(scores[j] - scores.max()) for j in range(E))
            for i in range(E)
        ]
        choice = scores.clone()
        if moe.ffn_budget is not None:
            choice[moe.n_ffn :] += layer.router.choice_bias[0 if layer.training else 1]
        chosen = best(choice, moe.top_k)
        weighed = [i for i in chosen if kind(moe, i) != "zero"]
        y = torch.zeros_like(x)
        for i in weighed:
            gate = probs[i] / sum(probs[j] for j in weighed) if moe.renormalize else probs[i]
            if room[i] > 0:
                y = y + gate * expert(layer, i, x)
        for i in chosen:
            room[i] -= 1
        outputs.append(y)
        logits.append(g)
        unbiased_by_token.append(best(scores, moe.top_k))
        probs_by_token.append(probs)
    T, loss = len(x_TD), torch.zeros((), dtype=x_TD.dtype)
    if moe.balance_groups:  # ZEDA's formula (arXiv 2605.18643) with w = 1/τ, in equation 7's units
        for eta, members in ((1.0, range(moe.n_ffn)), (tau_of(moe), range(moe.n_ffn, E))):
            f = sum(i in chosen for chosen in unbiased_by_token for i in members) / T
            P = sum(probs[i] for probs in probs_by_token for i in members) / T
            loss = loss + (eta * f * P / len(members) if len(members) else 0)
    for i in range(E if not moe.balance_groups else 0):
        eta = 1.0 if kind(moe, i) == "ffn" else tau_of(moe)
        f = sum(i in chosen for chosen in unbiased_by_token) / T
        loss = loss + eta * f * sum(probs[i] for probs in probs_by_token) / T
    return torch.stack(outputs), torch.stack(logits), loss


def best(scores_E: Tensor, k: int) -> list[int]:
    return sorted(range(len(scores_E)), key=lambda i: -scores_E[i].item())[:k]


def kind(moe: MoEConfig, i: int) -> str:
    return (["ffn"] * moe.n_ffn + ["const"] * moe.n_const + ["copy"] * moe.n_copy + ["zero"] * moe.n_zero)[i]


def capacities(moe: MoEConfig, n_tokens: int) -> list[float]:
    assert moe.capacity_factor is not None
    tau = tau_of(moe)
    unit = moe.capacity_factor * n_tokens * moe.top_k / (tau * moe.n_ffn + moe.n_const + moe.n_copy + moe.n_zero)
    return [math.floor(unit * (tau if kind(moe, i) == "ffn" else 1)) for i in range(moe.n_experts)]


def tau_of(moe: MoEConfig) -> float:
    """That of which as many FFN experts come at balance: K·τ·N_FFN / (τ·N_FFN + N_ZC) = the budget."""
    if moe.ffn_budget is None:
        return moe.tau
    n_others = moe.n_const + moe.n_copy + moe.n_zero
    return n_others * moe.ffn_budget / (moe.n_ffn * (moe.top_k - moe.ffn_budget))


def expert(layer: MoELayer, i: int, x: Tensor) -> Tensor:
    moe = layer.moe
    match kind(moe, i):
        case "ffn":
            w_gate, w_up = layer.ffn.w_gate_up[i].chunk(2)
            gate = w_gate @ x
            return layer.ffn.w_down[i] @ (gate * torch.sigmoid(gate) * (w_up @ x))
        case "const":
            c = i - moe.n_ffn
            a1, a2 = torch.softmax(layer.zero_computation.mix[c] @ x, 0)
            return a1 * x + a2 * layer.zero_computation.constants[c]
        case "copy":
            return x
        case _:
            return torch.zeros_like(x)
