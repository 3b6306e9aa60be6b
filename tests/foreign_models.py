"""Tiny random models of transformers, built from its own configurations."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="these are its models: pip install 'moepp[hf]'")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that experts differ, and choices are clear
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": None}),
    "mixtral, tied, heads of 16": (
        "Mixtral",
        {"num_local_experts": 4, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 16, "head_dim": 16}),
    "qwen3_moe, renormalised": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "moe_intermediate_size": 24}),
    "olmoe": ("Olmoe", EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "olmoe, renormalised": ("Olmoe", EXPERTS | {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def build(name: str) -> Any:
    """A model in evaluation mode, the same at every call."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**SIZES | options)
    )
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # gains of 1 would not tell one norm from another
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
