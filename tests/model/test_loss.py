import pytest
import torch
import torch.nn.functional as F

from moepp.model import loss


@pytest.mark.parametrize("n_tokens", [1, 6, 7, 20])
def test_equals_cross_entropy_of_the_logits(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (n_tokens,))
    expected = F.cross_entropy(hidden @ weight.T, targets)
    actual = loss.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected)
    for mine, autograd in zip(
        torch.autograd.grad(3 * actual, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, autograd)
    assert torch.autograd.gradcheck(lambda h, w: loss.linear_cross_entropy(h, w, targets), (hidden, weight))


def test_bfloat16_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(64, (50,))
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.linear_cross_entropy(hidden, weight, targets)
        assert value.dtype == torch.float32
        grads.append((value, *torch.autograd.grad(value, (hidden, weight))))
    for exact, half in zip(*grads, strict=True):
        assert (half - exact).norm() < 2e-2 * exact.norm()


def test_bf16_gradients_are_divided_by_the_number_of_tokens_unrounded() -> None:
    """1/192 rounded to bf16 is 0.2 % too large; rounding each product instead errs to both sides."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(192, 64).bfloat16(), (torch.randn(128, 64) / 8).bfloat16()
    targets = torch.randint(128, (192,))
    norms = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        loss.linear_cross_entropy(leaf, weight.to(dtype), targets).backward()
        norms.append(leaf.grad.float().norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=5e-4, atol=0)
