"""What a model is: two validated dataclasses."""

from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from .errors import InputError

LARGEST = 1e9  # of any number here: nobody means more
KINDS = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class MoEConfig:
    """One MoE++ layer's experts, router and balance (arXiv 2410.07348, §3).

    Experts are ordered FFN, constant, copy, zero. Vanilla MoE is `n_zero = n_copy = n_const = 0` with
    `gating_residual = False`.

    Args:
        n_ffn: FFN (SwiGLU) experts, N_FFN.
        n_zero: zero experts, output 0.
        n_copy: copy experts, output x.
        n_const: constant experts, output a1·x + a2·v.
        top_k: experts chosen per token, K.
        tau: τ > 0. The smaller, the more tokens go to zero-computation experts (equations 7 and 8). Where there
            is a budget it is not asked for (`balance_tau`).
        balance_weight: β, the weight of the load-balance loss.
        capacity_factor: γ > 0 of the heterogeneous capacity (equation 8), of each device's own tokens; null is
            dropless.
        gating_residual: add the previous layer's logits, mapped by an E×E matrix, to this layer's (equation 6).
        router_depth: 1 for a linear router, 2 for linear, tanh, linear with a hidden width of 8·E.
        scale_expert_input: released checkpoints only: experts (not the router) receive x times this.
        logits_norm_std: released checkpoints only: scale logits to this standard deviation before the softmax.
        renormalize_without_zero: False, in some released checkpoints only, leaves the zero experts' gates in
            the sum that gates are divided by.
        renormalize: False, in some models of others: gates are the chosen experts' probabilities among all E.
        balance_groups: balance FFN experts as one group against zero-computation experts as another, and no
            expert within them (arXiv 2605.18643).
        balance_over: take the share of tokens that chose an expert over a batch of all devices (a micro-batch,
            where gradients are accumulated), or over each device's part.
        score_bias: the scores of zero-computation experts have a bias, which a schedule sets (conversion.py).
        ffn_budget: FFN experts per token and layer that training holds, in the mean, by a bias on the choice
            (budget.py, margins.py); null is the paper's method, where τ only suggests how many. Evaluation, and
            batches of one sequence, go by what `Transformer.budget` has been shown: without it, by nothing.
        budget_over: hold it over the whole model, where layers differ as they like, or in every layer.
    """

    n_ffn: int = 8
    n_zero: int = 1
    n_copy: int = 1
    n_const: int = 2
    top_k: int = 2
    tau: float = 0.75
    balance_weight: float = 0.01
    capacity_factor: float | None = None
    gating_residual: bool = True
    router_depth: Literal[1, 2] = 1
    scale_expert_input: float = 1.0
    logits_norm_std: float | None = None
    renormalize_without_zero: bool = True
    renormalize: bool = True
    balance_groups: bool = False
    balance_over: Literal["batch", "device"] = "batch"
    score_bias: bool = False
    ffn_budget: float | None = None
    budget_over: Literal["model", "layer"] = "model"

    def __post_init__(self) -> None:
        require_types(self, "moe")
        factor, std = self.capacity_factor, self.logits_norm_std
        rules = [
            ("n_ffn", self.n_ffn >= 1, "must be at least 1"),
            ("n_zero", self.n_zero >= 0, "must not be negative"),
            ("n_copy", self.n_copy >= 0, "must not be negative"),
            ("n_const", self.n_const >= 0, "must not be negative"),
            ("top_k", self.top_k >= 1, "must be at least 1"),
            ("top_k", self.top_k <= self.n_experts, f"must not exceed the {self.n_experts} experts"),
            ("tau", self.tau > 0, "must be positive"),
            ("balance_weight", self.balance_weight >= 0, "must not be negative"),
            ("capacity_factor", factor is None or factor > 0, "must be positive, or null for no limit"),
            ("scale_expert_input", self.scale_expert_input > 0, "must be positive"),
            ("logits_norm_std", std is None or std > 0, "must be positive"),
            ("logits_norm_std", std is None or self.n_experts > 1, "needs two experts or more"),
        ]
        for name, ok, rule in rules:
            require(ok, f"moe.{name}", getattr(self, name), rule)
        if self.ffn_budget is not None:
            some = self.n_zero_computation > 0
            require(some, "moe.ffn_budget", self.ffn_budget, "needs zero-computation experts")
            self.require_budget(self.ffn_budget)

    def require_budget(self, ffn_per_token: float, name: str = "moe.ffn_budget") -> None:
        """Raise an InputError for a budget that no choice of K experts can spend."""
        fewest, most = self.ffn_range
        require(fewest < ffn_per_token < most, name, ffn_per_token, f"must be above {fewest} and below {most}")

    @property
    def ffn_range(self) -> tuple[int, int]:
        """The fewest and the most FFN experts that a token's K choices can be."""
        return max(0, self.top_k - self.n_zero_computation), min(self.top_k, self.n_ffn)

    @property
    def n_zero_computation(self) -> int:
        """N_ZC."""
        return self.n_const + self.n_copy + self.n_zero

    @property
    def n_experts(self) -> int:
        """E."""
        return self.n_ffn + self.n_zero_computation

    @property
    def kinds(self) -> dict[str, slice]:
        """Where each kind of expert stands among the E."""
        const, copy = self.n_ffn + self.n_const, self.n_ffn + self.n_const + self.n_copy
        return {
            "ffn": slice(0, self.n_ffn),
            "const": slice(self.n_ffn, const),
            "copy": slice(const, copy),
            "zero": slice(copy, self.n_experts),
        }

    @property
    def balance_tau(self) -> float:
        """τ of equations 7 and 8; with a budget the one that gives as many FFN experts at balance."""
        return self.tau if self.ffn_budget is None else self.tau_for(self.ffn_budget)

    def tau_for(self, ffn_per_token: float) -> float:
        """τ of which so many FFN experts per token are the balance."""
        return ffn_per_token * self.n_zero_computation / ((self.top_k - ffn_per_token) * self.n_ffn)

    @property
    def ffn_share(self) -> float:
        """Share of all assignments that FFN experts take at balance: τ·N_FFN / (τ·N_FFN + N_ZC)."""
        return self.balance_tau * self.n_ffn / (self.balance_tau * self.n_ffn + self.n_zero_computation)

    @property
    def expected_ffn_per_token(self) -> float:
        """FFN experts that a token takes out of its K: the budget, or without one what τ gives at balance."""
        return self.top_k * self.ffn_share if self.ffn_budget is None else self.ffn_budget

    def capacities(self, n_tokens: int) -> tuple[float, float]:
        """Assignments that one FFN and one zero-computation expert may take out of `n_tokens` · K (equation 8)."""
        if self.capacity_factor is None:
            raise InputError("moe.capacity_factor: is null, so there is no capacity")
        parts = self.balance_tau * self.n_ffn + self.n_zero_computation
        per_expert = self.capacity_factor * n_tokens * self.top_k / parts
        return self.balance_tau * per_expert, per_expert


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer with an MoE++ layer in every block.

    Args:
        vocab_size: tokens in the vocabulary, V.
        n_layers: blocks, L.
        hidden_size: width of the residual stream, D.
        intermediate_size: hidden width of one SwiGLU FFN expert, H.
        n_heads: attention heads.
        n_kv_heads: key/value heads for grouped-query attention; null means `n_heads`.
        head_size: width of a head, d; null means `hidden_size` / `n_heads`.
        qk_norm: RMSNorm of queries and keys before RoPE: of each head, or over the width of all heads.
        context_length: longest sequence in tokens.
        rope_theta: base of the rotary position embedding.
        norm_eps: ε of RMSNorm.
        tie_embeddings: the output head shares the embedding's weight.
        init_std: standard deviation of the initial weights (see init.py).
    """

    vocab_size: int = 8192
    n_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 688
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_size: int | None = None
    qk_norm: Literal["none", "head", "width"] = "none"
    context_length: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        require_types(self, "transformer")
        for field in fields(self):
            if field.type in (int, int | None):  # those of heads may be null
                size = getattr(self, field.name)
                require(size is None or size >= 1, f"transformer.{field.name}", size, "must be at least 1")
        D, d = self.hidden_size, self.head_dim
        rules = [
            ("rope_theta", self.rope_theta >= 1, "must be at least 1"),
            ("norm_eps", self.norm_eps >= 1e-12, "must be at least 1e-12"),
            ("init_std", 0 < self.init_std <= 10, "must be positive and at most 10"),
            ("n_heads", self.head_size is not None or D % self.n_heads == 0, f"must divide hidden_size={D}"),
            (
                "n_heads" if self.head_size is None else "head_size",
                d % 2 == 0,
                f"must leave an even head size for RoPE, not {d}",
            ),
            ("n_kv_heads", self.n_heads % self.kv_heads == 0, f"must divide n_heads={self.n_heads}"),
        ]
        for name, ok, rule in rules:
            require(ok, f"transformer.{name}", getattr(self, name), rule)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


Configs = tuple[TransformerConfig, MoEConfig]  # of a model


def require_types(config: Any, part: str) -> None:
    """Raise an InputError for a field of another type, or a number beyond all sense.

    A recipe's values have been through a parser that knows the types. Those of a checkpoint, or of a released
    config.json, have not.
    """
    for field in fields(config):
        name, value = f"{part}.{field.name}", getattr(config, field.name)
        kinds = get_args(field.type) or (field.type,)  # of a Literal its values, of `int | None`, of `int`
        if get_origin(field.type) is Literal:
            known = value in kinds and type(value) is type(kinds[0])  # True equals 1
            require(known, name, value, "must be " + " or ".join(map(str, kinds)))
            continue
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        require(fits, name, repr(value), "must be " + " or ".join(KINDS[kind] for kind in kinds))
        if type(value) in (int, float):
            require_sensible(name, value)


def require_sensible(name: str, value: float) -> None:
    """Raise an InputError for a number that nobody means."""
    require(-LARGEST <= value <= LARGEST, name, value, "must lie between -1e9 and 1e9")


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise an InputError that names the key, the rule and the value, unless `ok`."""
    if not ok:
        raise InputError(f"{name}: {rule}, got {value}")
