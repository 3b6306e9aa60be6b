"""The tensors of a checkpoint that is a folder, into which each device has written its shards.

    step-00000100.ckpt/
      shard-00001-model-00001-of-00001.safetensors   of each device: shards of weights and of the optimizer's state
      sums.json                                      of each of these files its SHA-256
      rest.ckpt                                      all else, as in a checkpoint of one file

torch.distributed.checkpoint writes and reads them, for any number of devices, and for one without any group. They
lie in safetensors, as nothing that is read may run code: DCP's own files are pickles.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.system.files import lasting, sha256_of_file

REST, SUMS = "rest.ckpt", "sums.json"
HEAD = "model.head.weight"


def is_folder(path: str | Path) -> bool:
    return Path(path).is_dir() and Path(path).suffix == ".ckpt"


def tensors_of(checkpoint: dict[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """(name, the dictionary that a tensor is in, its key there). A tied head is the embedding, and left out."""
    weights = checkpoint["state_dict"]
    for key in weights:
        if not (key == HEAD and tied(checkpoint)):
            yield f"weights.{key}", weights, key
    for optimizer in checkpoint.get("optimizer_states", ()):  # one
        for i, state in optimizer["state"].items():
            for key in state:
                yield f"optimizer.{i}.{key}", state, key


def take_shards(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Take what is sharded out of the checkpoint's dictionaries. Returns it by name."""
    places = list(tensors_of(checkpoint))
    if tied(checkpoint):
        checkpoint["state_dict"].pop(HEAD, None)
    return {name: there.pop(key) for name, there, key in places if hasattr(there[key], "device_mesh")}


def put_back(checkpoint: dict[str, Any], named: dict[str, Tensor]) -> None:
    """The inverse of `take_shards`. Optimizer state is dropped where the checkpoint has no optimizer."""
    optimizers = checkpoint.get("optimizer_states", [{"state": {}}])
    for name, value in named.items():
        kind, _, key = name.partition(".")
        if kind == "weights":
            checkpoint["state_dict"][key] = value
        else:
            i, _, key = key.partition(".")
            optimizers[0]["state"].setdefault(int(i), {})[key] = value
    if tied(checkpoint):
        checkpoint["state_dict"][HEAD] = checkpoint["state_dict"]["model.embedding.weight"]


def tied(checkpoint: dict[str, Any]) -> bool:
    return checkpoint["moepp"]["transformer"]["tie_embeddings"]


def write(folder: Path, named: dict[str, Tensor]) -> None:
    """Write what each device has of `named`, all together.

    Raises:
        OSError: a device could not write.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    try:
        save(named, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # of all devices, each with its own
        raise OSError(f"{folder}: {next(iter(error.failures.values()))[0]}") from error
    mine = {file.name: sha256_of_file(file) for file in folder.glob(f"shard-{dist.get_rank() + 1:05d}-*")}
    sums: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(sums, mine)
    if dist.get_rank() == 0:
        with lasting(folder / SUMS) as file:
            file.write(json.dumps({name: each for part in sums for name, each in part.items()}).encode())


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors, each whole, by one process."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder))
    described: Any = reader.read_metadata().state_dict_metadata
    named = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in described.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is only one process
        load(named, storage_reader=reader, no_dist=True)
    return named


def read_shards(folder: Path, named: dict[str, Tensor]) -> None:
    """Fill the shards that each device has of `named`, all together."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    load(named, storage_reader=HuggingFaceStorageReader(str(folder)))


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Which file is missing, or is not what was written; of a part of them, where several look."""
    try:
        sums = sorted(json.loads((folder / SUMS).read_text()).items())
    except (OSError, ValueError, AttributeError) as error:
        return f"{SUMS}: {error}"
    for name, expected in sums[part::parts]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of_file(folder / name) != expected:
            return f"checksum of {name}"
    return None
