"""The seam for the FFN experts' compute: every back-end against the loop."""

import pytest
import torch

from moepp.model import MoEConfig, MoELayer
from moepp.model.experts import grouped_swiglu, looped_swiglu, use_grouped

COUNTS = ([3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [2, 3, 2, 1])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tail", [0, 4])
def test_grouped_mm_equals_the_loop(counts: list[int], tail: int) -> None:
    torch.manual_seed(0)
    n = sum(counts)
    x = torch.randn(n + tail, 16)
    w_gate_up, w_down = torch.randn(4, 48, 16, requires_grad=True), torch.randn(4, 16, 24, requires_grad=True)
    results = []
    for compute, rows in ((looped_swiglu, x[:n]), (grouped_swiglu, x)):
        rows = rows.clone().requires_grad_()
        y = compute(rows, w_gate_up, w_down, torch.tensor(counts))[:n]
        results.append((y, *torch.autograd.grad(y.square().sum(), (rows, w_gate_up, w_down))))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped[: len(loop)], loop, rtol=2e-5, atol=2e-3)


def test_the_loop_is_chosen_on_a_cpu() -> None:
    assert not use_grouped(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 8))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(n_zero=0, n_copy=0, n_const=0, gating_residual=False)])
def test_cuda_equals_cpu(moe: MoEConfig) -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(64, 128, moe), torch.randn(300, 64)
    y, routing = layer(x)
    (y.square().sum() + routing.load_balance_loss()).backward()
    cpu = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y_cuda, routing = layer(x.cuda())
        (y_cuda.float().square().sum() + routing.load_balance_loss()).backward()
    assert (y_cuda.cpu().float() - y).norm() / y.norm() < 2e-2
    for name, parameter in layer.named_parameters():
        if name in cpu:
            assert (parameter.grad.cpu() - cpu[name]).norm() <= 3e-2 * cpu[name].norm() + 1e-6, name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_step_never_waits_for_the_device() -> None:
    layer, x = MoELayer(64, 128, MoEConfig()).cuda(), torch.randn(300, 64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            y, routing = layer(x)
            (y.float().square().sum() + routing.load_balance_loss()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
