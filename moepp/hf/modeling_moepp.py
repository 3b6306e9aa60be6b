"""MoE++ (arXiv 2410.07348), mixture-of-experts with zero-computation experts, for transformers 5.4 or later.

Copied into exported folders: it imports torch, transformers and its configuration alone. From moepp, Apache-2.0.

B sequences, S positions, T = B·S tokens, D hidden size, H intermediate size, d head size, K choices a token,
E experts in the order FFN, constant, copy, zero; C of them are constant; R of the T·K choices go to FFN experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_moepp import MoeppConfig


class MoeppRouter(nn.Module):
    """G_j = W_j x_j + W_g,j G_(j-1) (equation 6), softmax, top-k, gates over the chosen. All of it in float32."""

    bias: Tensor | None
    choice_bias: Tensor | None

    def __init__(self, config: MoeppConfig, first: bool) -> None:
        super().__init__()
        self.config = config
        D, E = config.hidden_size, config.n_routed
        self.hidden = nn.Parameter(torch.empty(8 * E, D)) if config.router_depth == 2 else None
        self.weight = nn.Parameter(torch.empty(E, D if self.hidden is None else 8 * E))
        self.residual = nn.Parameter(torch.empty(E, E)) if config.gating_residual and not first else None
        # (), on the scores of zero-computation experts
        self.register_buffer("bias", torch.zeros(()) if config.score_bias else None)
        # (2,), likewise, for the choice alone: [1] in evaluation, [0] for moepp
        self.register_buffer("choice_bias", torch.zeros(2) if config.ffn_budget is not None else None)

    def forward(self, x_TD: Tensor, previous_logits_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (T, E), for the next layer; the chosen experts (T, K), best first; their gates (T, K)."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if self.hidden is not None:
                x_TD = F.linear(x_TD, self.hidden.to(dtype)).tanh()
            logits_TE = F.linear(x_TD, self.weight.to(dtype))
            if self.residual is not None and previous_logits_TE is not None:
                logits_TE = logits_TE + F.linear(previous_logits_TE, self.residual.to(dtype))
            scores_TE = self.scores(logits_TE)
            experts_TK = self.choice(scores_TE).topk(self.config.num_experts_per_tok, dim=-1).indices
            return logits_TE, experts_TK, self.gates(scores_TE, experts_TK)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """(T, E), what softmax is taken of."""
        if self.config.logits_norm_std is not None:
            std_T1 = logits_TE.std(-1, keepdim=True).clamp(min=1e-12)  # 0 where all logits are equal
            logits_TE = logits_TE * (self.config.logits_norm_std / std_T1)
        return self.biased(logits_TE, self.bias)

    def choice(self, scores_TE: Tensor) -> Tensor:
        """(T, E), what top-k is taken of."""
        return self.biased(scores_TE, None if self.choice_bias is None else self.choice_bias[1])

    def biased(self, scores_TE: Tensor, bias: Tensor | None) -> Tensor:
        """With a bias on the zero-computation experts'."""
        if bias is None:
            return scores_TE
        is_ffn_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device) < self.config.num_experts
        return scores_TE + bias.to(scores_TE.dtype).where(~is_ffn_E, 0.0)

    def gates(self, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """(T, K): softmax over the chosen experts' scores. A zero expert's gate is 0, before the division."""
        is_zero_TK = experts_TK >= self.config.n_routed - self.config.n_zero
        if not self.config.norm_topk_prob:
            return scores_TE.softmax(-1).gather(1, experts_TK).masked_fill(is_zero_TK, 0.0)
        chosen_TK = scores_TE.gather(1, experts_TK)
        if not self.config.renormalize_without_zero:
            return chosen_TK.softmax(-1)
        # -inf takes zero experts out of the sum; a row of nothing but -inf would be NaN, forward and backward
        all_zero_T1 = is_zero_TK.all(-1, keepdim=True)
        gates_TK = chosen_TK.masked_fill(is_zero_TK & ~all_zero_T1, float("-inf")).softmax(-1)
        return gates_TK.masked_fill(is_zero_TK, 0.0)


@use_experts_implementation
class MoeppExperts(nn.Module):
    """The FFN (SwiGLU) experts, stacked. `set_experts_implementation` exchanges `forward`."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        self.num_experts, D, H = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * H, D))  # the gate's half first
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, D, H))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, D), (N, k), (N, k) → (N, D). Index F stands for experts that are elsewhere (expert parallelism)."""
        y_ND = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            if e < self.num_experts:
                row, choice = torch.where(top_k_index == e)
                gate, up = F.linear(hidden_states[row], self.gate_up_proj[e]).chunk(2, dim=-1)
                out = F.linear(self.act_fn(gate) * up, self.down_proj[e]) * top_k_weights[row, choice, None]
                y_ND.index_add_(0, row, out.to(y_ND.dtype))
        return y_ND


class MoeppBlock(nn.Module):
    """Route, compute, combine."""

    def __init__(self, config: MoeppConfig, first: bool) -> None:
        super().__init__()
        self.config = config
        self.gate = MoeppRouter(config, first)
        self.experts = MoeppExperts(config)
        C, D = config.n_const, config.hidden_size
        self.constants = nn.Parameter(torch.empty(C, D)) if C else None  # v
        self.mix = nn.Parameter(torch.empty(C, 2, D)) if C else None  # W_c: row 0 weighs x, row 1 weighs v

    def forward(self, x_BSD: Tensor, previous_logits_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, S, D) → (B, S, D), and the router's logits (T, E)."""
        x_TD = x_BSD.flatten(0, 1)
        logits_TE, experts_TK, gates_TK = self.gate(x_TD, previous_logits_TE)
        x_TD = x_TD * self.config.scale_expert_input
        y_TD = self.ffn(x_TD, experts_TK, gates_TK)
        if self.config.n_copy or self.config.n_const:
            y_TD = y_TD + self.copy_and_constant(x_TD, experts_TK, gates_TK)
        return y_TD.view_as(x_BSD), logits_TE

    def ffn(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """(T, D) of the FFN experts. They are given the rows that they compute and no others: what is for none is
        an error to some back-ends, and to others a row that they leave without a value."""
        y_TKD = x_TD.new_zeros(*experts_TK.shape, x_TD.shape[-1])
        token_R, choice_R = torch.where(experts_TK < self.config.num_experts)
        if len(token_R):
            experts_R1, gates_R1 = experts_TK[token_R, choice_R, None], gates_TK[token_R, choice_R, None]
            y_TKD[token_R, choice_R] = self.experts(x_TD[token_R], experts_R1, gates_R1)
        elif self.training:  # a gradient of 0, where one of several processes would have none
            y_TKD = y_TKD + 0.0 * sum(weight.flatten()[0] for weight in self.experts.parameters())
        return y_TKD.sum(1)

    def copy_and_constant(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """(T, D) of copy (x) and constant experts (a1·x + a2·v, [a1, a2] = softmax(W_c x)) (equations 4 and 5)."""
        sizes = [self.config.num_experts, self.config.n_const, self.config.n_copy, self.config.n_zero]
        gates_TE = gates_TK.new_zeros(len(x_TD), sum(sizes)).scatter(1, experts_TK, gates_TK)
        _, const_TC, copy_TN, _ = gates_TE.split(sizes, dim=1)
        scale_T, constants_TD = copy_TN.sum(1), x_TD.new_zeros(())
        if self.constants is not None and self.mix is not None:
            # softmax over two logits is a sigmoid of their difference
            a1_TC = F.linear(x_TD, (self.mix[:, 0] - self.mix[:, 1]).to(x_TD.dtype)).to(gates_TE.dtype).sigmoid()
            scale_T = scale_T + (const_TC * a1_TC).sum(1)
            constants_TD = (const_TC * (1 - a1_TC)).to(x_TD.dtype) @ self.constants.to(x_TD.dtype)
        return x_TD * scale_T[:, None].to(x_TD.dtype) + constants_TD


class MoeppAttention(nn.Module):
    """Causal grouped-query attention with rotary positions in the half-split layout."""

    def __init__(self, config: MoeppConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, config.head_dim, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        D, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        q_width, kv_width = config.num_attention_heads * d, config.num_key_value_heads * d
        self.q_proj = nn.Linear(D, q_width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, kv_width, bias=False) for _ in "kv")
        self.o_proj = nn.Linear(q_width, D, bias=False)
        self.o_proj.writes_residual = True  # type: ignore[assignment]
        if config.qk_norm != "none":
            widths = (d, d) if config.qk_norm == "head" else (q_width, kv_width)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=eps) for width in widths)

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, weights = attend(self, q, k, v, mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(y.flatten(2)), weights


def rope_of(config: MoeppConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, 1, S, d) each. Computed when it is needed: buffers do not survive the meta device."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, None, :, None] * config.rope_parameters["rope_theta"] ** -(even / config.head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BNSd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: turn each pair (i, i + d/2) by its position's angle."""
    cos, sin = rope
    first, second = x_BNSd.chunk(2, dim=-1)
    return (x_BNSd * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BNSd.dtype)


class MoeppDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: MoeppConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MoeppAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoeppBlock(config, first=layer_idx == 0)

    def forward(self, x_BSD: Tensor, previous_logits_TE: Tensor | None, **attention: Any) -> tuple[Tensor, Tensor]:
        """(B, S, D), and the router's logits (T, E)."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), **attention)[0]
        y_BSD, logits_TE = self.mlp(self.post_attention_layernorm(x_BSD), previous_logits_TE)
        return x_BSD + y_BSD, logits_TE


class MoeppPreTrainedModel(PreTrainedModel):
    config_class = MoeppConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeppDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"model\.budget\."]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MoeppDecoderLayer, "attentions": MoeppAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, std), over sqrt(2L) for what writes to the residual stream; N(0, 1) for an untied embedding."""
        super()._init_weights(module)
        std = self.config.initializer_range
        small = std * (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            init.normal_(module.weight)
        elif hasattr(module, "writes_residual"):
            init.normal_(module.weight, std=small)
        elif isinstance(module, MoeppRouter | MoeppBlock | MoeppExperts):
            for name, parameter in module.named_parameters(recurse=False):
                init.normal_(parameter, std=small if name == "down_proj" else std)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)


class MoeppModel(MoeppPreTrainedModel):
    """Tokens → what the head receives. Each layer's router hands its logits to the next."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoeppDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @capture_outputs  # hidden_states and attentions, where they are asked for
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """`router_logits` are, layer by layer, the scores (T, E) that softmax and top-k are taken of."""
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            n_seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(n_seen, n_seen + x_BSD.shape[1], device=x_BSD.device)[None]
        mask = create_causal_mask(
            self.config, x_BSD, attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        kwargs |= {"mask": mask, "rope": rope_of(self.config, position_ids), "position_ids": position_ids}
        logits_TE, scores = None, []
        layer: Any
        for layer in self.layers:
            # what has a gradient goes by position, as checkpointing wants it
            x_BSD, logits_TE = layer(x_BSD, logits_TE, past_key_values=past_key_values, **kwargs)
            scores.append(layer.mlp.gate.scores(logits_TE))
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x_BSD), past_key_values=past_key_values, router_logits=tuple(scores)
        )


def load_balance_loss(scores: tuple[Tensor, ...], attention_mask: Tensor | None, config: MoeppConfig) -> Tensor:
    """Mean over layers of L_b = Σ_i η_i f_i P_i, η = 1 for FFN experts, τ for the others (equation 7).

    f_i is the share of tokens that score expert i among their best, P_i its mean probability. Padding does not
    count.
    """
    scores_LTE = torch.stack([each.to(scores[0].device) for each in scores])
    if attention_mask is not None and attention_mask.dim() == 2:
        S = scores_LTE.shape[1] // len(attention_mask)
        counts_T = attention_mask[:, -S:].flatten().bool()
        scores_LTE = scores_LTE[:, counts_T]
    chosen_LTK = scores_LTE.topk(config.num_experts_per_tok, dim=-1).indices
    f_LE = torch.zeros_like(scores_LTE).scatter(2, chosen_LTK, 1.0).mean(1)
    P_LE = scores_LTE.softmax(-1).mean(1)
    groups = [config.num_experts, config.n_routed - config.num_experts]
    if config.balance_groups:  # as if spread evenly over the FFN experts, and over the others
        f_LE, P_LE = (
            torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in value.split(groups, 1)], 1)
            for value in (f_LE, P_LE)
        )
    ffn_LF, others_LN = (f_LE * P_LE).split(groups, dim=1)
    return (ffn_LF.sum(1) + config.balance_tau * others_LN.sum(1)).mean()


def share_of_step(labels: Tensor, num_items_in_batch: Any = None, shift_labels: Any = None, **_: Any) -> Any:
    """These labels' part of a step's, by which a loss counts, as Trainer adds up micro-batches; else 1."""
    if num_items_in_batch is None:
        return 1.0
    n_labels = (labels[..., 1:] if shift_labels is None else shift_labels).ne(-100).sum()
    return n_labels / torch.as_tensor(num_items_in_batch, device=n_labels.device)


class MoeppForCausalLM(MoeppPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__(config)
        self.model = MoeppModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """With `labels` the loss, to which β·L_b is added while the model trains; L_b itself is `aux_loss`."""
        where = attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        outputs = self.model(input_ids, *where, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        loss = aux_loss = None
        if asked or self.training:
            aux_loss = load_balance_loss(outputs.router_logits, attention_mask, self.config).to(logits.device)
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if self.training:
                loss = loss + self.config.router_aux_loss_coef * share_of_step(labels, **kwargs) * aux_loss
        found = outputs.past_key_values, outputs.hidden_states, outputs.attentions
        return MoeCausalLMOutputWithPast(loss, aux_loss, logits, *found, outputs.router_logits if asked else None)
