"""How far FFN experts are ahead of zero-computation experts, token by token, and the bias that makes them even.

A token's j-th best FFN expert is among its K choices if its score is above that of the (K-j+1)-th best
zero-computation expert: the difference of the two is one of the token's *margins*. A bias b on the scores of
zero-computation experts, for the choice alone, leaves those FFN experts in whose margin is above b. So the bias
that spends a budget on given tokens is a quantile of their margins, exactly: there is nothing to search for.

T tokens of B sequences, Z zero-computation experts, J margins a token, A a sequence, C = A·B in all.
"""

import torch
from torch import Tensor

from .config import MoEConfig


def margins(scores_TE: Tensor, moe: MoEConfig) -> Tensor:
    """(T, J), falling: of the FFN experts that a bias can take from a token or give to it."""
    fewest, most = moe.ffn_range
    ffn_TF, zero_computation_TZ = scores_TE.split([moe.n_ffn, moe.n_zero_computation], dim=1)
    best_ffn_TJ = ffn_TF.topk(most, dim=1).values[:, fewest:]
    best_others_TJ = zero_computation_TZ.topk(moe.top_k - fewest, dim=1).values[:, moe.top_k - most :]
    return best_ffn_TJ - best_others_TJ.flip(1)


def level_of(ffn_per_token: Tensor, moe: MoEConfig) -> Tensor:
    """The share of all margins that a bias has to leave below it for so many FFN experts, from 0 to 1."""
    fewest, most = moe.ffn_range
    return ((most - ffn_per_token) / (most - fewest)).clamp(0, 1)


@torch.no_grad()
def leave_one_out_bias(scores_TE: Tensor, n_sequences: int, ffn_per_token: Tensor, moe: MoEConfig) -> Tensor:
    """(T, 1): for each of B sequences, the bias that spends a budget on the B - 1 others.

    Were a sequence's own margins among them, its tokens would be chosen for by later ones, which would look into
    the future. (Through what it changes in others it moves its own bias in later layers, by next to nothing.) A
    sequence that takes too much under the others' bias has raised theirs, and they take less by as much in all: to
    first order, what sequences differ by cancels within the batch.
    """
    rising_BA = margins(scores_TE, moe).view(n_sequences, -1).sort(dim=1).values
    B, A = rising_BA.shape
    rising_C = rising_BA.flatten().sort().values
    n_others = (B - 1) * A
    # one more margin is below the n-th of N with probability n / (N + 1)
    n = (level_of(ffn_per_token, moe) * (n_others + 1)).round().long().clamp(1, n_others)
    # wanted is the n-th of the others' margins. Among all of them, sorted, it comes after n - 1 others and after
    # those of the sequence's own that have fewer than n others below them
    others_below_BA = torch.searchsorted(rising_C, rising_BA) - torch.searchsorted(rising_BA, rising_BA)
    own_below_B = (others_below_BA < n).sum(1)
    return rising_C[n - 1 + own_below_B].repeat_interleave(len(scores_TE) // B)[:, None]
