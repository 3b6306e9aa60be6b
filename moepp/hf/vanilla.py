"""Whether a block of transformers is a vanilla MoE layer, read off what it is made of and what it computes.

Not off its name: what is built like Mixtral's is welcome, and what routes in another way is found out.
T tokens, D hidden size, F FFN experts, K choices a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.model import InputError, MoEConfig, Routing
from moepp.model.experts import ffn_experts

from .modules import SwappedBlock

N_PROBES = 16  # tokens
TENSORS = {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


def vanilla(layer: nn.Module, where: str) -> dict[str, Any]:
    """What of a MoEConfig the `mlp` of a decoder layer decides: n_ffn, top_k, renormalize.

    Raises:
        InputError: it is not one softmax top-k router with SwiGLU experts behind it, and nothing else.
    """
    block: Any = getattr(layer, "mlp", None)
    if isinstance(block, SwappedBlock):
        raise InputError(f"{where}: has our layer already")
    parts = [*block.named_parameters(), *block.named_buffers()] if isinstance(block, nn.Module) else []
    if (found := {name for name, _ in parts}) != TENSORS:
        said = ", ".join(sorted(found)) or "nothing"
        raise InputError(f"{where}: its mlp must consist of {', '.join(sorted(TENSORS))}, not of {said}")
    if any("forward" in vars(module) for module in (layer, block, block.gate, block.experts)):
        raise InputError(f"{where}: something wraps it already, a device map over several devices perhaps")
    if getattr(block, "jitter_noise", 0):
        raise InputError(f"{where}: router_jitter_noise={block.jitter_noise} is not supported")
    weight_FD = block.gate.weight
    if weight_FD.is_meta:
        raise InputError(f"{where}: it has no weights yet, they are on the meta device")
    x_TD = torch.randn(N_PROBES, weight_FD.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_FD)
    x_TD[0] = 0  # all scores are equal: gates of 1/K are renormalised, those of 1/F are not
    try:
        logits_TF, gates_TK, experts_TK = block.gate(x_TD)
    except TypeError as error:  # our own exported models' want the logits of the layer before
        raise InputError(f"{where}: its gate takes more than hidden states") from error
    n_ffn, top_k = len(weight_FD), experts_TK.shape[1]
    renormalize = bool(gates_TK[0].sum() > (1 + top_k / n_ffn) / 2) or top_k == n_ffn
    chosen_TK = logits_TF.gather(1, experts_TK)
    expected_TK = (chosen_TK if renormalize else logits_TF).float().softmax(-1)
    if not renormalize:
        expected_TK = expected_TK.gather(1, experts_TK)
    best_TK = logits_TF.topk(top_k).values
    if not (
        close(logits_TF, F.linear(x_TD, weight_FD))
        and torch.equal(chosen_TK.sort().values, best_TK.sort().values)
        and close(gates_TK, expected_TK)
    ):
        raise InputError(f"{where}: its gate is not a linear router with a softmax and the top k")
    moe = MoEConfig(n_ffn=n_ffn, n_zero=0, n_copy=0, n_const=0, top_k=top_k)
    routing = Routing(logits_TF, experts_TK, gates_TK.float(), logits_TF, None, moe)
    y_TD = ffn_experts(x_TD, routing, block.experts.gate_up_proj, block.experts.down_proj)
    if not close(block(x_TD[None])[0], y_TD):
        raise InputError(f"{where}: its mlp computes something else than SwiGLU experts behind a router")
    return {"n_ffn": n_ffn, "top_k": top_k, "renormalize": renormalize}


def close(theirs: Tensor, ours: Tensor) -> bool:
    """Equal but for rounding, in float32 at best."""
    eps = max(torch.finfo(theirs.dtype).eps, torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)
    if theirs.shape != ours.shape:
        return False
    return bool((theirs - ours).abs().max() <= eps**0.5 * ours.abs().max())
