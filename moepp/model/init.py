"""Every initial weight of the model, in one place.

| parameter                                      | distribution                                   |
|------------------------------------------------|------------------------------------------------|
| RMSNorm gains                                  | 1                                              |
| embedding, where the head has its own weight   | N(0, 1)                                        |
| what writes to the residual stream             | N(0, std / sqrt(2L)): attention output, w_down |
| constants v, their W_c, and all other matrices | N(0, std)                                      |

The residual stream has to start at the size of what copy and constant experts add to it, which is that of their
normed input: a token that meets one would otherwise drown all that other layers write (recipes/results/LOG.md).
A tied embedding cannot, its logits would be too large.

Every parameter is drawn from a generator of its own, seeded by its name: switching one expert type off leaves
all other initial weights as they were, so that compared variants start from the same point.
"""

import hashlib

import torch
from torch import nn

from .sharding import as_shards

RESIDUAL_WRITERS = ("attention.output.weight", "ffn.w_down")


def draw_seed() -> int:
    """A seed for `init_parameters` that follows `torch.manual_seed`. To be drawn before any module is built:
    how many random numbers that takes (nn.Linear fills itself) differs between variants."""
    return int(torch.randint(2**62, (), device="cpu"))


def init_parameters(
    module: nn.Module, seed: int, std: float = 0.02, n_layers: int = 1, tied: bool = False
) -> None:
    """Draw all parameters of `module` anew, and set its buffers to 0. Does nothing on the meta device."""
    for buffer in module.buffers():
        nn.init.zeros_(buffer)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if "norm" in name:
            nn.init.ones_(parameter)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        is_sharded = hasattr(parameter, "device_mesh")
        # then every rank draws all of it, on the CPU as one process does, and keeps its part
        device = "cpu" if is_sharded else parameter.device
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        deviation = std * (2 * n_layers) ** -0.5 if name.endswith(RESIDUAL_WRITERS) else std
        if name == "embedding.weight" and not tied:
            deviation = 1.0
        with torch.no_grad():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype) if is_sharded else parameter
            whole.normal_(0.0, deviation, generator=generator)
            if is_sharded:
                parameter.copy_(as_shards(whole, parameter))
