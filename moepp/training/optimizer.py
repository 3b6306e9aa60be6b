"""AdamW, its schedule, and the norm of all gradients, of parameters that may be sharded over meshes of devices.

torch's own take lists of tensors, which for DTensors must all be of one mesh; an update needs no mesh at all.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.model.config import require, require_sensible
from moepp.model.sharding import local


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, by optimizer step.

    Args:
        lr: peak learning rate.
        min_lr: where the cosine ends; null means at a tenth of `lr`.
        warmup_steps: steps from (almost) 0 to `lr`.
        weight_decay: of matrices alone; gains and constants are not decayed.
        betas: of AdamW.
        eps: of AdamW.
        max_bad_steps: steps with a gradient that is not finite are skipped; after so many in a row the run ends.
    """

    lr: float = 5e-4
    min_lr: float | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("lr", "warmup_steps", "weight_decay", "eps", "max_bad_steps"):
            require_sensible(f"optim.{name}", getattr(self, name))
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(0 <= self.lowest_lr <= self.lr, "optim.min_lr", self.min_lr, f"must be between 0 and lr={self.lr}")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative")
        for beta in self.betas:
            require(0 <= beta < 1, "optim.betas", self.betas, "must be at least 0 and below 1")
        require(self.eps > 0, "optim.eps", self.eps, "must be positive")
        require(self.max_bad_steps >= 1, "optim.max_bad_steps", self.max_bad_steps, "must be at least 1")

    @property
    def lowest_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `total_steps`."""
        if step < self.warmup_steps:
            return min(self.lr, self.lr * (step + 1) / self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lowest_lr + (self.lr - self.lowest_lr) * cosine


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
