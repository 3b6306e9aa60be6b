"""Rotary positions against a product of complex numbers."""

import pytest
import torch

from moepp.model import TransformerConfig
from moepp.model.rope import rope_table, rotate, turned


def by_complex_numbers(x_BNSd: torch.Tensor, rope_theta: float) -> torch.Tensor:
    """Pair (i, i + d/2) is x_i + √-1·x_(i+d/2), times e to the √-1·position·θ^(-2i/d)."""
    S, d = x_BNSd.shape[-2:]
    angles = torch.arange(S)[:, None] * rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    turned = torch.complex(*x_BNSd.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("transposed", [False, True])  # as queries come from a product, and gradients of keys
def test_pairs_are_turned_and_gradients_turned_back(transposed: bool) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(8, 1, 24, 8, 4, context_length=7, rope_theta=100.0)  # d = 6
    table = rope_table(config)
    x = torch.randn(2, 7, 4, 6, dtype=torch.float64).transpose(1, 2)
    x = (x if transposed else x.contiguous()).requires_grad_()
    grad = torch.randn(2, 4, 6, 7, dtype=torch.float64).transpose(2, 3)
    grad = grad if transposed else grad.contiguous()
    ours, expected = rotate(x, table), by_complex_numbers(x, 100.0)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # the table is in float32
    backward = (torch.autograd.grad(y, x, grad)[0] for y in (ours, expected))
    torch.testing.assert_close(*backward, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), x)


def test_bf16_is_turned_in_float32() -> None:
    torch.manual_seed(0)
    table = rope_table(TransformerConfig(8, 1, 24, 8, 4, context_length=7))
    x, grad = (torch.randn(2, 4, 7, 6).bfloat16() for _ in range(2))
    x.requires_grad_()
    ours, on_a_gpu = rotate(x, table), turned(x, *table)
    assert torch.equal(ours, rotate(x.float(), table).bfloat16())
    assert torch.equal(ours, on_a_gpu)
    backward = (torch.autograd.grad(y, x, grad)[0] for y in (ours, on_a_gpu))
    torch.testing.assert_close(*backward, rtol=2e-2, atol=2e-2)  # autograd adds up in bf16
