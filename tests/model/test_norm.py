import pytest
import torch
from torch import nn

from moepp.model.norm import RMSNorm


@pytest.mark.parametrize("transposed", [False, True])  # as queries and keys are, which each head norms
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 5, 6)])
def test_equals_torchs_in_value_and_gradients(shape: tuple[int, ...], transposed: bool) -> None:
    torch.manual_seed(0)
    ours, torchs = (norm(6, eps=0.1, dtype=torch.float64) for norm in (RMSNorm, nn.RMSNorm))
    gain = torch.rand(6, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.transpose(0, -2) if transposed and len(shape) > 1 else x).requires_grad_()
    grad = torch.randn_like(x)
    results = []
    for norm in (ours, torchs):
        norm.load_state_dict({"weight": gain})
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight), grad)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
    assert torch.autograd.gradcheck(ours, x)


def test_of_bf16_with_a_gain_in_float32_it_is_torchs() -> None:
    x = torch.randn(3, 6).bfloat16()
    assert torch.equal(RMSNorm(6)(x), nn.RMSNorm(6)(x))


def test_all_in_bf16_the_result_alone_is_rounded() -> None:
    """As under bf16-true. Rounded statistics would change half of the elements."""
    torch.manual_seed(0)
    x = torch.randn(64, 256).bfloat16()
    exact = nn.RMSNorm(256, eps=1e-6).double()(x.double())
    assert (RMSNorm(256, eps=1e-6).bfloat16()(x) != exact.bfloat16()).float().mean() < 0.01
