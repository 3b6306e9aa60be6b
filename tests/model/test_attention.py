"""Attention by plain products against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from moepp.model import attention
from moepp.model.attention import attend, attend_by_products


def heads(n_heads: int, n_kv_heads: int, n_positions: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, n, n_positions, 16, dtype=dtype, requires_grad=True)
        for n in (n_heads, n_kv_heads, n_kv_heads)
    ]


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(3, 3), (4, 2)])
def test_products_are_torchs_attention(n_heads: int, n_kv_heads: int) -> None:
    results = []
    for compute in (attend_by_products, lambda *inputs: attend(*inputs, causal=True)):
        inputs = heads(n_heads, n_kv_heads, 37, torch.float64)
        y = compute(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_in_bf16_products_are_as_exact_as_bf16_is() -> None:
    """Their scores are rounded, where torch's kernel keeps float32: 0.4 % instead of 0.2 % of the norm."""
    q, k, v = heads(4, 4, 256, torch.bfloat16)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    error = (attend(q, k, v, causal=True).double() - exact).norm() / exact.norm()
    assert 0 < error < 0.006


def test_who_computes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products for causal bf16 on a CPU, as long as their S² scores stay small; torch's kernel for all else."""
    monkeypatch.setattr(attention, "attend_by_products", lambda *inputs: "products")
    for dtype, n_positions, causal, by_products in (
        (torch.bfloat16, attention.LONGEST, True, True),
        (torch.bfloat16, attention.LONGEST + 1, True, False),
        (torch.bfloat16, 8, False, False),
        (torch.float32, 8, True, False),
    ):
        assert (attend(*heads(1, 1, n_positions, dtype), causal) == "products") is by_products
