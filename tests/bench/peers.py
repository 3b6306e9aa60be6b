"""What the bench compares the MoE++ layer and model with, and how routing is forced for that.

T tokens, D hidden size, H intermediate size, G = 2H (gate, then up), E experts, F = n_ffn, K choices a token,
A = T·K assignments, N rows of an expert.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.model import InputError, MoEConfig, MoELayer, Routing, Transformer, TransformerConfig
from moepp.model.hub import tensor_names as mixtral_names  # a vanilla MoE's are Mixtral's, in memory
from moepp.model.router import Router
from moepp.model.weights import dense_names, taken_apart

# ---- forced routing ----------------------------------------------------------------------------------------


def spread_evenly(n_tokens: int, moe: MoEConfig, ffn_share: float, seed: int = 0) -> Tensor:
    """(T, K) int64: FFN experts get `ffn_share` of all assignments, exact to rounding, each kind spread evenly.

    In a list of assignments sorted by expert, two that lie T apart are of different experts as long as none has
    more than T. So token t takes the entries t, t + T, …; then the tokens are shuffled.
    """
    n_assignments = n_tokens * moe.top_k
    n_ffn_rows = round(n_assignments * ffn_share)
    ffn_A = torch.arange(n_ffn_rows) % moe.n_ffn
    others_A = moe.n_ffn + torch.arange(n_assignments - n_ffn_rows) % max(1, moe.n_zero_computation)
    sorted_A = torch.cat((ffn_A, others_A)).sort().values
    if sorted_A.bincount().max() > n_tokens or sorted_A[-1] >= moe.n_experts:
        raise InputError(f"an FFN share of {ffn_share:g} of {moe.top_k} choices is impossible with {moe}")
    shuffled_T = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))
    return sorted_A.view(moe.top_k, n_tokens).T[shuffled_T].contiguous()


def force(router: nn.Module, experts_TK: Tensor) -> None:
    """From now on `router`, ours or a Mixtral's, does all its work and is then overruled: it chooses `experts_TK`,
    with the gates that it gives them. Its time stays in what is measured, and its weights keep their gradient."""
    router.register_buffer("forced_TK", experts_TK, persistent=False)
    if not isinstance(router, Router):
        router.register_forward_hook(overrule_mixtral)
        return
    choose = router.choose
    # it is never below 0, but a compiler does not know that and so keeps the top-k
    router.choose = lambda scores_TE: forced(router).where(choose(scores_TE) >= 0, -1)  # type: ignore[method-assign]


def forced(router: Any) -> Tensor:
    return router.forced_TK


def overrule_mixtral(gate: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    logits_TE = outputs[0]
    return logits_TE, logits_TE.float().gather(1, gate.forced_TK).softmax(-1), gate.forced_TK


# ---- layers ------------------------------------------------------------------------------------------------


def copies(stacked: Tensor) -> nn.ParameterList:
    """A parameter of its own for each expert's part of a stacked one."""
    return nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in stacked)


class DenseExperts(nn.Module):
    """The limit: rows that need no gathering, through plain SwiGLU products, as a Llama's MLP computes them.

    Args:
        w_gate_up_FGD: as FFNExperts stores it; each expert gets copies of its own.
        w_down_FDH: likewise.
    """

    def __init__(self, w_gate_up_FGD: Tensor, w_down_FDH: Tensor) -> None:
        super().__init__()
        gates_FHD, ups_FHD = w_gate_up_FGD.chunk(2, dim=1)
        self.gate, self.up, self.down = copies(gates_FHD), copies(ups_FHD), copies(w_down_FDH)

    def forward(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """One (N, D) per expert → one (N, D) per expert."""
        experts = zip(rows, self.gate, self.up, self.down, strict=True)
        return [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in experts]


class ReleasedLoop(nn.Module):
    """A MoELayer with its experts computed as in the released code: one module after the other over all E experts,
    the zero-computation ones too. Where that writes in place, so that autograd refuses, this does not; and all
    experts' outputs are added up at once, since adding each out of place would copy (T, D) for every expert.

    After MOELayer in moe_plus_plus_layer.py of github.com/SkyworkAI/MoE-plus-plus, written afresh.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.moe, self.router = layer.moe, layer.router
        self.gate_up, self.down = copies(layer.ffn.w_gate_up), copies(layer.ffn.w_down)
        if layer.zero_computation is not None:
            self.mix, self.constants = copies(layer.zero_computation.mix), copies(layer.zero_computation.constants)

    def forward(self, x: Tensor, previous_logits: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.router(x.reshape(-1, *x.shape[-2:]), previous_logits)
        x_TD = x.reshape(-1, x.shape[-1])
        tokens, outputs = [], []
        for e in range(self.moe.n_experts):
            token_N, choice_N = torch.nonzero(routing.experts == e, as_tuple=True)
            out_ND = self.expert(e, x_TD.index_select(0, token_N))
            tokens.append(token_N)
            outputs.append(out_ND * routing.gates[token_N, choice_N, None].to(out_ND.dtype))
        output_AD = torch.cat(outputs)
        y_TD = torch.zeros_like(x_TD, dtype=output_AD.dtype).index_add(0, torch.cat(tokens), output_AD)
        return y_TD.view_as(x), routing

    def expert(self, e: int, x_ND: Tensor) -> Tensor:
        kinds = self.moe.kinds
        if e < kinds["ffn"].stop:
            gate, up = F.linear(x_ND, self.gate_up[e]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.down[e])
        if e < kinds["const"].stop:
            c = e - self.moe.n_ffn
            a_N2 = F.linear(x_ND, self.mix[c]).softmax(-1).to(x_ND.dtype)
            return a_N2[:, :1] * x_ND + a_N2[:, 1:] * self.constants[c].to(x_ND.dtype)
        return x_ND if e < kinds["copy"].stop else torch.zeros_like(x_ND)


# ---- models of transformers --------------------------------------------------------------------------------


def to_mixtral(model: Transformer, back_end: str) -> nn.Module:
    """transformers' MixtralForCausalLM with the weights of a vanilla MoE `model`, computing its experts by
    `back_end` (eager, batched_mm or grouped_mm)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    cast_for_grouped_mm()
    moe = model.moe_config
    config = MixtralConfig(**sizes(model.config), num_local_experts=moe.n_ffn, num_experts_per_tok=moe.top_k)
    mixtral = MixtralForCausalLM(config)
    mixtral.set_experts_implementation(back_end)
    return filled(mixtral, taken_apart(model, mixtral_names(model.config, moe)))


@cache
def cast_for_grouped_mm() -> None:
    """Have transformers' `grouped_mm` compute in autocast's dtype, as ours does. Autocast does not know it: with
    float32 weights it would compute in float32, or compiled by a loop."""
    from transformers.integrations import moe

    as_it_is = moe._grouped_mm

    def grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        return as_it_is(input, weight, offs)

    moe._grouped_mm = grouped_mm


def to_llama(model: Transformer) -> nn.Module:
    """transformers' LlamaForCausalLM with the weights of a `model` of a single FFN expert."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = taken_apart(model, dense_names(model.config))
    for i, block in enumerate(blocks(model)):
        layer = f"model.layers.{i}.mlp"
        state[f"{layer}.gate_proj.weight"], state[f"{layer}.up_proj.weight"] = block.moe.ffn.w_gate_up[0].chunk(2)
        state[f"{layer}.down_proj.weight"] = block.moe.ffn.w_down[0]
    return filled(LlamaForCausalLM(LlamaConfig(**sizes(model.config))), state)


def blocks(model: Transformer) -> Iterable[Any]:
    return model.blocks


def sizes(config: TransformerConfig) -> dict[str, Any]:
    """What Llama's and Mixtral's configurations have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def filled(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state, strict=True)
    return model.train()


# ---- parity ------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the norm of what is expected


class NotEqual(Exception):
    """A peer computes something else, so there is nothing to compare."""


def check(what: str, actual: Tensor, expected: Tensor) -> None:
    """Two results of the same computation differ by rounding alone.

    Raises:
        NotEqual: ‖actual − expected‖ is more than TOLERANCE of ‖expected‖, or not finite.
    """
    tolerance = TOLERANCE[torch.promote_types(actual.dtype, torch.bfloat16)]
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm())
    if not error <= tolerance:  # NaN is no parity either
        raise NotEqual(f"{what}: differs by {error:.1e} of its norm, allowed is {tolerance:.0e}")
