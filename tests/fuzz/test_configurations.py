"""Model and optimizer configurations out of any values: refused, or a model whose numbers are finite."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig, mean_load_balance_loss
from moepp.training.optimizer import OptimConfig
from tests.fuzz.harness import cases, refused

HUGE = st.sampled_from([10**9, 2**40]) | st.integers(2**62, 2**70) | st.just(10**400)
INTEGERS = st.integers(-2, 9) | HUGE
NUMBERS = (
    st.floats() | st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e-8, 0.5, 1.0, 1e3, 1e8, 1e30, 1e308]) | INTEGERS
)
ANYTHING = NUMBERS | st.booleans() | st.none() | st.text(max_size=3) | st.lists(NUMBERS, max_size=2)


def spoilt(
    config: type, good: dict[str, st.SearchStrategy[Any]], values: st.SearchStrategy[Any], **known: Any
) -> st.SearchStrategy:
    """Good options, up to two of which are given any value."""
    strategies = {field.name: values for field in fields(config)} | known
    bad = st.lists(st.one_of([st.tuples(st.just(name), value) for name, value in strategies.items()]), max_size=2)
    good_ones = st.fixed_dictionaries({}, optional=good)
    return st.tuples(good_ones, bad).map(lambda parts: parts[0] | dict(parts[1]))


SIZES = {
    "vocab_size": st.integers(1, 20),
    "n_layers": st.integers(1, 3),
    "hidden_size": st.sampled_from([4, 8, 12, 16]),
    "intermediate_size": st.integers(1, 9),
    "n_heads": st.sampled_from([1, 2]),
    "n_kv_heads": st.sampled_from([None, 1, 2]),
    "context_length": st.just(8),
    "tie_embeddings": st.booleans(),
}
EXPERTS = {
    "n_ffn": st.integers(1, 5),
    "n_zero": st.integers(0, 2),
    "n_copy": st.integers(0, 2),
    "n_const": st.integers(0, 3),
    "top_k": st.integers(1, 3),
    "gating_residual": st.booleans(),
    "router_depth": st.sampled_from([1, 2]),
    "renormalize_without_zero": st.booleans(),
}
SHARE = st.floats(0.01, 1)
MORE = {
    "tau": SHARE,
    "capacity_factor": st.none() | st.floats(1, 4),
    "balance_weight": SHARE,
    "ffn_budget": st.none() | SHARE,
    "logits_norm_std": st.none() | SHARE,
}
SCHEDULE = {
    "lr": SHARE,
    "min_lr": st.just(0.001),
    "warmup_steps": st.integers(0, 20),
    "betas": st.tuples(SHARE, SHARE),
    "weight_decay": SHARE,
}
# from nothing to the most that any option takes: where float32 is most likely to give up
EXTREMES = st.sampled_from([1e-45, 1e-30, 1e-12, 1e-6, 0.5, 1.0, 10.0, 1e3, 1e9])
SMALL = {"vocab_size": 16, "n_layers": 2, "hidden_size": 8, "intermediate_size": 8, "n_heads": 2}


@cases(500, least_good=0.2, options=spoilt(MoEConfig, EXPERTS | MORE, ANYTHING))
def test_moe(options: dict[str, Any]) -> bool:
    def use() -> None:
        moe = MoEConfig(**options)
        assert 0 <= moe.ffn_share <= 1
        if moe.capacity_factor is not None:
            assert min(moe.capacities(128)) >= 0

    return not refused(use)


@cases(400, least_good=0.2, options=spoilt(TransformerConfig, SIZES, ANYTHING))
def test_transformer(options: dict[str, Any]) -> bool:
    return not refused(lambda: TransformerConfig(**options))


@cases(300, least_good=0.2, options=spoilt(OptimConfig, SCHEDULE, NUMBERS, betas=st.tuples(NUMBERS, NUMBERS)))
def test_optimizer(options: dict[str, Any]) -> bool:
    def use() -> None:
        optim = OptimConfig(**options)
        assert all(0 <= optim.lr_at(step, total_steps=10) <= optim.lr * (1 + 1e-12) for step in (0, 5, 9))
        assert optim.lr <= 10**9

    return not refused(use)


@cases(
    300,
    least_good=0.2,
    transformer=spoilt(TransformerConfig, SIZES, EXTREMES, **SIZES),
    moe=spoilt(MoEConfig, EXPERTS, EXTREMES, **EXPERTS),
)
def test_what_is_not_refused_trains_on_finite_numbers(transformer: dict[str, Any], moe: dict[str, Any]) -> bool:
    torch.manual_seed(0)
    try:
        config = TransformerConfig(**SMALL | {"context_length": 8} | transformer)
        model = Transformer(config, MoEConfig(**moe))
    except InputError:
        return False
    tokens = torch.arange(9) % config.vocab_size
    output = model(tokens[None, :8])
    balance = mean_load_balance_loss(output.routings)
    loss = F.cross_entropy(output.logits[0], tokens[1:]) + model.moe_config.balance_weight * balance
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return True


@cases(100, name=st.sampled_from(["vocab_size", "hidden_size", "n_layers", "n_ffn", "n_const"]), size=HUGE)
def test_a_model_that_no_machine_holds_is_not_tried(name: str, size: int) -> None:
    def build() -> None:
        moe = {name: size} if name in EXPERTS else {}
        Transformer(TransformerConfig(**SMALL | ({} if moe else {name: size})), MoEConfig(**moe))

    assert refused(build)
