"""Causal attention: torch's, or on a CPU in bf16 plain products, which are twice as fast there.

B sequences, S positions, N query heads, M key/value heads, d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512  # positions: beyond, S² scores cost more memory than the time is worth


def attend(q_BNSd: Tensor, k_BMSd: Tensor, v_BMSd: Tensor, causal: bool) -> Tensor:
    """(B, N, S, d): softmax(q·k / √d)·v, each of the M key/value heads serving N/M query heads."""
    short = q_BNSd.shape[2] <= LONGEST
    if causal and short and q_BNSd.device.type == "cpu" and q_BNSd.dtype == torch.bfloat16:
        return attend_by_products(q_BNSd, k_BMSd, v_BMSd)
    grouped = q_BNSd.shape[1] != k_BMSd.shape[1]
    return F.scaled_dot_product_attention(q_BNSd, k_BMSd, v_BMSd, is_causal=causal, enable_gqa=grouped)


def attend_by_products(q_BNSd: Tensor, k_BMSd: Tensor, v_BMSd: Tensor) -> Tensor:
    """Causal attention with all S² scores. torch's kernel computes bf16 on a CPU at the speed of float32."""
    B, N, S, d = q_BNSd.shape
    group = N // k_BMSd.shape[1]
    k_BNSd, v_BNSd = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (k_BMSd, v_BMSd))
    future_SS = torch.full((S, S), float("-inf"), dtype=q_BNSd.dtype).triu(1)
    q, k, v = (part.reshape(B * N, S, d) for part in (q_BNSd, k_BNSd, v_BNSd))
    scores = torch.baddbmm(future_SS, q, k.transpose(1, 2), alpha=d**-0.5)  # (B·N, S, S)
    return scores.softmax(-1).bmm(v).view(B, N, S, d)
