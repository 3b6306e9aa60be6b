from typing import Any

import pytest
import torch

from moepp.model import (
    InputError,
    KVCache,
    MoEConfig,
    Transformer,
    TransformerConfig,
    count_parameters,
    mean_load_balance_loss,
)
from moepp.model.transformer import Block

TINY = TransformerConfig(64, n_layers=3, hidden_size=16, intermediate_size=24, n_heads=4, context_length=12)
VANILLA = MoEConfig(n_zero=0, n_copy=0, n_const=0, gating_residual=False)


def build(moe: MoEConfig, config: TransformerConfig = TINY) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, moe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from the near-uniform start, so that routing decisions differ
    return model


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_never_change_earlier_logits(capacity_factor: float | None, training: bool) -> None:
    model = build(MoEConfig(n_ffn=4, capacity_factor=capacity_factor)).train(training)
    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    dropped = [routing.kept for routing in before.routings if routing.kept is not None]
    assert len(dropped) == (3 if capacity_factor and training else 0)
    assert all(not kept.all() for kept in dropped)
    for position in (1, 5, 11):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 17) % 64
        after = model(changed).logits
        torch.testing.assert_close(after[:, :position], before.logits[:, :position], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[:, position:], before.logits[:, position:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "head_size": 6, "qk_norm": "head"}, {"qk_norm": "width"}]
)
def test_cache_gives_the_same_logits(options: dict) -> None:
    config = TransformerConfig(64, 3, 16, 24, 4, context_length=12, **options)
    model = build(MoEConfig(n_ffn=4), config).eval()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model(tokens).logits
    caches = [KVCache() for _ in range(3)]
    parts = [model(part, caches).logits for part in tokens.split([5] + [1] * 7, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-4)


def test_bfloat16_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY, MoEConfig())
    tokens = torch.randint(64, (4, 12))
    full = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens)
    assert half.logits.dtype == torch.bfloat16
    assert all(routing.logits.dtype == torch.float32 for routing in half.routings)
    assert (half.logits - full).norm() / full.norm() < 2e-2


def test_gating_residual_hands_on_the_full_logits() -> None:
    """Layer 1's logits are W x + W_g G_0: with W = 0 and W_g = 1 they are layer 0's."""
    model = build(MoEConfig(n_ffn=4))
    assert model.blocks[0].moe.router.residual is None
    with torch.no_grad():
        router = model.blocks[1].moe.router
        router.weights[0].zero_()
        router.residual.copy_(torch.eye(8))
    routings = model(torch.arange(12)[None]).routings
    assert torch.equal(routings[0].logits, routings[1].logits)


def test_every_parameter_gets_a_gradient() -> None:
    model = build(MoEConfig(n_ffn=4))
    output = model(torch.arange(12)[None])
    (output.logits.logsumexp(-1).sum() + mean_load_balance_loss(output.routings)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_shared_parts_start_alike_whatever_the_switches() -> None:
    def start(moe: MoEConfig) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return Transformer(TINY, moe).state_dict()

    full, vanilla = start(MoEConfig()), start(VANILLA)
    assert set(vanilla) < set(full)
    assert {name.split(".moe.")[-1] for name in set(full) - set(vanilla)} == {
        "router.residual",
        "zero_computation.constants",
        "zero_computation.mix",
    }
    for name in vanilla:
        if "router" not in name:  # the router has a row per expert
            assert torch.equal(full[name], vanilla[name]), name
    assert not torch.equal(full["blocks.0.moe.ffn.w_down"], full["blocks.1.moe.ffn.w_down"])


@pytest.mark.parametrize("moe", [MoEConfig(), VANILLA, MoEConfig(router_depth=2, n_const=0), MoEConfig(n_zero=3)])
@pytest.mark.parametrize(
    "options", [{"tie_embeddings": False}, {"head_size": 6, "qk_norm": "head"}, {"qk_norm": "width"}]
)
def test_parameter_count(moe: MoEConfig, options: dict) -> None:
    config = TransformerConfig(64, 3, 16, 24, 4, n_kv_heads=2, **options)
    model = Transformer(config, moe)
    count = count_parameters(config, moe)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.ffn_experts == sum(p.numel() for name, p in model.named_parameters() if ".ffn." in name)
    assert count.active(moe.n_ffn) == count.total


def test_a_parameter_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an expert of one's own: comparisons would be by a count without it."""

    class Scaled(Block):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.scales = torch.nn.Parameter(torch.empty(2))

    monkeypatch.setattr("moepp.model.transformer.Block", Scaled)
    with pytest.raises(AssertionError, match=r"counts\.py does not count"):
        build(MoEConfig())


def test_context_longer_than_the_model() -> None:
    with pytest.raises(InputError, match="13 positions do not fit transformer.context_length=12"):
        build(MoEConfig())(torch.zeros(1, 13, dtype=torch.long))
