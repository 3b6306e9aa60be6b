"""The seam for the FFN experts' compute: every back-end against the loop."""

from dataclasses import replace

import pytest
import torch

from moepp.model import MoEConfig, MoELayer, Routing, Transformer, TransformerConfig, experts
from moepp.model.experts import Terms, use_grouped
from moepp.model.grouped import grouped_swiglu

COUNTS = ([3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [2, 3, 2, 1])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tail", [0, 4])
def test_grouped_mm_equals_a_product_per_expert(counts: list[int], tail: int) -> None:
    torch.manual_seed(0)
    n = sum(counts)
    x = torch.randn(n + tail, 16)
    w_gate_up, w_down = torch.randn(4, 48, 16, requires_grad=True), torch.randn(4, 16, 24, requires_grad=True)

    def one_by_one(rows: torch.Tensor) -> torch.Tensor:
        outputs = []
        for part, gate_up, down in zip(rows.split(counts), w_gate_up, w_down, strict=True):
            gate, up = (part @ gate_up.T).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ down.T)
        return torch.cat(outputs)

    results = []
    for rows in (x[:n].clone().requires_grad_(), x.clone().requires_grad_()):
        whole = len(rows) == n and not results
        y = one_by_one(rows) if whole else grouped_swiglu(rows, w_gate_up, w_down, torch.tensor(counts))[:n]
        results.append((y, *torch.autograd.grad(y.square().sum(), (rows, w_gate_up, w_down))))
    for expected, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped[: len(expected)], expected, rtol=2e-5, atol=2e-3)


# capacities: dropless; of a few rows; of none at all
@pytest.mark.parametrize("capacity_factor", [None, 0.7, 0.01])
@pytest.mark.parametrize("n_tokens", [1, 37])
def test_back_ends_agree_in_float32(
    n_tokens: int, capacity_factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = MoELayer(16, 24, MoEConfig(n_ffn=4, capacity_factor=capacity_factor))
    x = torch.randn(n_tokens, 16, requires_grad=True)
    routing = layer(x)[1]
    gates = routing.gates.detach().requires_grad_()
    shapes = (n_tokens,), (n_tokens, 2), (2, 16)
    terms = Terms(*(torch.randn(*shape, requires_grad=True) for shape in shapes))
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(experts, "use_grouped", lambda x, w, grouped=grouped: grouped)
        y = layer.ffn(x, replace(routing, gates=gates), terms)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, gates, *layer.ffn.parameters(), *terms))))
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-4, atol=1e-7)


def test_capacity_bounds_the_rows_of_the_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """At γ = 1.1, τ = 0.1 a tenth more than a sixth of all assignments, not all of them."""
    rows: list[int] = []
    monkeypatch.setattr(experts, "use_grouped", lambda x, w: True)
    monkeypatch.setattr("moepp.model.grouped.grouped_swiglu", lambda x, *_: rows.append(len(x)) or x)
    torch.manual_seed(0)
    for capacity_factor in (None, 1.1):
        layer = MoELayer(16, 24, MoEConfig(tau=0.1, capacity_factor=capacity_factor))
        layer(torch.randn(300, 16))
        layer.eval()(torch.randn(300, 16))
    # 8 experts of floor(1.1 · 0.1 · 600 / 4.8) = 13 rows; a model that is not in training drops nothing
    assert rows == [600, 600, 8 * 13, 600]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_second_derivative_is_refused(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward passes work in place and are not differentiable: wrong numbers otherwise, without a word."""
    monkeypatch.setattr(experts, "use_grouped", lambda x, w: grouped)
    torch.manual_seed(0)
    layer, x = MoELayer(16, 24, MoEConfig(n_ffn=4)), torch.randn(9, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("capacity_factor", [None, 1.1])
def test_the_gpu_path_compiles_into_one_graph(
    capacity_factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's row counts are read on the host, so that path breaks the graph there, on purpose."""
    monkeypatch.setattr(experts, "use_grouped", lambda x, w: True)
    torch.manual_seed(0)
    moe = MoEConfig(n_ffn=4, capacity_factor=capacity_factor)
    model = Transformer(TransformerConfig(64, 2, 16, 24, 2, context_length=16), moe)
    block = model.blocks[1]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, previous = torch.randn(2, 16, 16, requires_grad=True), torch.randn(32, 8)
    results = []
    for run in (block, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y, routing = run(x, model.rope_2Sd, previous)
        loss = y.float().sum() + routing.load_balance_loss()
        results.append((y, routing.logits, *torch.autograd.grad(loss, (x, *block.parameters()))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=2e-2, atol=1e-2)


@pytest.mark.heavy
def test_several_models_with_a_capacity_are_compiled_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a study does; from the second τ on, a compiler takes it for a variable."""
    monkeypatch.setattr(experts, "use_grouped", lambda x, w: True)
    torch.manual_seed(0)
    for tau in (0.75, 0.1, 0.5):
        layer = MoELayer(16, 24, MoEConfig(n_ffn=4, tau=tau, capacity_factor=1.1))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for n_tokens in (32, 40):
            x = torch.randn(n_tokens, 16, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                expected, actual = (run(x)[0] for run in (layer, compiled))
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-2)
            actual.sum().backward()


def test_the_loop_is_chosen_on_a_cpu() -> None:
    assert not use_grouped(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 8))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bf16", [True, False])  # by grouped products, in the loop
@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(n_zero=0, n_copy=0, n_const=0, gating_residual=False)])
def test_cuda_equals_cpu(moe: MoEConfig, bf16: bool) -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(64, 128, moe), torch.randn(300, 64)
    y, routing = layer(x)
    (y.square().sum() + routing.load_balance_loss()).backward()
    cpu = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        y_cuda, routing = layer(x.cuda())
        (y_cuda.float().square().sum() + routing.load_balance_loss()).backward()
    assert (y_cuda.cpu().float() - y).norm() / y.norm() < 2e-2
    for name, parameter in layer.named_parameters():
        if name in cpu:
            assert (parameter.grad.cpu() - cpu[name]).norm() <= 3e-2 * cpu[name].norm() + 1e-6, name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("capacity_factor", [None, 1.1])
def test_cuda_step_never_waits_for_the_device(capacity_factor: float | None) -> None:
    layer = MoELayer(64, 128, MoEConfig(capacity_factor=capacity_factor)).cuda()
    x = torch.randn(300, 64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            y, routing = layer(x)
            (y.float().square().sum() + routing.load_balance_loss()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_bf16_rows_are_rounded_up_and_spare_ones_count_for_nothing() -> None:
    """On a CPU. An expert without tokens, one with a single one, and counts that are no multiples of 16."""
    torch.manual_seed(0)
    moe, T, D, H = MoEConfig(n_ffn=4, n_zero=1, n_copy=0, n_const=0), 70, 32, 24
    experts_TK = torch.stack((torch.arange(T) % 2 * 2, torch.full((T,), 4)), dim=1)  # experts 0 and 2, half each
    experts_TK[7, 0] = 3
    gates_TK = torch.rand(T, 2, requires_grad=True)
    routing = Routing(torch.zeros(T, 5), experts_TK, gates_TK, torch.zeros(T, 5), None, moe)
    exact = [torch.randn(T, D), torch.randn(4, 2 * H, D) / 8, torch.randn(4, D, H) / 8, torch.randn(T, D)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x_TD, w_gate_up, w_down, grad_TD = (value.bfloat16().to(dtype) for value in exact)
        inputs = [value.requires_grad_() for value in (x_TD, w_gate_up, w_down)]
        y_TD = experts.looped_experts(inputs[0], routing, *inputs[1:])
        results.append([y_TD, *torch.autograd.grad(y_TD, [*inputs, gates_TK], grad_TD)])
    for ours, expected in zip(*results, strict=True):
        assert (ours.double() - expected).norm() < 0.02 * expected.norm()
    for ours, expected in zip(results[0][2], results[1][2], strict=True):  # w_gate_up, expert by expert
        assert (ours.double() - expected).norm() <= 0.02 * expected.norm()
