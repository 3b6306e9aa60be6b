"""Cross-entropy of an output head without ever holding all logits.

N tokens, D hidden size, V vocabulary. The (N, V) logits are the largest tensor of a small model. Computed in
chunks that fit the cache, with their gradient taken at once, they take about half the time on a CPU and little
memory on a GPU (figures in recipes/results/LOG.md).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024  # tokens


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy of the logits `hidden_ND @ weight_VD.T` with `targets_N`, gradients as autograd's.

    Under autocast the products are in its dtype; the softmax is in float32 at least. There must be a target for
    every token. Returns a scalar.
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    return LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = hidden_ND.new_zeros((), dtype=dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype)
        for start in range(0, len(hidden_ND), CHUNK):
            rows, targets = slice(start, start + CHUNK), targets_N[start : start + CHUNK, None]
            logits = (hidden_ND[rows] @ weight_VD.T).to(dtype)
            chosen = logits.gather(1, targets)
            largest = logits.amax(-1, keepdim=True)
            # all in place: each further (chunk, V) tensor would cost as much in page faults as a product
            exp = logits.sub_(largest).exp_()
            sum_exp = exp.sum(-1, keepdim=True)
            total += (sum_exp.log() + largest - chosen).sum()
            grad_logits = exp.div_(sum_exp)  # dL/dlogits = softmax - one-hot
            grad_logits.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=dtype))
            grad_logits = grad_logits.to(hidden_ND.dtype)
            grad_hidden_ND[rows] = grad_logits @ weight_VD
            grad_weight_VD += grad_logits.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        return total / len(hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        scale = grad / len(grad_hidden_ND)  # a scalar in float32: it does not promote what it multiplies
        return grad_hidden_ND * scale, grad_weight_VD * scale, None
