"""The tensors that swapping added, read back from where transformers wrote them."""

from pathlib import Path

import torch
from torch import nn

from moepp.model import InputError
from moepp.model.weights import FolderTensors

from .modules import SwappedBlock
from .vanilla import TENSORS


@torch.no_grad()
def load_added(model: nn.Module, folder: str | Path) -> None:
    """Fill what `swap_moe` added from a folder of `save_pretrained`, a Trainer's checkpoint for instance.

    `from_pretrained` reads the model's own tensors of that folder and leaves these out: read it, swap with the
    same arguments, then call this.

    Raises:
        InputError: a tensor is missing, or of another shape.
    """
    tensors = FolderTensors(Path(folder))
    for block_name, block in model.named_modules():
        if not isinstance(block, SwappedBlock):
            continue
        # Mixtral's block has one name in memory and another on disk
        old_name = block_name.removesuffix("mlp") + "block_sparse_moe"
        for name, tensor in block.state_dict().items():
            if name in TENSORS:
                continue
            old = f"{old_name}.{name}"
            saved = tensors[old if old in tensors else f"{block_name}.{name}"]
            if saved.shape != tensor.shape:
                shapes = f"{tuple(saved.shape)}, not {tuple(tensor.shape)}"
                raise InputError(f"{folder}: {block_name}.{name} is {shapes}")
            tensor.copy_(saved)
