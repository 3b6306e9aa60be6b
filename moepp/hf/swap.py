"""Our layer put into a transformers model, in place."""

from functools import partial
from typing import Any

import torch
from torch import nn

from moepp.model import InputError, MoEConfig
from moepp.model.config import require
from moepp.model.conversion import SILENT, added_rows, with_added
from moepp.model.experts import ZeroComputationExperts
from moepp.model.init import init_parameters

from .loss import with_balance
from .modules import SwappedBlock, SwappedExperts, SwappedLayer, SwappedRouter, become, begin_pathway
from .vanilla import vanilla


@torch.no_grad()
def swap_moe(
    model: Any,
    n_zero: int | None = None,
    n_copy: int = 0,
    n_const: int = 0,
    ffn_per_token: float | None = None,
    noise: float = 0.1,
    gating_residual: bool = True,
    balance_weight: float = 0.01,
    seed: int = 0,
) -> Any:
    """Give a model of transformers our layer, with zero-computation experts that no token chooses yet.

    Its parameters stay the objects that they are, under the names that they have. New are, in each layer's `mlp`,
    `gate.added` (added rows of the router), `gate.residual` (W_g, not in the first layer), `gate.bias` (a buffer)
    and, with copy or constant experts, `zero_computation`. Let the bias rise (`BiasSchedule`, `set_bias`) or the
    added experts stay silent. The model's loss gets β·L_b while it trains; transformers' own balance loss, which
    knows nothing of τ, is switched off.

    Call it before anything else wraps the model (PEFT, FSDP, a device map over several devices) and before an
    optimizer is made.

    Args:
        model: a `PreTrainedModel` whose decoder layers all have an `mlp` of a softmax top-k router and SwiGLU
            experts: Mixtral, Qwen3-MoE, OLMoE, and others that are built like them.
        n_zero: zero experts to add; None: one fewer than K and one at least, as for `moepp convert`, or none
            beside others. 0 of every kind leaves the vanilla layer, computed by ours.
        n_copy: copy experts to add. Trained models have no room for what they add (arXiv 2605.18643).
        n_const: constant experts to add.
        ffn_per_token: FFN experts that a token takes at balance, which sets τ; None: two thirds of K.
        noise: of the added rows, in standard deviations of the old rows about their mean.
        gating_residual: add the previous layer's logits, by a W_g that starts at 0.
        balance_weight: β.
        seed: of the noise.

    Returns:
        `model` itself.

    Raises:
        InputError: it is not built so, or has been swapped already; nothing has been changed then.
    """
    decoder = getattr(model, "base_model", model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise InputError(f"swap_moe: {type(model).__name__} has no decoder layers that could be found")
    require(noise >= 0, "noise", noise, "must not be negative")
    configs = [
        MoEConfig(
            n_zero=0,
            n_copy=0,
            n_const=0,
            balance_weight=balance_weight,
            gating_residual=gating_residual,
            balance_over="device",  # processes of a Trainer need not have as many tokens, or all ask for the loss
            **vanilla(layer, f"swap_moe: {type(model).__name__}, layer {i}"),
        )
        for i, layer in enumerate(layers)
    ]
    if (n_zero, n_copy, n_const) == (0, 0, 0):
        require(ffn_per_token is None, "ffn_per_token", ffn_per_token, "needs experts to be added")
    else:
        configs = [with_added(moe, n_zero, n_copy, n_const, ffn_per_token) for moe in configs]
    generator = torch.Generator().manual_seed(seed)
    for i, (layer, moe) in enumerate(zip(layers, configs, strict=True)):
        swap_block(layer.mlp, moe, noise, generator, first=i == 0)
        become(layer, SwappedLayer)
    decoder.register_forward_pre_hook(begin_pathway, with_kwargs=True)
    model.loss_function = partial(with_balance, decoder, model.loss_function)
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = 0.0
        model.num_experts = configs[0].n_experts  # theirs is computed nevertheless, with output_router_logits
    return model


def swap_block(block: Any, moe: MoEConfig, noise: float, generator: torch.Generator, first: bool) -> None:
    gate, weight_FD = block.gate, block.gate.weight
    D, E, n_added = weight_FD.shape[1], moe.n_experts, moe.n_zero_computation
    gate.moe, gate.added, gate.residual, gate.choice_bias = moe, None, None, None
    if n_added:
        gate.added = nn.Parameter(added_rows(weight_FD, n_added, noise, generator).to(weight_FD))
    if moe.gating_residual and not first:
        gate.residual = nn.Parameter(weight_FD.new_zeros(E, E))
    gate.register_buffer("bias", torch.tensor(SILENT, device=weight_FD.device) if n_added else None)
    become(gate, SwappedRouter)
    become(block.experts, SwappedExperts)
    block.moe, block.pathway, block.previous_logits_TE = moe, None, None
    block.zero_computation = None
    if moe.n_copy or moe.n_const:
        block.zero_computation = ZeroComputationExperts(D, moe).to(weight_FD)
        init_parameters(block.zero_computation, int(torch.randint(2**62, (), generator=generator)))
    become(block, SwappedBlock)
