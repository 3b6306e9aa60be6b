"""A trained model made into another that computes the same: zero-computation experts added to a vanilla MoE, and
experts made of a dense model's FFN (sparse upcycling, arXiv 2212.05055).

An added expert's row in the router is the mean of the old rows plus some noise, its gating residual is 0, and a
bias on the scores keeps it at probability 0. Nobody is ever sent there, and no gradient arrives, until training
lets the bias rise (training/start.py).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .config import MoEConfig, require
from .errors import InputError
from .router import Router, routers
from .transformer import Transformer

SILENT = -1e4  # e to this is exactly 0, in float64 too


@torch.no_grad()
def add_zero_computation(
    model: Transformer,
    n_zero: int | None = None,
    n_copy: int = 0,
    n_const: int = 0,
    ffn_per_token: float | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> Transformer:
    """A model with the logits of `model`, which has further experts that no token chooses yet.

    Args:
        model: without zero-computation experts, its router linear.
        n_zero: as for `with_added`, and so are n_copy, n_const and ffn_per_token.
        noise: of the added rows, in standard deviations of the old rows about their mean; at 1 they are drawn as
            the old rows are spread.
        seed: of the noise.

    Raises:
        InputError: it has zero-computation experts already, or a router of another kind; nothing is to be added.
    """
    old = model.moe_config
    if old.n_zero_computation:
        raise InputError(f"the model has {old.n_zero_computation} zero-computation experts already")
    require(old.router_depth == 1, "moe.router_depth", old.router_depth, "must be 1 to add experts")
    require(old.logits_norm_std is None, "moe.logits_norm_std", old.logits_norm_std, "must be null to add experts")
    require(noise >= 0, "noise", noise, "must not be negative")
    moe = with_added(replace(old, gating_residual=True), n_zero, n_copy, n_const, ffn_per_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Transformer(model.config, moe)
        for old_router, new_router in zip(routers(model), routers(new), strict=True):
            add_rows(old_router, new_router, noise)
    copy_all_but_routers(model, new)
    set_bias(new, SILENT)
    return new.eval()


def with_added(
    old: MoEConfig, n_zero: int | None, n_copy: int, n_const: int, ffn_per_token: float | None
) -> MoEConfig:
    """`old` with zero-computation experts, balanced as a group against the FFN experts and let in by a bias.

    Args:
        n_zero: zero experts; None: one fewer than K, which leaves every token an FFN expert (with more the loss
            rose on the way, recipes/results/LOG.md), but one at least; or none beside others.
        n_copy: copy experts. The residual stream of a trained model has no room for what they add: the models of
            others broke (arXiv 2605.18643).
        n_const: constant experts.
        ffn_per_token: FFN experts that a token takes at balance, which sets τ; None: two thirds of K.
    """
    if n_zero is None:
        n_zero = 0 if n_copy or n_const else max(1, old.top_k - 1)
    require(n_zero + n_copy + n_const > 0, "n_zero", n_zero, "must be positive, or n_copy or n_const")
    moe = replace(old, n_zero=n_zero, n_copy=n_copy, n_const=n_const, balance_groups=True, score_bias=True)
    ffn_per_token = 2 / 3 * old.top_k if ffn_per_token is None else ffn_per_token
    moe.require_budget(ffn_per_token, "ffn_per_token")
    return replace(moe, tau=moe.tau_for(ffn_per_token))


def add_rows(old: Router, new: Router, noise: float) -> None:
    """Set the weights of `new`, which knows more experts, so that it scores the others as `old` does."""
    n_old, rows_ED = old.moe.n_experts, old.weights[0]
    new.weights[0][:n_old] = rows_ED
    new.weights[0][n_old:] = added_rows(rows_ED, new.moe.n_experts - n_old, noise)
    if new.residual is not None:
        new.residual.zero_()
        if old.residual is not None:
            new.residual[:n_old, :n_old] = old.residual


def added_rows(rows_ED: Tensor, n_added: int, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """(n_added, D) float32: a router's rows for further experts. The noise is drawn on the CPU."""
    rows_ED = rows_ED.float()
    noise_AD = torch.randn(n_added, rows_ED.shape[1], generator=generator).to(rows_ED.device)
    return rows_ED.mean(0) + noise * rows_ED.std(0, correction=0) * noise_AD


def set_bias(model: nn.Module, bias: float) -> None:
    """Of the scores of zero-computation experts, in every router: ours, and those of exported models.

    Raises:
        InputError: none has one.
    """
    found = [
        value for name, value in model.named_buffers() if name.rpartition(".")[2] == "bias" and value.dim() == 0
    ]
    if not found:
        raise InputError("no router has a bias on the scores of zero-computation experts: add such experts first")
    for value in found:
        value.fill_(bias)


def bias_at(step: int, start: float, steps: int) -> float:
    """The bias on added experts' scores at optimizer step `step`, from 0: from `start` to 0 over `steps`."""
    return start * (1 - step / steps) if step < steps else 0.0


@torch.no_grad()
def upcycle(model: Transformer, n_ffn: int, top_k: int = 2, seed: int = 0) -> Transformer:
    """A model with the logits of the dense `model`, whose FFN is `n_ffn` equal experts behind a new router.

    Raises:
        InputError: the model has experts already; `n_ffn` or `top_k` make no mixture.
    """
    old = model.moe_config
    require(old.n_experts == 1, "moe.n_ffn", old.n_experts, "must be 1, a dense model, to make experts of")
    require(n_ffn > 1, "n_ffn", n_ffn, "must be at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the gates of a single expert are 1 either way, those of equal experts have to add up to it
        new = Transformer(model.config, replace(old, n_ffn=n_ffn, top_k=top_k, renormalize=True))
    copy_all_but_routers(model, new)
    return new.eval()


def copy_all_but_routers(old: Transformer, new: Transformer) -> None:
    """A single expert's weights are copied to all of several."""
    for name, parameter in old.named_parameters():
        if ".router." not in name:
            new.get_parameter(name).copy_(parameter)
