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


def options_of(config: type, values: st.SearchStrategy[Any], **known: st.SearchStrategy[Any]) -> st.SearchStrategy:
    """Some of a dataclass's fields, by default with any of `values`."""
    strategies = {field.name: values for field in fields(config)}
    return st.fixed_dictionaries({}, optional=strategies | known)


@cases(500, options=options_of(MoEConfig, ANYTHING))
def test_moe(options: dict[str, Any]) -> None:
    def use() -> None:
        moe = MoEConfig(**options)
        assert 0 <= moe.ffn_share <= 1
        if moe.capacity_factor is not None:
            assert min(moe.capacities(128)) >= 0

    refused(use)


@cases(400, options=options_of(TransformerConfig, ANYTHING))
def test_transformer(options: dict[str, Any]) -> None:
    refused(lambda: TransformerConfig(**options))


@cases(300, options=options_of(OptimConfig, NUMBERS, betas=st.tuples(NUMBERS, NUMBERS)))
def test_optimizer(options: dict[str, Any]) -> None:
    def use() -> None:
        optim = OptimConfig(**options)
        assert all(0 <= optim.lr_at(step, total_steps=10) < 10**9 for step in (0, 5, 9))

    refused(use)


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
# from nothing to the most that any option takes: where float32 is most likely to give up
EXTREMES = st.sampled_from([1e-45, 1e-30, 1e-12, 1e-6, 0.5, 1.0, 10.0, 1e3, 1e9])
SMALL = {"vocab_size": 16, "n_layers": 2, "hidden_size": 8, "intermediate_size": 8, "n_heads": 2}


@cases(
    300,
    transformer=options_of(TransformerConfig, EXTREMES, **SIZES),
    moe=options_of(MoEConfig, EXTREMES, **EXPERTS),
)
def test_what_is_not_refused_trains_on_finite_numbers(transformer: dict[str, Any], moe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    try:
        config = TransformerConfig(**SMALL | {"context_length": 8} | transformer)
        model = Transformer(config, MoEConfig(**moe))
    except InputError:
        return
    tokens = torch.arange(9) % config.vocab_size
    output = model(tokens[None, :8])
    balance = mean_load_balance_loss(output.routings)
    loss = F.cross_entropy(output.logits[0], tokens[1:]) + model.moe_config.balance_weight * balance
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@cases(100, name=st.sampled_from(["vocab_size", "hidden_size", "n_layers", "n_ffn", "n_const"]), size=HUGE)
def test_a_model_that_no_machine_holds_is_not_tried(name: str, size: int) -> None:
    def build() -> None:
        moe = {name: size} if name in EXPERTS else {}
        Transformer(TransformerConfig(**SMALL | ({} if moe else {name: size})), MoEConfig(**moe))

    assert refused(build)
