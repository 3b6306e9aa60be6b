"""A Hugging Face folder: its config.json, its shards of named tensors, and a model filled from them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TransformerConfig
from .errors import InputError

KEYS = {  # of our TransformerConfig's fields in config.json, where they are called otherwise there
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


def read_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        InputError: it is missing, or holds no config.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: is not a Hugging Face folder, it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}: has no model_type")
    return config


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error about what this config.json says names it."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{path}: has no key {error}") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error


class FolderTensors:
    """All tensors of all shards (`.safetensors`, else `.bin`), each read when it is asked for.

    `.bin` files are read with `weights_only`: they cannot run code.

    Raises:
        InputError: there are no shards, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for whole in ("model.safetensors", "pytorch_model.bin"):
            if shards := sorted(folder.glob(whole.replace(".", "*."))):
                break
        else:
            raise InputError(f"{folder}: has neither model*.safetensors nor pytorch_model*.bin")
        if (index := folder / f"{whole}.index.json").is_file():
            self.require_all_of(index)
        self.readers: dict[str, Callable[[], Tensor]] = {}
        for shard in shards:
            self.readers |= self.open(shard)

    def require_all_of(self, index: Path) -> None:
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: cannot be read, is it damaged? ({type(error).__name__})") from error
        if missing := sorted(name for name in named if not (self.folder / str(name)).is_file()):
            raise InputError(f"{self.folder}: the shard {missing[0]} is missing")

    def open(self, shard: Path) -> dict[str, Callable[[], Tensor]]:
        from safetensors import safe_open

        try:
            if shard.suffix == ".bin":
                tensors = dict(torch.load(shard, map_location="cpu", weights_only=True, mmap=True))
                return {name: partial(tensors.__getitem__, name) for name in tensors}
            file: Any = safe_open(shard, framework="pt")
            return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118, it is no dict
        except Exception as error:  # each library has its own; none of them names the file
            reason = str(error).strip() or type(error).__name__
            raise InputError(f"{shard}: cannot be read, is it damaged? ({reason.splitlines()[0]})") from error

    def __contains__(self, name: str) -> bool:
        return name in self.readers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.readers:
            raise InputError(f"{self.folder}: has no tensor {name}; is the checkpoint whole?")
        return self.readers[name]()


SHARD_BYTES = 5_000_000_000


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors, or several with their index where they are larger than one may be."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    left = SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > left and shards[-1]:
            shards.append([])
            left = SHARD_BYTES
        shards[-1].append(name)
        left -= tensor.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):  # parts of one tensor of ours may not share its memory
        copies = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names}
        save_file(copies, folder / file, metadata={"format": "pt"})


Parts = list[list[str]]  # of one parameter: what to concatenate, and of several such what to stack


def dense_names(config: TransformerConfig) -> Iterator[tuple[str, Parts]]:
    """(our parameter, the tensors it is made of) of all but MoE layers, in Llama's names."""
    yield "embedding.weight", [["model.embed_tokens.weight"]]
    yield "norm.weight", [["model.norm.weight"]]
    if not config.tie_embeddings:
        yield "head.weight", [["lm_head.weight"]]
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm.weight", [[f"{theirs}.input_layernorm.weight"]]
        yield f"{ours}.moe_norm.weight", [[f"{theirs}.post_attention_layernorm.weight"]]
        yield f"{ours}.attention.qkv.weight", [[f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"]]
        yield f"{ours}.attention.output.weight", [[f"{theirs}.self_attn.o_proj.weight"]]
        if config.qk_norm != "none":
            for part in "qk":
                yield f"{ours}.attention.{part}_norm.weight", [[f"{theirs}.self_attn.{part}_norm.weight"]]


def complete(model: nn.Module, names: Iterable[tuple[str, Parts]]) -> Iterable[tuple[str, Parts]]:
    """`names`, which have to be those of all that the model holds.

    Raises:
        InputError: there is none for a parameter, which would be lost, or left as it was drawn.
    """
    named = dict(names)
    for name, parameter in model.named_parameters():
        if parameter.numel() and name not in named:
            raise InputError(f"{name}: this format has no tensor for it (`tensor_names`)")
    return named.items()


def taken_apart(
    model: nn.Module, names: Iterable[tuple[str, Parts]], stacked: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors that `fill` makes `model` of. Names that end as `stacked` are of one tensor per expert."""
    tensors: dict[str, Tensor] = {}
    for name, parts in names:
        value = model.get_parameter(name).detach()
        values = value.unbind() if name.endswith(stacked) else (value,)
        if name.endswith(".qkv.weight"):
            values = value.split(model.get_submodule(name.removesuffix(".qkv.weight")).widths)
        tensors |= dict(zip(chain.from_iterable(parts), values, strict=True))
    return tensors


@torch.no_grad()
def fill(model: nn.Module, tensors: FolderTensors, names: Iterable[tuple[str, Parts]]) -> None:
    """Set each parameter of `model` that is named from the tensors it is made of.

    Raises:
        InputError: a tensor is missing, of another shape, or holds values that are not finite.
    """
    for name, parts in names:
        first, parameter = parts[0][0], model.get_parameter(name)
        try:
            values = [torch.cat([tensors[part] for part in group]) for group in parts]
            value = torch.stack(values) if values[0].dim() < parameter.dim() else torch.cat(values)
        except (RuntimeError, TypeError) as error:  # of several shapes, or no tensors
            raise InputError(f"{tensors.folder}: {first} and its like do not make one {name} ({error})") from error
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, config.json {tuple(parameter.shape)}"
            raise InputError(f"{tensors.folder}: {first} makes {name} {shapes}")
        if not value.isfinite().all():
            raise InputError(f"{tensors.folder}: {first} or its like holds values that are not finite")
        parameter.copy_(value)
