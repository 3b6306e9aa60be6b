"""A decoder-only transformer whose feed-forward blocks are MoE++ layers.

B sequences, S positions, D hidden size, N query heads, M key/value heads, d head size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from .attention import attend
from .budget import Budget
from .config import MoEConfig, TransformerConfig, require
from .counts import count_parameters, require_memory
from .errors import InputError
from .init import draw_seed, init_parameters
from .moe import MoELayer
from .norm import RMSNorm
from .rope import rope_table, rotate
from .router import Routing, routers


class KVCache:
    """Keys and values of the positions already seen, for one attention layer."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, k_BMSd: Tensor, v_BMSd: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; returns all keys and values so far."""
        self.keys = k_BMSd if self.keys is None else torch.cat((self.keys, k_BMSd), dim=2)
        self.values = v_BMSd if self.values is None else torch.cat((self.values, v_BMSd), dim=2)
        return self.keys, self.values


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions in the half-split layout."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim, D = config.head_dim, config.hidden_size
        q_width, kv_width = config.n_heads * self.head_dim, config.kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.qkv = nn.Linear(D, sum(self.widths), bias=False)
        self.output = nn.Linear(q_width, D, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            q_normed, k_normed = (self.head_dim,) * 2 if self.qk_norm == "head" else (q_width, kv_width)
            self.q_norm = RMSNorm(q_normed, eps=config.norm_eps)
            self.k_norm = RMSNorm(k_normed, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, rope_2Sd: Tensor, cache: KVCache | None = None) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = self.qkv(x_BSD).split(self.widths, dim=-1)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, S, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))  # (B, heads, S, d)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope_2Sd), rotate(k, rope_2Sd)
        causal = True
        if cache is not None:
            require(len(cache) == 0 or S == 1, "cache", S, "takes one position at a time after the first call")
            causal = len(cache) == 0
            k, v = cache.append(k, v)
        y = attend(q, k, v, causal)
        return self.output(y.transpose(1, 2).reshape(B, S, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: TransformerConfig, moe: MoEConfig, first: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.moe = MoELayer(config.hidden_size, config.intermediate_size, moe, first)

    def forward(
        self,
        x_BSD: Tensor,
        rope_2Sd: Tensor,
        previous_logits_TE: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Routing]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope_2Sd, cache)
        y_BSD, routing = self.moe(self.moe_norm(x_BSD), previous_logits_TE)
        return x_BSD + y_BSD, routing


@dataclass
class Output:
    """logits (B, S, V), and one Routing per MoE layer."""

    logits: Tensor
    routings: list[Routing]


register_dataclass(Output)  # as Routing is


class Transformer(nn.Module):
    """tokens (B, S) → Output. Each layer's router hands its logits to the next.

    Built on the meta device it has no weights yet; `materialize` gives it the same as elsewhere (`to_empty` alone
    leaves buffers undefined that no state dict holds).
    """

    rope_2Sd: Tensor

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        require_memory(config, moe)
        self.seed = draw_seed()
        self.config, self.moe_config = config, moe
        device = torch.get_default_device()
        with torch.device("meta"):  # every weight is drawn once, below
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.blocks = nn.ModuleList(Block(config, moe, first=i == 0) for i in range(config.n_layers))
            self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.budget = Budget(moe, routers(self.blocks)) if moe.ffn_budget is not None else None
            self.register_buffer("rope_2Sd", rope_table(config), persistent=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        held = sum(parameter.numel() for parameter in self.parameters())
        assert held == count_parameters(config, moe).total, "counts.py does not count what this model holds"
        self.checkpoint_activations = False  # compute the blocks' activations a second time in backward
        if device.type != "meta":
            self.materialize(device)

    def materialize(self, device: torch.device) -> None:
        """Draw the weights, on `device`. Of what is sharded each rank keeps its shards."""
        config = self.config
        self.to_empty(device=device)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        init_parameters(self, self.seed, config.init_std, config.n_layers, config.tie_embeddings)
        self.rope_2Sd.copy_(rope_table(config))

    def set_ffn_budget(self, ffn_per_token: float) -> None:
        """From now on tokens take so many FFN experts, in the mean over text like that of the training.

        Raises:
            InputError: no choice can spend that, or the model has no margins' quantiles of a training with one.
        """
        if self.budget is None or self.budget.steps == 0:
            raise InputError(
                "ffn_budget: only what was trained with one (model.moe.ffn_budget), and has its margins' "
                "quantiles (`Budget.observe` and `step` in a loop of your own), can be given another"
            )
        self.moe_config.require_budget(ffn_per_token, "ffn_budget")
        self.budget.spend(ffn_per_token)

    def forward(self, tokens_BS: Tensor, caches: list[KVCache] | None = None) -> Output:
        """With `caches` (one per layer) `tokens_BS` continues the positions that these have seen."""
        hidden_BSD, routings = self.hidden(tokens_BS, caches)
        return Output(self.head(hidden_BSD), routings)

    def hidden(self, tokens_BS: Tensor, caches: list[KVCache] | None = None) -> tuple[Tensor, list[Routing]]:
        """What the head receives, (B, S, D), and the routings.

        Raises:
            InputError: more positions than `context_length`.
        """
        start = len(caches[0]) if caches else 0
        end = start + tokens_BS.shape[1]
        if end > self.config.context_length:
            raise InputError(f"{end} positions do not fit transformer.context_length={self.config.context_length}")
        rope_2Sd = self.rope_2Sd[:, start:end]
        x_BSD = self.embedding(tokens_BS)
        routings: list[Routing] = []
        for i, block in enumerate(self.blocks):
            previous_logits = routings[-1].logits if routings else None
            inputs = x_BSD, rope_2Sd, previous_logits, caches[i] if caches else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BSD, routing = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BSD, routing = block(*inputs)
            routings.append(routing)
        return self.norm(x_BSD), routings
