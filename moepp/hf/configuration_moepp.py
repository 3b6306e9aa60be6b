"""What a MoE++ model is, for transformers 5.4 or later.

Copied into exported folders: it imports transformers alone. From moepp, Apache-2.0.
"""

from typing import Any

from transformers import PreTrainedConfig


class MoeppConfig(PreTrainedConfig):
    """A decoder-only transformer with an MoE++ layer in every block (arXiv 2410.07348).

    Experts are ordered FFN, constant, copy, zero. Vanilla MoE has none but FFN experts and no gating residual; a
    dense model is one FFN expert.

    Args:
        num_key_value_heads: None means `num_attention_heads`.
        head_dim: width of a head; None means `hidden_size` / `num_attention_heads`.
        qk_norm: RMSNorm of queries and keys before RoPE: "none", of each "head", or over the "width" of all heads.
        num_experts: FFN (SwiGLU) experts.
        n_zero: zero experts, output 0.
        n_copy: copy experts, output x.
        n_const: constant experts, output a1·x + a2·v.
        num_experts_per_tok: experts chosen per token, K.
        tau: τ > 0 of the balance loss. The smaller, the more tokens go to zero-computation experts.
        router_aux_loss_coef: β, the weight of the balance loss, which is added while the model trains.
        capacity_factor: that of the training which the weights come from. Nothing is dropped here.
        gating_residual: add the previous layer's logits, mapped by an E×E matrix, to this layer's.
        router_depth: 1 for a linear router, 2 for linear, tanh, linear with a hidden width of 8·E.
        scale_expert_input: experts (not the router) receive x times this.
        logits_norm_std: scale logits to this standard deviation before the softmax.
        renormalize_without_zero: zero experts' gates are left out of the sum that gates are divided by.
        norm_topk_prob: False: gates are the chosen experts' probabilities among all E.
        balance_groups: balance FFN experts as one group against zero-computation experts as another.
        score_bias: the scores of zero-computation experts have a bias.
        ffn_budget: FFN experts per token, in the mean; held by a bias on the choice alone.
        budget_over: what that mean was taken over in training: the "model" or each "layer".
    """

    model_type = "moepp"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012

    vocab_size: int = 8192
    num_hidden_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 688
    num_attention_heads: int = 4
    num_key_value_heads: Any = None  # an int once it is built, and so is head_dim
    head_dim: Any = None
    qk_norm: str = "none"
    max_position_embeddings: int = 256
    rope_parameters: Any = None  # a dict once it is built
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    num_experts: int = 8
    n_zero: int = 1
    n_copy: int = 1
    n_const: int = 2
    num_experts_per_tok: int = 2
    tau: float = 0.75
    router_aux_loss_coef: float = 0.01
    capacity_factor: float | None = None
    gating_residual: bool = True
    router_depth: int = 1
    scale_expert_input: float = 1.0
    logits_norm_std: float | None = None
    renormalize_without_zero: bool = True
    norm_topk_prob: bool = True
    balance_groups: bool = False
    score_bias: bool = False
    ffn_budget: float | None = None
    budget_over: str = "model"
    use_cache: bool = True
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        if self.rope_parameters["rope_type"] != "default" or self.hidden_act != "silu":
            raise ValueError("MoE++ has RoPE without scaling and silu, nothing else is built")

    @property
    def n_routed(self) -> int:
        """E, all experts that the router knows."""
        return self.num_experts + self.n_const + self.n_copy + self.n_zero

    @property
    def balance_tau(self) -> float:
        """τ of the load balance; with a budget the one that gives as many FFN experts at balance."""
        if self.ffn_budget is None:
            return self.tau
        left = self.num_experts_per_tok - self.ffn_budget
        return self.ffn_budget * (self.n_routed - self.num_experts) / (left * self.num_experts)
