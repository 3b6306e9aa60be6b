"""Cross-entropy of an output head without ever holding all logits.

N tokens, D hidden size, V vocabulary. The (N, V) logits are the largest tensor of a small model. Computed in
chunks that fit the cache, with their gradient taken at once, they take about half the time on a CPU and little
memory on a GPU (figures in recipes/results/LOG.md).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import to_autocast
from .config import require

LossAndGradient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
CHUNK_BYTES = 4096  # of one column of a chunk's logits on a CPU
# A GPU has no cache to fit, and for every chunk it would add (V, D) to the head's gradient in float32.
CUDA_CHUNK = 4096  # tokens
BLOCK = 1 << 19  # logits whose softmax in float32 stays in a CPU's cache
UNDERFLOW = 80.0  # -log of probabilities that float32 is soon too coarse for


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, compile: bool = False) -> Tensor:
    """Mean cross-entropy of the logits `hidden_ND @ weight_VD.T` with `targets_N`, gradients as autograd's.

    Under autocast the products are in its dtype; the softmax is in float32 at least, fused by torch.compile where
    that is asked for. Returns a scalar.

    Raises:
        InputError: there are more or fewer targets than tokens.
    """
    hidden_ND, weight_VD = to_autocast(hidden_ND), to_autocast(weight_VD)
    return LinearLoss.apply(hidden_ND, weight_VD, nll_of(targets_N, len(hidden_ND), compile))


def linear_distillation(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    teacher_ND: Tensor,
    teacher_VD: Tensor,
    share: float,
    temperature: float = 1.0,
    compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - share) · cross-entropy + share · T² · KL(teacher ‖ student) of both sides' softmax(logits / T), T the
    temperature (arXiv 1503.02531), means over the tokens. The student's logits are made once for both.

    T² keeps the gradient's size whatever T is. The widths of the two need not be equal; gradients reach the
    student alone. Returns three scalars: the loss, and without gradient its cross-entropy and its T² · KL.

    Raises:
        InputError: there are more or fewer targets than tokens.
    """
    hidden_ND, weight_VD = to_autocast(hidden_ND), to_autocast(weight_VD)
    teacher_ND, teacher_VD = to_autocast(teacher_ND), to_autocast(teacher_VD)
    nll_and_its_gradient = nll_of(targets_N, len(hidden_ND), compile)
    parts_2 = hidden_ND.new_zeros(2, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))

    def loss_and_gradient(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        nll, grad_of_nll_CV = nll_and_its_gradient(logits_CV.clone(), rows)
        kl, grad_CV = kl_and_gradient(logits_CV, teacher_ND[rows] @ teacher_VD.T, temperature)
        parts_2.add_(torch.stack((nll, kl)))
        return (1 - share) * nll + share * kl, grad_CV.mul_(share).add_(grad_of_nll_CV, alpha=1 - share)

    loss = LinearLoss.apply(hidden_ND, weight_VD, loss_and_gradient)
    cross_entropy, kl = parts_2 / len(hidden_ND)
    return loss, cross_entropy, kl


def nll_of(targets_N: Tensor, n_tokens: int, compile: bool) -> LossAndGradient:
    """The cross-entropy with these targets; the gradient takes the logits' place."""
    require(len(targets_N) == n_tokens, "targets", len(targets_N), f"must be as many as {n_tokens} tokens")
    softmax = compiled() if compile else nll_and_gradient
    return lambda logits_CV, rows: softmax(logits_CV, targets_N[rows, None])


@torch.no_grad()
def nll_by_token(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """(N,) in float32 at least: the cross-entropy of each target, 0 where the target is -100. No gradients."""
    chunk = chunk_of(hidden_ND)
    nll = []
    for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
        logits_CV = F.linear(hidden_CD, weight_VD)  # which autocast knows
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        nll.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
    return torch.cat(nll)


def chunk_of(hidden_ND: Tensor) -> int:
    """How many tokens' logits there are at a time."""
    return CUDA_CHUNK if hidden_ND.is_cuda else CHUNK_BYTES // hidden_ND.element_size()


def block_of(logits_NV: Tensor) -> int:
    """How many of a chunk's tokens the softmax is taken of at a time: on a CPU each pass over a further (N, V)
    tensor in float32 would cost as much as a product."""
    return len(logits_NV) if logits_NV.is_cuda else max(1, BLOCK // logits_NV.shape[1])


class LinearLoss(torch.autograd.Function):
    """Mean over the tokens of a loss of the logits. `loss_and_gradient` gives its sum for the logits of a slice of
    the tokens, and its gradient with respect to these."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, loss_and_gradient: LossAndGradient) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        chunk = chunk_of(hidden_ND)
        total = hidden_ND.new_zeros((), dtype=dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            loss, grad_logits = loss_and_gradient(hidden_ND[rows] @ weight_VD.T, rows)
            total += loss
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


def nll_and_gradient(logits_NV: Tensor, targets_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log softmax(logits)[target], and its gradient softmax - one-hot, which takes the logits' place.

    Softmax is in float32 at least.
    """
    dtype, n = torch.promote_types(logits_NV.dtype, torch.float32), block_of(logits_NV)
    nll = logits_NV.new_zeros((), dtype=dtype)
    for logits, targets in zip(logits_NV.split(n), targets_N1.split(n), strict=True):
        probs = logits.softmax(-1, dtype=dtype)
        nll_of_row = -probs.gather(1, targets).log()
        if logits.is_cuda or nll_of_row.max() > UNDERFLOW:  # a GPU is not asked: one would have to wait for it
            # the largest probability is 1 / sum of exp(score - largest score)
            largest, largest_prob = logits.amax(-1, keepdim=True), probs.amax(-1, keepdim=True)
            nll_of_row = largest - largest_prob.log() - logits.gather(1, targets)
        # p - 1 there; into float32, as to scatter into bf16 takes a CPU 6 ms
        logits.copy_(probs.scatter_(1, targets, torch.expm1(-nll_of_row)))
        nll += nll_of_row.sum()
    return nll, logits_NV


def kl_and_gradient(logits_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The sum of T² · KL(teacher ‖ student), and its gradient T · (student - teacher), which takes the place of
    the student's logits. Softmax is in float32 at least.
    """
    dtype, n = torch.promote_types(logits_NV.dtype, torch.float32), block_of(logits_NV)
    kl = logits_NV.new_zeros((), dtype=dtype)
    for logits, theirs in zip(logits_NV.split(n), teacher_NV.split(n), strict=True):
        student, teacher = ((one.to(dtype) / temperature).log_softmax(-1) for one in (logits, theirs))
        kl += F.kl_div(student, teacher, reduction="sum", log_target=True)
        logits.copy_(student.exp_().sub_(teacher.exp_()).mul_(temperature))
    return temperature**2 * kl, logits_NV


def fusible_nll_and_gradient(logits_NV: Tensor, targets_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a compiler, to which a scatter is a tensor that has to be held in float32."""
    log_probs_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N1
    gradient_NV = torch.where(is_target_NV, log_probs_NV.expm1(), log_probs_NV.exp())
    return -log_probs_NV.gather(1, targets_N1).sum(), logits_NV.copy_(gradient_NV)


@cache
def compiled() -> Any:
    """Three passes over bf16 logits on a GPU, where op by op takes some twelve, most of them over float32."""
    return torch.compile(fusible_nll_and_gradient, dynamic=False)
