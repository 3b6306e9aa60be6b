"""The pathway-aware router: scores of this layer plus scores of the one before → which experts, with what gates.

T tokens, D hidden size, E experts, K choices a token. All of it is computed in float32 at least.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from . import balance
from .config import MoEConfig
from .margins import leave_one_out_bias


@dataclass
class Routing:
    """What the router decided for T tokens.

    Attributes:
        logits: (T, E) G_j, what the next layer's gating residual receives.
        experts: (T, K) int64, the chosen experts, best first.
        gates: (T, K) their weights in the output; zero experts' and dropped assignments' are 0.
        scores: (T, E) what softmax and top-k were taken of: the logits, or what `logits_norm_std` and the bias
            made of them.
        kept: (T, K) bool, False where an expert was over capacity; None when dropless.
        moe: the configuration the decision was made under.
    """

    logits: Tensor
    experts: Tensor
    gates: Tensor
    scores: Tensor
    kept: Tensor | None
    moe: MoEConfig

    @property
    def probs(self) -> Tensor:
        """(T, E): softmax of the scores."""
        return self.scores.softmax(-1)

    def load_balance_loss(self) -> Tensor:
        """L_b of this layer (equation 7), a scalar with a gradient. In `balance_over: batch` it is a collective,
        for which all devices have to ask."""
        return mean_load_balance_loss([self])

    def computed(self) -> Tensor:
        """(T, K) bool: which assignments an FFN expert computes, what is over capacity left out."""
        computed_TK = self.experts < self.moe.n_ffn
        return computed_TK if self.kept is None else computed_TK & self.kept

    def max_computed(self) -> int:
        """How many assignments FFN experts compute at most, as far as a host knows without asking the device."""
        if self.kept is None:
            return self.experts.numel()
        capacity, _ = balance.whole_capacities(self.moe, len(self.experts))
        rows = min(self.experts.numel(), self.moe.n_ffn * capacity)
        # the same number, but to torch.compile a constant. Made of floats, it would become a symbol once another
        # model's config comes by, and the graph would be compiled anew for it
        return len(range(rows))

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64: how many tokens chose each expert, before any capacity."""
        return balance.count_assignments(self.experts, self.moe.n_experts)

    def unbiased_tokens_per_expert(self) -> Tensor:
        """(E,) int64: how many would have without the bias that holds a budget.

        The load balance is of these. So the router learns to come to the budget by itself, and little is left to
        hold. Of the choice that is held it would push on without an effect that it could see, until tokens go to
        experts whose gates are next to 0 (recipes/results/LOG.md).
        """
        if self.moe.ffn_budget is None:
            return self.tokens_per_expert()
        unbiased_TK = self.scores.topk(self.moe.top_k, dim=-1).indices
        return balance.count_assignments(unbiased_TK, self.moe.n_experts)


register_dataclass(Routing)  # DDP with a static graph looks for the tensors of an output


def mean_load_balance_loss(routings: list[Routing]) -> Tensor:
    """Mean of L_b over the MoE layers, what β multiplies. In `balance_over: batch` a collective of all devices."""
    moe, scores_LTE = routings[0].moe, torch.stack([routing.scores for routing in routings])
    count_LE = torch.stack([routing.unbiased_tokens_per_expert() for routing in routings])
    f_LE = balance.shares(count_LE.to(scores_LTE.dtype), moe)
    return balance.load_balance_loss(scores_LTE.softmax(-1), f_LE, moe).mean()


class Router(nn.Module):
    """G_j = W_j x_j + W_g,j G_(j-1) (equation 6), then softmax, top-k, and gates renormalised over the chosen.

    A zero expert's gate is set to 0 before the division, so that a token with one zero expert among its K
    follows the others alone. A token whose K choices are all zero experts gets gates of exactly 0.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, first: bool = False) -> None:
        super().__init__()
        self.moe = moe
        E, D = moe.n_experts, hidden_size
        widths = [D, E] if moe.router_depth == 1 else [D, 8 * E, E]
        # (E, D), or (8E, D) and (E, 8E)
        self.weights = nn.ParameterList(torch.empty(n_out, n_in) for n_in, n_out in pairwise(widths))
        # (E, E), W_g. The first layer has nothing before it: there it would never get a gradient.
        self.residual = nn.Parameter(torch.empty(E, E)) if moe.gating_residual and not first else None
        self.bias: Tensor | None  # (), on the scores of zero-computation experts: no parameter, a schedule sets it
        self.register_buffer("bias", torch.zeros(()) if moe.score_bias else None)
        # (2,), likewise, but for the choice alone (budget.py): [0] in training on one sequence at a time, [1] in
        # evaluation
        self.choice_bias: Tensor | None
        self.register_buffer("choice_bias", torch.zeros(2) if moe.ffn_budget is not None else None)
        # (), FFN experts per token that this layer is to take in training above or below `ffn_budget`
        self.ffn_offset: Tensor
        self.register_buffer("ffn_offset", torch.zeros(()), persistent=False)  # what `Budget.spend` says

    def forward(self, x_BSD: Tensor, previous_logits_TE: Tensor | None = None) -> Routing:
        moe = self.moe
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_TE = self.logits(x_BSD.flatten(0, 1).to(dtype), previous_logits_TE)
            scores_TE = self.scores(logits_TE)
            # a budget's bias is on who is chosen alone: gates and balance loss go by the scores without it
            experts_TK = self.choose(self.biased(scores_TE, self.budget_bias(scores_TE, len(x_BSD))))
            gates_TK = self.gates(scores_TE, experts_TK)
            kept_TK = None
            if moe.capacity_factor is not None and self.training:
                kept_TK = balance.within_capacity(experts_TK.view(*x_BSD.shape[:2], moe.top_k), moe).flatten(0, 1)
                gates_TK = gates_TK * kept_TK
        return Routing(logits_TE, experts_TK, gates_TK, scores_TE, kept_TK, moe)

    def logits(self, x_TD: Tensor, previous_logits_TE: Tensor | None) -> Tensor:
        """(T, E): G_j (equation 6). With two layers there is a tanh in between."""
        first, *more = self.matrices()
        logits_TE = F.linear(x_TD, first.to(x_TD.dtype))
        for weight in more:
            logits_TE = F.linear(logits_TE.tanh(), weight.to(x_TD.dtype))
        if self.residual is not None and previous_logits_TE is not None:
            logits_TE = logits_TE + F.linear(previous_logits_TE, self.residual.to(x_TD.dtype))
        return logits_TE

    def scores(self, logits_TE: Tensor) -> Tensor:
        """(T, E): what goes into softmax and top-k: the logits, in the authors' released models divided by their
        spread, in converted ones with a bias."""
        if self.moe.logits_norm_std is not None:
            std_T1 = logits_TE.std(-1, keepdim=True).clamp(min=1e-12)  # 0 where all logits are equal
            logits_TE = logits_TE * (self.moe.logits_norm_std / std_T1)
        return self.biased(logits_TE, self.bias)

    def biased(self, scores_TE: Tensor, bias: Tensor | None) -> Tensor:
        """With a bias on the zero-computation experts'."""
        if bias is None:
            return scores_TE
        is_ffn_E = torch.arange(self.moe.n_experts, device=scores_TE.device) < self.moe.n_ffn
        return scores_TE + bias.to(scores_TE.dtype).where(~is_ffn_E, 0.0)

    def budget_bias(self, scores_TE: Tensor, n_sequences: int) -> Tensor | None:
        """() or (T, 1): what holds a budget."""
        if self.choice_bias is None:
            return None
        if self.training and n_sequences > 1:
            ffn_per_token = self.moe.expected_ffn_per_token + self.ffn_offset.float()
            return leave_one_out_bias(scores_TE, n_sequences, ffn_per_token, self.moe)
        return self.choice_bias[0 if self.training else 1]

    def matrices(self) -> list[Tensor]:
        """What makes logits of x, one after the other: (E, D), or (8E, D) and (E, 8E)."""
        return list(self.weights)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """(T, K): the experts of the highest scores, best first."""
        return scores_TE.topk(self.moe.top_k, dim=-1).indices

    def gates(self, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """(T, K): softmax over the chosen experts' scores = their probabilities divided by their sum."""
        is_zero_TK = experts_TK >= self.moe.kinds["zero"].start
        if not self.moe.renormalize:
            return scores_TE.softmax(-1).gather(1, experts_TK).masked_fill(is_zero_TK, 0.0)
        chosen_TK = scores_TE.gather(1, experts_TK)
        if not self.moe.renormalize_without_zero:
            return chosen_TK.softmax(-1)
        # -inf takes zero experts out of the sum; a row of nothing but -inf would be NaN, forward and backward
        all_zero_T1 = is_zero_TK.all(-1, keepdim=True)
        gates_TK = chosen_TK.masked_fill(is_zero_TK & ~all_zero_T1, float("-inf")).softmax(-1)
        return gates_TK.masked_fill(is_zero_TK, 0.0)


def routers(model: nn.Module) -> list[Router]:
    """Of every layer, the first first."""
    return [module for module in model.modules() if isinstance(module, Router)]
