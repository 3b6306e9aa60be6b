import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from moepp.model import InputError, loss


def agree(actual: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    """In value, and in the gradients of three times as much."""
    torch.testing.assert_close(actual, expected)
    for mine, autograd in zip(
        torch.autograd.grad(3 * actual, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, autograd)


@pytest.mark.parametrize("n_tokens", [1, 6, 7, 20])
def test_equals_cross_entropy_of_the_logits(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_of", lambda _: 7)
    monkeypatch.setattr(loss, "BLOCK", 22)  # the softmax of two rows at a time
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (n_tokens,))
    expected = F.cross_entropy(hidden @ weight.T, targets)
    actual = loss.linear_cross_entropy(hidden, weight, targets)
    agree(actual, expected, hidden, weight)
    with pytest.raises(InputError, match=f"targets: must be as many as {n_tokens} tokens, got {n_tokens - 1}"):
        loss.linear_cross_entropy(hidden, weight, targets[1:])
    assert torch.autograd.gradcheck(lambda h, w: loss.linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distillation_equals_the_divergence_of_the_logits(
    temperature: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_of", lambda _: 7)
    monkeypatch.setattr(loss, "BLOCK", 22)
    hidden = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (20,))
    teacher, head = torch.randn(20, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    logits = hidden @ weight.T
    divergence = temperature**2 * F.kl_div(
        (logits / temperature).log_softmax(-1), (teacher @ head.T / temperature).softmax(-1), reduction="batchmean"
    )
    cross_entropy = F.cross_entropy(logits, targets)
    actual, *parts = loss.linear_distillation(hidden, weight, targets, teacher, head, share, temperature)
    agree(actual, (1 - share) * cross_entropy + share * divergence, hidden, weight)
    torch.testing.assert_close(torch.stack(parts), torch.stack([cross_entropy, divergence]).detach())
    with pytest.raises(InputError, match="targets: must be as many as 20 tokens, got 19"):
        loss.linear_distillation(hidden, weight, targets[1:], teacher, head, share, temperature)
    itself = hidden.detach(), weight.detach()
    _, _, same = loss.linear_distillation(hidden, weight, targets, *itself, share, temperature)
    assert same.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("below", [1.0, 100.0, 200.0])  # a target's probability in float32 has few digits, is 0
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_by_blocks_and_as_one_graph(dtype: torch.dtype, below: float) -> None:
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(9, 31).to(dtype), torch.randint(31, (9, 1))
    logits[3, targets[3]] = logits[3].max() - below
    compiled = torch.compile(loss.fusible_nll_and_gradient, fullgraph=True, backend="aot_eager")
    leaf = logits.to(torch.float32, copy=True).requires_grad_()
    expected = F.cross_entropy(leaf, targets[:, 0], reduction="sum")
    expected.backward()
    for run in (loss.nll_and_gradient, compiled):
        nll, gradient = run(logits.clone(), targets)
        assert gradient.dtype == dtype
        torch.testing.assert_close(nll, expected.detach())
        torch.testing.assert_close(gradient, leaf.grad.to(dtype))


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiled_softmax_holds_no_logits_in_float32() -> None:
    """What it saves on a GPU, read in the code that the compiler writes for a CPU."""
    logits, targets = torch.randn(48, 96).bfloat16(), torch.randint(96, (48, 1))
    written = torch.compile(loss.fusible_nll_and_gradient, dynamic=False)
    _, (code,) = run_and_get_code(written, logits, targets)
    buffers = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
    assert "48, 1" in buffers  # each row's maximum, sum
    assert "48, 96" not in buffers


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_equals_cpu(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CUDA_CHUNK", 64)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(150, 32), torch.randn(300, 32) / 6, torch.randint(300, (150,))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss.linear_cross_entropy(*leaves, targets.to(device), compile=compile and device == "cuda")
        results.append((value, *torch.autograd.grad(value, leaves)))
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert (on_cuda.cpu() - on_cpu).norm() < 2e-2 * on_cpu.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_by_token_as_of_all_logits_at_once_and_never_holding_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(50, 8, dtype=dtype), torch.randn(30, 8, dtype=dtype)
    targets_N = torch.randint(30, (50,))
    targets_N[::7] = -100
    logits_NV = F.linear(hidden_ND, weight_VD).to(torch.promote_types(dtype, torch.float32))
    expected_N = F.cross_entropy(logits_NV, targets_N, ignore_index=-100, reduction="none")
    whole_linear, rows = F.linear, []
    monkeypatch.setattr(loss, "chunk_of", lambda _: 16)
    monkeypatch.setattr(loss.F, "linear", lambda x, w: rows.append(len(x)) or whole_linear(x, w))
    nll_N = loss.nll_by_token(hidden_ND, weight_VD, targets_N)
    assert rows == [16, 16, 16, 2]
    assert torch.allclose(nll_N, expected_N, rtol=1e-6)
    assert (nll_N[::7] == 0).all()
    assert nll_N.dtype == expected_N.dtype
