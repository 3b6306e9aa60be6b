"""A folder that transformers opens, with our model's code beside the weights (moepp/hf), read and written.

It holds every model that our configurations describe. Tensors have the names that Llama and Mixtral have there.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import MoEConfig, TransformerConfig
from .errors import InputError
from .router import routers
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

MODEL_TYPE = "moepp"
BUDGET = "model.budget."  # its buffers, which the code in the folder has no use for
MOE_KEYS = {  # of our MoEConfig's fields, as in weights.KEYS
    "n_ffn": "num_experts",
    "top_k": "num_experts_per_tok",
    "balance_weight": "router_aux_loss_coef",
    "renormalize": "norm_topk_prob",
}


def load_hub(folder: str | Path) -> Transformer:
    """Read a folder of `export_hub`, or what transformers made of one: `config.json` and `.safetensors`.

    Raises:
        InputError: a file is missing, is not of this format, or its tensors do not fit its config.
    """
    folder = Path(folder)
    transformer, moe = read_config(folder)
    model = Transformer(transformer, moe)
    tensors = FolderTensors(folder)
    fill(model, tensors, complete(model, tensor_names(transformer, moe)))
    for name, buffer in buffers(model):
        if name.startswith(BUDGET) and name not in tensors:
            continue  # transformers does not write it; the model keeps to the budget that it has
        value = tensors[name]
        if value.shape != buffer.shape or not value.isfinite().all():
            raise InputError(f"{folder}: {name} is not of shape {tuple(buffer.shape)} and finite")
        buffer.copy_(value)
    return model.eval()


def export_hub(model: Transformer, folder: str | Path, **more: Any) -> None:
    """Write `config.json`, with the keys of `more` as well, and `.safetensors`. The code that `auto_map` names is
    for the caller to put beside them (training/hub_folder.py)."""
    folder, config = Path(folder), model.config
    tensors = taken_apart(model, complete(model, tensor_names(config, model.moe_config)))
    tensors |= dict(buffers(model))
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(tensors, folder)
    content = write_config(config, model.moe_config) | more
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def buffers(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name in the folder, tensor) of what a model keeps beside its parameters."""
    for i, router in enumerate(routers(model)):
        for name, buffer in {"bias": router.bias, "choice_bias": router.choice_bias}.items():
            if buffer is not None:
                yield f"model.layers.{i}.mlp.gate.{name}", buffer
    if model.budget is not None:
        for name, buffer in model.budget.named_buffers():
            yield BUDGET + name, buffer


def tensor_names(transformer: TransformerConfig, moe: MoEConfig) -> Iterator[tuple[str, Parts]]:
    """(our parameter, the tensors it is made of) for every parameter that holds anything."""
    yield from dense_names(transformer)
    for i in range(transformer.n_layers):
        ours, theirs = f"blocks.{i}.moe", f"model.layers.{i}.mlp"
        for j, name in enumerate(["hidden", "weight"][-moe.router_depth :]):
            yield f"{ours}.router.weights.{j}", [[f"{theirs}.gate.{name}"]]
        if moe.gating_residual and i > 0:
            yield f"{ours}.router.residual", [[f"{theirs}.gate.residual"]]
        yield f"{ours}.ffn.w_gate_up", [[f"{theirs}.experts.gate_up_proj"]]
        yield f"{ours}.ffn.w_down", [[f"{theirs}.experts.down_proj"]]
        if moe.n_const:
            for name in ("constants", "mix"):
                yield f"{ours}.zero_computation.{name}", [[f"{theirs}.{name}"]]


def write_config(transformer: TransformerConfig, moe: MoEConfig) -> dict[str, Any]:
    sizes = {KEYS.get(name, name): value for name, value in asdict(transformer).items()}
    return {
        "architectures": ["MoeppForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_moepp.MoeppConfig",
            "AutoModel": "modeling_moepp.MoeppModel",
            "AutoModelForCausalLM": "modeling_moepp.MoeppForCausalLM",
        },
        "dtype": "float32",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")},
        **sizes,
        **{MOE_KEYS.get(name, name): value for name, value in asdict(moe).items()},
    }


def read_config(folder: Path) -> tuple[TransformerConfig, MoEConfig]:
    path = folder / "config.json"
    config = read_json(folder)
    if config["model_type"] != MODEL_TYPE:
        raise InputError(f"{path}: model_type is {config['model_type']!r}, not {MODEL_TYPE!r}")
    with naming(path):
        rope = config["rope_parameters"]
        if rope["rope_type"] != "default":
            raise InputError(f"rope_parameters={rope} is not supported")
        config["rope_theta"] = rope["rope_theta"]
        sizes, experts = (
            {field.name: config[names.get(field.name, field.name)] for field in fields(kind)}
            for kind, names in ((TransformerConfig, KEYS), (MoEConfig, MOE_KEYS))
        )
        return TransformerConfig(**sizes), MoEConfig(**experts)
