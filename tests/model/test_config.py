import pytest

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n_ffn": 0}, "moe.n_ffn: must be at least 1, got 0"),
        ({"n_zero": -1}, "moe.n_zero: must not be negative, got -1"),
        ({"top_k": 13}, "moe.top_k: must not exceed the 12 experts, got 13"),
        ({"top_k": 0}, "moe.top_k: must be at least 1, got 0"),
        ({"tau": 0.0}, "moe.tau: must be positive, got 0.0"),
        ({"tau": float("nan")}, "moe.tau: must lie between -1e9 and 1e9, got nan"),
        ({"capacity_factor": 0.0}, "moe.capacity_factor: must be positive, or null for no limit, got 0.0"),
        ({"router_depth": 3}, "moe.router_depth: must be 1 or 2, got 3"),
        ({"tau": 1e308}, "moe.tau: must lie between -1e9 and 1e9, got 1e+308"),
        ({"balance_weight": float("inf")}, "moe.balance_weight: must lie between -1e9 and 1e9, got inf"),
        ({"scale_expert_input": 0.0}, "moe.scale_expert_input: must be positive, got 0.0"),
        ({"n_ffn": 2.5}, "moe.n_ffn: must be a whole number, got 2.5"),
        ({"n_zero": True}, "moe.n_zero: must be a whole number, got True"),
        ({"n_copy": None}, "moe.n_copy: must be a whole number, got None"),
        ({"capacity_factor": "1"}, "moe.capacity_factor: must be a number or null, got '1'"),
        ({"gating_residual": 1}, "moe.gating_residual: must be true or false, got 1"),
        ({"router_depth": True}, "moe.router_depth: must be 1 or 2, got True"),
        ({"router_depth": 2.0}, "moe.router_depth: must be 1 or 2, got 2.0"),
        ({"n_zero": -3, "ffn_budget": 1.0}, "moe.n_zero: must not be negative, got -3"),
        ({"top_k": 99, "ffn_budget": 1.0}, "moe.top_k: must not exceed the 12 experts, got 99"),
        (
            {"n_ffn": 1, "n_zero": 0, "n_copy": 0, "n_const": 0, "top_k": 1, "logits_norm_std": 1.0},
            "moe.logits_norm_std: needs two experts or more, got 1.0",
        ),
    ],
)
def test_impossible_moe(bad: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        MoEConfig(**bad)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n_heads": 3}, "transformer.n_heads: must divide hidden_size=256, got 3"),
        ({"n_heads": 256}, "transformer.n_heads: must leave an even head size for RoPE, not 1, got 256"),
        ({"n_kv_heads": 3}, "transformer.n_kv_heads: must divide n_heads=4, got 3"),
        ({"n_layers": 0}, "transformer.n_layers: must be at least 1, got 0"),
        ({"n_heads": 0}, "transformer.n_heads: must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "transformer.rope_theta: must be at least 1, got 0.0"),
        ({"norm_eps": 1e-300}, "transformer.norm_eps: must be at least 1e-12, got 1e-300"),
        ({"init_std": 11.0}, "transformer.init_std: must be positive and at most 10, got 11.0"),
        ({"vocab_size": 10**10}, "transformer.vocab_size: must lie between -1e9 and 1e9, got 10000000000"),
        ({"n_layers": "4"}, "transformer.n_layers: must be a whole number, got '4'"),
    ],
)
def test_impossible_transformer(bad: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        TransformerConfig(**bad)
    assert str(error.value) == message


def test_whole_numbers_will_do_for_floats() -> None:
    assert MoEConfig(tau=1, capacity_factor=2).ffn_share == pytest.approx(2 / 3)


def test_a_model_larger_than_memory_is_refused_before_it_is_built() -> None:
    with pytest.raises(InputError, match="a model of these sizes needs 4.86e.06 GB, this machine has"):
        Transformer(TransformerConfig(hidden_size=10**6, intermediate_size=10**8), MoEConfig(n_ffn=1))


@pytest.mark.parametrize(("tau", "share"), [(0.1, 1 / 6), (0.25, 1 / 3), (0.5, 1 / 2), (0.75, 0.6), (1.0, 2 / 3)])
def test_ffn_share_is_the_inverse_of_the_papers_ideal(tau: float, share: float) -> None:
    """The ideal speed-ups of the 0.6B model: 6.00, 3.00, 2.00, 1.67 and 1.50."""
    assert MoEConfig(tau=tau).ffn_share == pytest.approx(share)


@pytest.mark.parametrize("budget", [0.2, 1.2, 1.9])
def test_a_budget_has_a_tau_of_its_own(budget: float) -> None:
    moe = MoEConfig(tau=3.0, capacity_factor=1.1, ffn_budget=budget)
    assert MoEConfig(tau=moe.balance_tau).expected_ffn_per_token == pytest.approx(budget)
    assert moe.ffn_share == pytest.approx(budget / 2)
    ffn, zero_computation = moe.capacities(n_tokens=10)
    assert (8 * ffn, 4 * zero_computation) == pytest.approx((11 * budget, 11 * (2 - budget)))


def test_kinds_are_in_the_released_order() -> None:
    kinds = MoEConfig(n_ffn=3, n_const=2, n_copy=1, n_zero=2).kinds
    assert {kind: list(range(8))[where] for kind, where in kinds.items()} == {
        "ffn": [0, 1, 2],
        "const": [3, 4],
        "copy": [5],
        "zero": [6, 7],
    }
