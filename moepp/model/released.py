"""The format of the released MoE++ checkpoints: a Hugging Face folder, read into a Transformer and written back.

The format holds exactly one zero, one copy and two constant experts, in the order FFN, constant, copy, zero, and
top-2 routing.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .config import MoEConfig, TransformerConfig
from .errors import InputError
from .transformer import Transformer
from .weights import (
    KEYS,
    FolderTensors,
    Parts,
    complete,
    dense_names,
    fill,
    naming,
    read_json,
    save_shards,
    taken_apart,
)

# nothing else fits the format
HELD: dict[str, Any] = {"n_zero": 1, "n_copy": 1, "n_const": 2, "top_k": 2}
PLAIN: dict[str, Any] = {
    "renormalize": True,
    "score_bias": False,
    "ffn_budget": None,
    "qk_norm": "none",
    "head_size": None,
}
STACKED = ("w_gate_up", "w_down", "constants", "mix")  # parameters of ours that stack one tensor per expert
SIZES = {  # our fields, and their keys in config.json
    field.name: KEYS.get(field.name, field.name) for field in fields(TransformerConfig) if field.name not in PLAIN
}


def load_released(folder: str | Path) -> Transformer:
    """Read a released folder: `config.json` with `.safetensors` or `.bin` shards.

    Raises:
        InputError: a file is missing, is not of this format, or its tensors do not fit its config.
    """
    folder = Path(folder)
    transformer, moe = read_config(folder)
    model = Transformer(transformer, moe)
    fill(model, FolderTensors(folder), complete(model, tensor_names(transformer, moe)))
    return model.eval()


def export_released(model: Transformer, folder: str | Path) -> None:
    """Write `model` as a released folder (`config.json` and `.safetensors`).

    Raises:
        InputError: the model has a shape that the format cannot hold.
    """
    folder = Path(folder)
    config = write_config(model.config, model.moe_config)
    names = complete(model, tensor_names(model.config, model.moe_config))
    tensors = taken_apart(model, names, STACKED)
    E = model.moe_config.n_experts
    for i in range(model.config.n_layers):  # no gating residual is a residual of zero; layer 0's is never used
        tensors.setdefault(f"model.layers.{i}.mlp.moe.gate.gate_map.weight", torch.zeros(E, E))
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(tensors, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tensor_names(transformer: TransformerConfig, moe: MoEConfig) -> Iterator[tuple[str, Parts]]:
    """(our parameter, the released tensors it is made of) for every parameter."""
    yield from dense_names(transformer)
    router = {1: [""], 2: ["0.", "2."]}[moe.router_depth]
    ffn, const = range(moe.n_ffn), range(moe.n_ffn, moe.n_ffn + moe.n_const)
    for i in range(transformer.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        gate, expert = f"{theirs}.mlp.moe.gate", f"{theirs}.mlp.moe.experts.experts"
        for j, infix in enumerate(router):
            yield f"{ours}.moe.router.weights.{j}", [[f"{gate}.wg.{infix}weight"]]
        if moe.gating_residual and i > 0:
            yield f"{ours}.moe.router.residual", [[f"{gate}.gate_map.weight"]]
        yield f"{ours}.moe.ffn.w_gate_up", [[f"{expert}.{n}.up_proj.weight"] for n in ffn]
        yield f"{ours}.moe.ffn.w_down", [[f"{expert}.{n}.down_proj.weight"] for n in ffn]
        yield f"{ours}.moe.zero_computation.constants", [[f"{expert}.{n}.constant"] for n in const]
        yield f"{ours}.moe.zero_computation.mix", [[f"{expert}.{n}.wg.weight"] for n in const]


def read_config(folder: Path) -> tuple[TransformerConfig, MoEConfig]:
    path = folder / "config.json"
    config = read_json(folder)
    with naming(path):
        if config["model_type"] != "MoE++":
            raise InputError(f"model_type is {config['model_type']!r}, not 'MoE++'")
        if config.get("rope_scaling") or config.get("moe_expert_interval", 1) != 1:
            raise InputError("rope_scaling and moe_expert_interval other than 1 are not supported")
        (n_experts,) = config["num_experts"]
        mixtral_gating = config["moe_use_mixtral_gating"]
        scaled = not (mixtral_gating or config["moe_feature_no_mul_topk"])
        transformer = TransformerConfig(**{ours: config[theirs] for ours, theirs in SIZES.items()})
        moe = MoEConfig(
            n_ffn=n_experts - MoEConfig(**HELD).n_zero_computation,
            **HELD,
            router_depth=2 if config["moe_2layer_gate"] else 1,
            scale_expert_input=float(HELD["top_k"]) if scaled else 1.0,
            logits_norm_std=config["moe_gate_norm_std"] if config["moe_use_logits_norm"] else None,
            renormalize_without_zero=not mixtral_gating,
        )
    return transformer, moe


def write_config(transformer: TransformerConfig, moe: MoEConfig) -> dict[str, Any]:
    for name, value in (HELD | PLAIN).items():
        part, config = ("moe", moe) if hasattr(moe, name) else ("transformer", transformer)
        if (said := getattr(config, name)) != value:
            raise InputError(
                f"{part}.{name}: the released format holds exactly {value}, got {said}; --format=hf holds any"
            )
    mixtral_gating = not moe.renormalize_without_zero
    if moe.scale_expert_input not in ((1.0,) if mixtral_gating else (1.0, float(HELD["top_k"]))):
        raise InputError(f"moe.scale_expert_input: the released format cannot hold {moe.scale_expert_input}")
    return {
        "architectures": ["MoeForCausalLM"],
        "model_type": "MoE++",
        "hidden_act": "silu",
        **{theirs: getattr(transformer, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": transformer.kv_heads,  # ours may be null
        "rope_scaling": None,
        "num_experts": [moe.n_experts],
        "moe_expert_interval": 1,
        "moe_2layer_gate": moe.router_depth == 2,
        "moe_use_mixtral_gating": mixtral_gating,
        "moe_feature_no_mul_topk": moe.scale_expert_input == 1.0,
        "moe_use_logits_norm": moe.logits_norm_std is not None,
        "moe_gate_norm_std": 1.0 if moe.logits_norm_std is None else moe.logits_norm_std,
        "use_cache": False,
    }
