"""The fast layer against the oracle: output and every gradient, over random configurations and the edges."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp.model import MoEConfig, MoELayer, experts
from moepp.model.conversion import set_bias
from tests.model.oracle import oracle_layer

D, H = 6, 5


def make(moe: MoEConfig, T: int, seed: int = 0) -> tuple[MoELayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    layer = MoELayer(D, H, moe).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    if moe.score_bias:
        set_bias(layer, -0.7)
    if layer.router.choice_bias is not None:
        layer.router.choice_bias.fill_(0.4)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return layer, x, torch.randn(T, moe.n_experts, dtype=torch.float64, requires_grad=True)


def agree(layer: MoELayer, x: torch.Tensor, previous: torch.Tensor | None, training: bool = True) -> None:
    layer.train(training)
    tensors = {"x": x, **dict(layer.named_parameters())}
    if previous is not None:
        tensors["previous"] = previous
    seed_y, seed_logits = torch.randn(2, 1, dtype=torch.float64)
    results = []
    for run in ("fast", "oracle"):
        if run == "fast":
            y, routing = layer(x, previous)
            logits, balance = routing.logits, routing.load_balance_loss()
        else:
            y, logits, balance = oracle_layer(layer, x, previous, training)
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
        loss = (y * weights).sum() + (logits * seed_logits).sum() * seed_y + 3 * balance
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
        results.append({"y": y, "logits": logits, "L_b": balance, **dict(zip(tensors, grads, strict=True))})
    fast, oracle = results
    for name, value in oracle.items():
        assert torch.isfinite(fast[name]).all(), name
        torch.testing.assert_close(fast[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def cases(draw: st.DrawFn) -> tuple[MoEConfig, int, int]:
    n_ffn, n_zero, n_copy, n_const = (draw(st.integers(low, 3)) for low in (1, 0, 0, 0))
    n_experts = n_ffn + n_zero + n_copy + n_const
    top_k = draw(st.integers(1, min(3, n_experts)))
    spendable = min(top_k, n_ffn) > max(0, top_k - n_experts + n_ffn)
    moe = MoEConfig(
        n_ffn=n_ffn,
        n_zero=n_zero,
        n_copy=n_copy,
        n_const=n_const,
        top_k=top_k,
        tau=draw(st.sampled_from([0.1, 0.75, 1.0])),
        capacity_factor=draw(st.sampled_from([None, 0.4, 1.1])),
        gating_residual=draw(st.booleans()),
        router_depth=draw(st.sampled_from([1, 2])),
        renormalize=draw(st.booleans()),
        balance_groups=draw(st.booleans()),
        score_bias=draw(st.booleans()),
        ffn_budget=min(top_k, n_ffn) - 0.5 if spendable and draw(st.booleans()) else None,
    )
    return moe, draw(st.integers(1, 9)), draw(st.integers(0, 2**16))


class GarbageGroupedMM(torch.autograd.Function):
    """`grouped_mm` in any dtype, with NaN in every row that it does not compute, forward and backward."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.ends = offs.tolist()
        ctx.groups = list(zip([0, *ctx.ends], ctx.ends, strict=False))
        out = a.new_full((len(a), b.shape[2]), float("nan"))
        for e, (start, end) in enumerate(ctx.groups):
            out[start:end] = a[start:end] @ b[e]
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = torch.full_like(a, float("nan")), torch.zeros_like(b)
        for e, (start, end) in enumerate(ctx.groups):
            grad_a[start:end] = grad[start:end] @ b[e].T
            grad_b[e] = a[start:end].T @ grad[start:end]
        return grad_a, grad_b, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def use_garbage_grouped_mm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experts, "use_grouped", lambda x, w: True)
    patch.setattr(torch.nn.functional, "grouped_mm", lambda a, b, offs: GarbageGroupedMM.apply(a, b, offs))


@pytest.fixture(params=["looped", "grouped"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "grouped":
        use_garbage_grouped_mm(monkeypatch)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases())
def test_agrees_with_oracle(case: tuple[MoEConfig, int, int]) -> None:
    moe, T, seed = case
    layer, x, previous = make(moe, T, seed)
    agree(layer, x, previous if moe.gating_residual else None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_grouped_agrees_with_oracle_and_never_reads_garbage(case: tuple[MoEConfig, int, int]) -> None:
    moe, T, seed = case
    layer, x, previous = make(moe, T, seed)
    with pytest.MonkeyPatch.context() as patch:
        use_garbage_grouped_mm(patch)
        agree(layer, x, previous if moe.gating_residual else None)


def steer(layer: MoELayer, *favourites: int) -> None:
    """Make every token choose `favourites`, in that order."""
    with torch.no_grad():
        layer.router.weights[-1].zero_()
        if layer.router.residual is not None:
            layer.router.residual.zero_()
            for rank, i in enumerate(favourites):
                layer.router.residual[i, i] = 10.0 - rank


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_every_token_on_the_same_experts(backend: None, top_k: int) -> None:
    moe = MoEConfig(n_ffn=4, n_zero=1, n_copy=1, n_const=1, top_k=top_k)
    layer, x, _ = make(moe, 6)
    steer(layer, *range(top_k))
    previous = torch.ones(6, 7, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, previous)
    assert routing.tokens_per_expert().tolist() == [6] * top_k + [0] * (7 - top_k)
    agree(layer, x, previous)
    y.sum().backward()
    assert layer.ffn.w_down.grad is not None  # an expert without tokens: zero, not None
    assert layer.ffn.w_down.grad[3].eq(0).all()


def test_only_zero_experts_gives_exactly_zero_with_finite_gradients(backend: None) -> None:
    moe = MoEConfig(n_ffn=2, n_zero=2, n_copy=1, n_const=1, top_k=2)
    layer, x, _ = make(moe, 5)
    steer(layer, 4, 5)
    y, routing = layer(x, torch.ones(5, 6, dtype=torch.float64))
    assert routing.experts.sort(-1).values.tolist() == [[4, 5]] * 5
    assert y.eq(0).all()
    assert routing.gates.eq(0).all()
    (y.sum() + routing.load_balance_loss()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_zero_expert_leaves_the_other_alone(backend: None) -> None:
    """Top-2 of (FFN 0, zero): the layer is FFN 0 with a gate of exactly 1."""
    moe = MoEConfig(n_ffn=2, n_zero=1, n_copy=0, n_const=0, top_k=2)
    layer, x, _ = make(moe, 5)
    steer(layer, 2, 0)
    y, routing = layer(x, torch.ones(5, 3, dtype=torch.float64))
    gate, up = (layer.ffn.w_gate_up[0] @ x.T).chunk(2)
    torch.testing.assert_close(y, (layer.ffn.w_down[0] @ (torch.nn.functional.silu(gate) * up)).T)
    assert routing.gates.tolist() == [[0.0, 1.0]] * 5


def test_single_token_and_leading_dimensions(backend: None) -> None:
    moe = MoEConfig()
    layer, x, _ = make(moe, 6)
    y, routing = layer(x)
    assert routing.logits.shape == (6, 12)
    torch.testing.assert_close(layer(x[2])[0], y[2])
    torch.testing.assert_close(layer(x.view(2, 3, D))[0], y.view(2, 3, D))


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 3, D), (2, 0, 3, D)])
@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 1.1}, {"n_zero": 0, "n_copy": 0, "n_const": 0}], ids=str
)
def test_of_no_token_nothing_is_made(backend: None, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer, _, _ = make(MoEConfig(**options), 6)
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == shape
    assert routing.experts.shape == (0, 2)
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


def test_gradcheck(backend: None) -> None:
    layer, x, previous = make(
        MoEConfig(n_ffn=3, n_zero=1, n_copy=1, n_const=2, top_k=2, router_depth=2), 5, seed=3
    )
    names = [name for name, _ in layer.named_parameters()]

    def run(x, previous, *parameters):
        y, routing = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, previous))
        return y, routing.logits, routing.gates, routing.load_balance_loss()

    assert torch.autograd.gradcheck(run, (x, previous, *layer.parameters()))


def test_capacity_drops_contribute_nothing_and_evaluation_is_dropless() -> None:
    moe = MoEConfig(n_ffn=2, n_zero=0, n_copy=1, n_const=1, top_k=1, capacity_factor=1.0, tau=0.5)
    layer, x, _ = make(moe, 6)
    steer(layer, 0)
    previous = torch.ones(6, 4, dtype=torch.float64)
    y, routing = layer(x, previous)
    assert moe.capacities(6) == (1.0, 2.0)
    assert routing.kept.flatten().tolist() == [True] + [False] * 5  # earlier positions first
    assert y[1:].eq(0).all()
    assert not y[0].eq(0).all()
    assert routing.tokens_per_expert().tolist() == [6, 0, 0, 0]  # f_i counts before capacity
    y, routing = layer.eval()(x, previous)
    assert routing.kept is None
    assert not y.eq(0).all(-1).any()


def test_equal_logits_have_no_spread_to_divide_by() -> None:
    """`logits_norm_std` divides by their standard deviation, which a router of zeros makes 0."""
    layer = MoELayer(8, 16, MoEConfig(logits_norm_std=1.0))
    torch.nn.init.zeros_(layer.router.weights[0])
    x = torch.randn(4, 8)
    y, routing = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    torch.testing.assert_close(routing.probs, torch.full((4, 12), 1 / 12))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_vanilla_is_mixtral() -> None:
    """With the switches off: softmax, top-2, renormalised, sum of FFN experts."""
    moe = MoEConfig(n_ffn=4, n_zero=0, n_copy=0, n_const=0, gating_residual=False)
    layer, x, _ = make(moe, 7)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"router", "ffn"}
    y, _ = layer(x)
    probs = (x @ layer.router.weights[0].T).softmax(-1)
    top, index = probs.topk(2)
    every = torch.stack([swiglu(x @ layer.ffn.w_gate_up[i].T) @ layer.ffn.w_down[i].T for i in range(4)], dim=1)
    expected = (
        every.gather(1, index[..., None].expand(-1, -1, D)) * (top / top.sum(-1, keepdim=True))[..., None]
    ).sum(1)
    torch.testing.assert_close(y, expected)


def test_bfloat16_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(64, 96, MoEConfig()), torch.randn(50, 64)
    y, routing = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y16, routing16 = layer(x)
    assert y16.dtype == torch.bfloat16
    assert routing16.logits.dtype == routing16.gates.dtype == torch.float32
    assert torch.equal(routing.experts, routing16.experts)  # the router stays in float32
    assert (y16 - y).norm() / y.norm() < 1e-2


def test_gates_of_the_released_variants_by_hand() -> None:
    """`moe_use_mixtral_gating` leaves the zero expert's gate in the sum; `moe_use_logits_norm` first divides the
    logits by their unbiased standard deviation over `moe_gate_norm_std`."""
    logits = torch.tensor([[2.0, -1.0, 0.0, 1.0]])  # FFN, constant, copy and zero expert; s.d. 1.29099
    kinds = {"n_ffn": 1, "n_const": 1, "n_copy": 1, "n_zero": 1}

    def gates(**options: Any) -> tuple[list[int], list[float]]:
        router = MoELayer(4, 8, MoEConfig(**kinds, **options)).router
        with torch.no_grad():
            router.weights[0].copy_(torch.diag(logits[0]))
            routing = router(torch.ones(1, 1, 4))
        return routing.experts[0].tolist(), routing.gates[0].tolist()

    first = 1 / (1 + math.exp(-1.0))  # softmax of 2 and 1
    assert gates() == ([0, 3], [1.0, 0.0])
    assert gates(renormalize_without_zero=False) == ([0, 3], pytest.approx([first, 1 - first]))
    normed = 1 / (1 + math.exp(-0.5 / 1.2909944))
    options = {"renormalize_without_zero": False, "logits_norm_std": 0.5}
    assert gates(**options) == ([0, 3], pytest.approx([normed, 1 - normed]))
