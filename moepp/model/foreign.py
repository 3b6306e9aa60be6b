"""Models of others, read from their Hugging Face folders: Mixtral, Qwen3-MoE, OLMoE, and Llama (one expert).

Their layer is our vanilla one. What differs between them (q/k-norm, top-k without renormalisation, a head size of
its own) are fields of our configurations.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .config import MoEConfig, TransformerConfig
from .errors import InputError
from .transformer import Transformer
from .weights import KEYS, FolderTensors, Parts, dense_names, fill, naming, read_json

# fields that every config.json has to have
SAID = ("vocab_size", "n_layers", "hidden_size", "n_heads", "context_length", "norm_eps")


@dataclass(frozen=True)
class Family:
    """What tells a family's config.json from the others'."""

    routed: bool = True
    intermediate_size: str = "intermediate_size"
    qk_norm: str = "none"
    renormalize: bool | None = True  # None: as norm_topk_prob says, which is False where it is not said
    rope_theta: float = 1e4  # where config.json does not say
    switches_window: bool = False  # by use_sliding_window, which the others do not read
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    must_be: dict[str, Any] = field(default_factory=dict)  # key: what it is where it says nothing of interest


FAMILIES = {
    "mixtral": Family(rope_theta=1e6, expert=("w1", "w3", "w2")),
    "qwen3_moe": Family(
        intermediate_size="moe_intermediate_size",
        qk_norm="head",
        renormalize=None,
        switches_window=True,
        must_be={"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 0},
    ),
    "olmoe": Family(qk_norm="width", renormalize=None, must_be={"clip_qkv": None}),
    "llama": Family(routed=False, must_be={"mlp_bias": False}),
}


def load_foreign(folder: str | Path) -> Transformer:
    """Read a folder that transformers wrote (`config.json`, `.safetensors` or `.bin` shards) into float32.

    Raises:
        InputError: a file is missing, it is of no family above, says what our model cannot do, or its tensors do
            not fit its config.
    """
    folder = Path(folder)
    config = read_json(folder)
    family, transformer, moe = configurations(config, folder / "config.json")
    tensors = FolderTensors(folder)
    model = Transformer(transformer, moe)
    fill(model, tensors, tensor_names(family, transformer, moe, tensors))
    if not family.routed:
        for name, parameter in model.named_parameters():
            if "router" in name:  # of one expert the gate is 1 whatever its score
                nn.init.zeros_(parameter)
    return model.eval()


def configurations(config: dict[str, Any], path: Path) -> tuple[Family, TransformerConfig, MoEConfig]:
    """What config.json says, in our terms."""
    family = FAMILIES.get(str(config["model_type"]))
    if family is None:
        readable = ", ".join(FAMILIES)
        raise InputError(f"{path}: model_type is {config['model_type']!r}; what can be read is {readable}")
    if "num_local_experts" in config:  # which of the two depends on the family, and on who wrote it
        config = config | {"num_experts": config["num_local_experts"]}
    with naming(path):
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        require_supported(config, rope, family)
        renormalize = config.get("norm_topk_prob", False) if family.renormalize is None else family.renormalize
        transformer = TransformerConfig(
            **{name: config[KEYS.get(name, name)] for name in SAID},
            intermediate_size=config[family.intermediate_size],
            n_kv_heads=config.get("num_key_value_heads"),
            head_size=config.get("head_dim"),
            qk_norm=family.qk_norm,  # type: ignore[arg-type]
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or family.rope_theta,
            tie_embeddings=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
        )
        moe = MoEConfig(
            n_ffn=config["num_experts"] if family.routed else 1,
            top_k=config["num_experts_per_tok"] if family.routed else 1,
            n_zero=0,
            n_copy=0,
            n_const=0,
            gating_residual=False,
            renormalize=renormalize,
        )
    return family, transformer, moe


def require_supported(config: dict[str, Any], rope: dict[str, Any], family: Family) -> None:
    """Raise an InputError for what the config asks for and our model cannot do."""
    context, window = config.get("max_position_embeddings"), config.get("sliding_window")
    windowed = not family.switches_window or config.get("use_sliding_window", True)
    rules = {
        "hidden_act": config.get("hidden_act", "silu") == "silu",
        "attention_bias": not config.get("attention_bias"),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) == "default",
        # a window that no sequence reaches is none
        "sliding_window": not windowed or window is None or window >= context,
        "quantization_config": config.get("quantization_config") is None,
    } | {key: (config.get(key) or plain) == plain for key, plain in family.must_be.items()}
    for key, supported in rules.items():
        if not supported:
            said = rope if key == "rope_scaling" else config.get(key)
            raise InputError(f"{key}={said} is not supported")


def tensor_names(
    family: Family, transformer: TransformerConfig, moe: MoEConfig, tensors: FolderTensors
) -> Iterator[tuple[str, Parts]]:
    """(our parameter, the tensors it is made of), with experts one by one or already stacked."""
    yield from dense_names(transformer)
    gate, up, down = family.expert
    for i in range(transformer.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        # Mixtral's block has one name on disk and another in memory
        old = f"{theirs}.block_sparse_moe"
        mlp = old if f"{old}.gate.weight" in tensors else f"{theirs}.mlp"
        experts = [f"{mlp}.experts.{n}" for n in range(moe.n_ffn)] if family.routed else [mlp]
        if family.routed:
            yield f"{ours}.moe.router.weights.0", [[f"{mlp}.gate.weight"]]
        if f"{mlp}.experts.gate_up_proj" in tensors:
            yield f"{ours}.moe.ffn.w_gate_up", [[f"{mlp}.experts.gate_up_proj"]]
            yield f"{ours}.moe.ffn.w_down", [[f"{mlp}.experts.down_proj"]]
        else:
            yield f"{ours}.moe.ffn.w_gate_up", [[f"{e}.{gate}.weight", f"{e}.{up}.weight"] for e in experts]
            yield f"{ours}.moe.ffn.w_down", [[f"{e}.{down}.weight"] for e in experts]
