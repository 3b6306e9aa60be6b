"""What a model costs: parameters, memory and FLOPs from the configuration alone, without building it."""

import os
from dataclasses import dataclass

import torch

from .config import Configs, MoEConfig, TransformerConfig
from .errors import InputError


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
    q_width, kv_width = t.n_heads * t.head_dim, t.kv_heads * t.head_dim
    qk_gains = {"none": 0, "head": 2 * t.head_dim, "width": q_width + kv_width}[t.qk_norm]
    return ParameterCount(
        embedding=t.vocab_size * D,
        head=0 if t.tie_embeddings else t.vocab_size * D,
        attention=t.n_layers * 2 * D * (q_width + kv_width),
        router=t.n_layers * router + gating_residuals,
        ffn_experts=t.n_layers * moe.n_ffn * one_ffn_expert,
        constants=t.n_layers * moe.n_const * 3 * D,
        norms=(2 * t.n_layers + 1) * D + t.n_layers * qk_gains,
        one_ffn_expert=one_ffn_expert,
        n_layers=t.n_layers,
    )


def require_memory(config: TransformerConfig, moe: MoEConfig) -> None:
    """Raise an InputError where the model alone would not fit this machine's memory."""
    if torch.get_default_device().type != "cpu" or not hasattr(os, "sysconf"):
        return
    numbers = count_parameters(config, moe).total + 2 * config.context_length * config.head_dim
    needed, there = 4 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"a model of these sizes needs {needed / 1e9:.3g} GB, this machine has {there / 1e9:.3g} GB: lower "
            "transformer.hidden_size, intermediate_size, n_layers, vocab_size or context_length, or moe.n_ffn"
        )


def flops_per_token(transformer: TransformerConfig, moe: MoEConfig, seq_len: int, ffn_per_token: float) -> float:
    """Floating-point operations of one token's forward pass; a training step takes three times as many.

    Matrix products alone, a multiplication and an addition each; attention counts the causal half. Pass the
    *measured* FFN experts per token and layer: counting K would flatter MoE++, which computes fewer.
    """
    head = 2 * transformer.vocab_size * transformer.hidden_size  # where it is tied to the embedding, too
    return hidden_flops_per_token(transformer, moe, seq_len, ffn_per_token) + head


def hidden_flops_per_token(
    transformer: TransformerConfig, moe: MoEConfig, seq_len: int, ffn_per_token: float
) -> float:
    """The same without the head (`Transformer.hidden`)."""
    t, count = transformer, count_parameters(transformer, moe)
    ffn = t.n_layers * ffn_per_token * count.one_ffn_expert
    attention = t.n_layers * 2 * 2 * t.n_heads * t.head_dim * (seq_len / 2)
    constants = t.n_layers * 2 * 2 * moe.n_const * t.hidden_size
    return 2 * (count.attention + count.router + ffn) + attention + constants


def training_flops_per_token(
    student: Configs, seq_len: int, ffn_per_token: float, teacher: Configs | None = None
) -> float:
    """Of a training step: forward and backward, and forward through a teacher, with the FFN experts that its
    balance asks for. The rest as for `flops_per_token`."""
    flops = 3 * flops_per_token(*student, seq_len, ffn_per_token)
    if teacher is not None:
        flops = flops + flops_per_token(*teacher, seq_len, teacher[1].expected_ffn_per_token)
    return flops
