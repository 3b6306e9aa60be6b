"""What a model costs: parameters and FLOPs from the configuration alone, without building it."""

from dataclasses import dataclass

from moepp.model.config import MoEConfig, TransformerConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by what they do. `active` is for a token that uses `ffn_per_token` FFN experts per layer."""

    embedding: int
    head: int
    attention: int
    router: int
    ffn_experts: int
    constants: int
    norms: int
    one_ffn_expert: int
    n_layers: int

    @property
    def total(self) -> int:
        dense = self.embedding + self.head + self.attention + self.router + self.constants + self.norms
        return dense + self.ffn_experts

    def active(self, ffn_per_token: float) -> float:
        """Parameters one token meets, with the *measured* FFN experts per token and layer."""
        return self.total - self.ffn_experts + self.n_layers * ffn_per_token * self.one_ffn_expert


def count_parameters(transformer: TransformerConfig, moe: MoEConfig) -> ParameterCount:
    """Counts from the configuration alone: nothing is built."""
    t, D, E = transformer, transformer.hidden_size, moe.n_experts
    router = E * D if moe.router_depth == 1 else 8 * E * D + 8 * E * E
    gating_residuals = E * E * (t.n_layers - 1) if moe.gating_residual else 0  # the first layer has none
    one_ffn_expert = 3 * D * t.intermediate_size
    return ParameterCount(
        embedding=t.vocab_size * D,
        head=0 if t.tie_embeddings else t.vocab_size * D,
        attention=t.n_layers * 2 * D * (D + t.kv_heads * t.head_dim),
        router=t.n_layers * router + gating_residuals,
        ffn_experts=t.n_layers * moe.n_ffn * one_ffn_expert,
        constants=t.n_layers * moe.n_const * 3 * D,
        norms=(2 * t.n_layers + 1) * D,
        one_ffn_expert=one_ffn_expert,
        n_layers=t.n_layers,
    )


def flops_per_token(transformer: TransformerConfig, moe: MoEConfig, seq_len: int, ffn_per_token: float) -> float:
    """Floating-point operations of one token's forward pass; a training step takes three times as many.

    Matrix products alone, a multiplication and an addition each; attention counts the causal half. Pass the
    *measured* FFN experts per token and layer: counting K would flatter MoE++, which computes fewer.
    """
    t, D, E = transformer, transformer.hidden_size, moe.n_experts
    projections = 2 * 2 * D * (D + t.kv_heads * t.head_dim)
    attention = 2 * 2 * D * (seq_len / 2)
    router = 2 * E * D if moe.router_depth == 1 else 2 * 8 * E * (D + E)
    gating_residuals = (t.n_layers - 1) * 2 * E * E if moe.gating_residual else 0
    constants = 2 * 2 * moe.n_const * D
    ffn = ffn_per_token * 2 * 3 * D * t.intermediate_size
    layer = projections + attention + router + constants + ffn
    return t.n_layers * layer + gating_residuals + 2 * D * t.vocab_size
