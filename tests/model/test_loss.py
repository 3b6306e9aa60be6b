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
