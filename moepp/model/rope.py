"""Rotary positions (RoPE, arXiv 2104.09864) in the half-split layout: pairs are (i, i + d/2).

B sequences, N heads, S positions, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import TransformerConfig


def rope_table(config: TransformerConfig) -> Tensor:
    """(2, context_length, d): cos and signed sin (minus in the first half) of position times frequency."""
    d = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
    angles = torch.arange(config.context_length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x_BNSd: Tensor, rope_2Sd: Tensor) -> Tensor:
    """Turn each pair by its position's angle, in the dtype of x or of the table, whichever is finer."""
    if x_BNSd.is_cuda or torch.compiler.is_compiling():
        return turned(x_BNSd, *rope_2Sd)
    return Rotated.apply(x_BNSd, *rope_2Sd)


def turned(x_BNSd: Tensor, cos_Sd: Tensor, signed_sin_Sd: Tensor) -> Tensor:
    other = x_BNSd.roll(x_BNSd.shape[-1] // 2, dims=-1)  # of each pair
    return torch.addcmul(x_BNSd * cos_Sd, other, signed_sin_Sd).to(x_BNSd.dtype)


class Rotated(torch.autograd.Function):
    """The same for a CPU. Gradients come from attention transposed: autograd's own chain would mix their strides
    with others in every operation, which cost 4 % of a training step in bf16 (recipes/results/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, x_BNSd: Tensor, cos_Sd: Tensor, signed_sin_Sd: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Sd, signed_sin_Sd)
        return turned_contiguous(x_BNSd, cos_Sd, signed_sin_Sd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSd: Tensor) -> tuple[Tensor, None, None]:
        cos_Sd, signed_sin_Sd = ctx.saved_tensors
        return turned_contiguous(grad_BNSd, cos_Sd, -signed_sin_Sd), None, None


def turned_contiguous(x_BNSd: Tensor, cos_Sd: Tensor, signed_sin_Sd: Tensor) -> Tensor:
    """x is copied once: to contiguous memory, and in the dtype that is computed in."""
    dtype = torch.promote_types(x_BNSd.dtype, cos_Sd.dtype)
    copy_BNSd = x_BNSd.to(dtype, memory_format=torch.contiguous_format)
    return turned(copy_BNSd, cos_Sd, signed_sin_Sd).to(x_BNSd.dtype)
