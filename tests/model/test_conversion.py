"""What conversion makes computes the same as what it was made of, and can leave it again."""

from typing import Any

import pytest
import torch

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig, mean_load_balance_loss
from moepp.model.conversion import SILENT, add_zero_computation, upcycle

SIZES = TransformerConfig(vocab_size=64, n_layers=3, hidden_size=32, intermediate_size=24, n_heads=4, init_std=0.2)
VANILLA: dict[str, Any] = {"n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}
TOKENS = torch.arange(60).view(2, 30)


def vanilla(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(SIZES, MoEConfig(**VANILLA | {"n_ffn": 6} | options)).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("added", [{"n_zero": 3}, {"n_zero": 1, "n_copy": 1, "n_const": 2}, {"n_copy": 2}])
@pytest.mark.parametrize("options", [{}, {"renormalize": False, "top_k": 3}, {"gating_residual": True}])
@torch.no_grad()
def test_a_converted_model_computes_the_same(
    added: dict, options: dict, dtype: torch.dtype, tolerance: float
) -> None:
    model, random_state = vanilla(**options), torch.get_rng_state()
    converted = add_zero_computation(model, **{"n_zero": 0} | added).to(dtype)
    assert torch.equal(torch.get_rng_state(), random_state)
    expected, found = model.to(dtype)(TOKENS), converted(TOKENS)
    largest = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=tolerance * largest)
    for before, after in zip(expected.routings, found.routings, strict=True):
        assert torch.equal(before.experts, after.experts)
        assert not after.probs[:, 6:].any()
        torch.testing.assert_close(after.logits[:, :6], before.logits)


def test_at_first_no_gradient_reaches_the_added_rows_and_with_the_bias_raised_it_does() -> None:
    converted = add_zero_computation(vanilla(), n_zero=3)
    weight = converted.blocks[1].moe.router.weights[0]
    for bias, reached in ((SILENT, False), (0.0, True)):
        for block in converted.blocks:
            block.moe.router.bias.fill_(bias)
        output = converted(TOKENS)
        (output.logits.square().mean() + mean_load_balance_loss(output.routings)).backward()
        assert weight.grad[:6].any()
        assert bool(weight.grad[6:].any()) == reached
        converted.zero_grad()


@torch.no_grad()
def test_added_rows_are_the_mean_of_the_old_plus_noise_in_their_spread() -> None:
    model = vanilla()
    rows = model.blocks[0].moe.router.weights[0]
    exact = add_zero_computation(model, n_zero=2, noise=0.0).blocks[0].moe.router.weights[0][6:]
    torch.testing.assert_close(exact, rows.mean(0).expand(2, -1))
    noisy = add_zero_computation(model, n_zero=400, noise=0.5).blocks[0].moe.router.weights[0][6:]
    torch.testing.assert_close(noisy.std(0), 0.5 * rows.std(0, correction=0), rtol=0.15, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [True, False])  # to a single expert it makes no difference
def test_an_upcycled_model_computes_the_same(renormalize: bool) -> None:
    dense = vanilla(n_ffn=1, top_k=1, renormalize=renormalize)
    sparse = upcycle(dense, n_ffn=4, top_k=2)
    torch.testing.assert_close(sparse(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert sparse.blocks[0].moe.ffn.w_down.shape[0] == 4
    assert sparse.blocks[0].moe.router.weights[0].std() > 0.1  # or all tokens would take the same experts for ever
    both = add_zero_computation(sparse, n_zero=2)
    expected = sparse(TOKENS).logits
    torch.testing.assert_close(both(TOKENS).logits, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: add_zero_computation(vanilla(n_zero=1), 1), "has 1 zero-computation experts already"),
        (lambda: add_zero_computation(vanilla(), 0), "n_zero: must be positive"),
        (lambda: add_zero_computation(vanilla(), -1), "n_zero: must be positive"),
        (lambda: add_zero_computation(vanilla(router_depth=2), 1), "moe.router_depth: must be 1"),
        (lambda: add_zero_computation(vanilla(logits_norm_std=1.0), 1), "moe.logits_norm_std: must be null"),
        (lambda: add_zero_computation(vanilla(), 1, noise=-1), "noise: must not be negative"),
        (lambda: add_zero_computation(vanilla(), 1, ffn_per_token=1.0), "ffn_per_token: must be above 1"),
        (lambda: upcycle(vanilla(), 4), "moe.n_ffn: must be 1"),
        (lambda: upcycle(vanilla(n_ffn=1, top_k=1), 1), "n_ffn: must be at least 2"),
        (lambda: upcycle(vanilla(n_ffn=1, top_k=1), 2, top_k=3), "moe.top_k: must not exceed"),
    ],
)
def test_what_cannot_be_converted(attempt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attempt()
