"""AdamW, and the norm of all gradients, of parameters that may be sharded over several meshes of devices.

torch's own take lists of tensors, which for DTensors must all be of one mesh; an update needs no mesh at all.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The shard on this device, the same memory; of a tensor that is not sharded all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class AdamW(torch.optim.AdamW):
    """An update is elementwise: each device makes that of its own shards."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one mesh together; those that are not sharded are together, too."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[getattr(tensor, "device_mesh", None)].append(tensor)
    return list(groups.values())


def total_norm(gradients: list[Tensor]) -> Tensor:
    """(): over all devices, the same on each. Either all are sharded or none is."""
    norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    first: Any = gradients[0]
    if not hasattr(first, "device_mesh"):
        return norm
    mesh = zip(first.device_mesh.shape, first.placements, strict=True)
    copies = [size for size, placement in mesh if placement.is_replicate()]
    square = norm.square() / math.prod(copies)
    dist.all_reduce(square)
    return square.sqrt()
