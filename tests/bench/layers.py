"""The MoE++ layer against its matrix products, against vanilla MoE, and by size.

T tokens, D hidden size, H intermediate size, N rows of an expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from moepp.model import MoEConfig, MoELayer
from moepp.model.init import init_parameters
from tests.bench import peers
from tests.bench.setting import VANILLA, Row, Setting, measured

PAPER = {0.1: 2.65, 0.25: 1.93, 0.5: 1.38, 0.75: 1.25, 1.0: 1.19}  # expert-forward speed-up by τ, 0.6B (table 3)


class Timed:
    """A computation whose outputs are given random gradients.

    Args:
        call: computes the outputs.
        leaves: what gradients are computed of.
    """

    def __init__(self, call: Callable[[], list[Tensor]], leaves: Sequence[Tensor]) -> None:
        self.call, self.leaves = call, leaves
        self.gradients = [torch.randn_like(y) for y in call()]

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    def forward_and_backward(self) -> None:
        torch.autograd.grad(self.call(), self.leaves, self.gradients, allow_unused=True)


PASSES = {"forward": Timed.forward, "forward + backward": Timed.forward_and_backward}


class RoutedLayer(Timed):
    """A MoE++ layer, not the first of its stack, with routing forced to `ffn_share` of all assignments (by default
    what τ implies at balance).

    Raises:
        NotEqual: it computes something else than the loop of the released code.
    """

    def __init__(
        self, at: Setting, moe: MoEConfig, ffn_share: float | None = None, n_tokens: int | None = None
    ) -> None:
        t, T = at.sizes.transformer, n_tokens or at.sizes.n_tokens
        layer = MoELayer(t.hidden_size, t.intermediate_size, moe)
        init_parameters(layer, seed=0, std=t.init_std)
        peers.force(layer.router, peers.spread_evenly(T, moe, moe.ffn_share if ffn_share is None else ffn_share))
        self.layer = layer.to(at.device, at.dtype)
        self.x_TD = torch.randn(T, t.hidden_size, device=at.device, dtype=at.dtype).requires_grad_()
        self.previous_TE = torch.randn(T, moe.n_experts, device=at.device).requires_grad_()
        at.compiled(self.layer)
        super().__init__(
            lambda: [self.layer(self.x_TD, self.previous_TE)[0]],
            [self.x_TD, self.previous_TE, *self.layer.parameters()],
        )
        self.at = at
        self.check_against_loop()

    def limits(self) -> dict[str, Timed]:
        """The same FFN rows, already gathered, through dense experts of the same weights, and through one of them;
        compiled where the layer is.

        Raises:
            NotEqual: these, weighted and added up, are not what the layer computes.
        """
        layer = self.layer
        experts_TK = peers.forced(layer.router)
        where = [torch.nonzero(experts_TK == e, as_tuple=True) for e in range(layer.moe.n_ffn)]
        rows = [self.x_TD.detach()[token_N].requires_grad_() for token_N, _ in where]
        all_rows = torch.cat([x.detach() for x in rows]).requires_grad_()
        split = peers.DenseExperts(layer.ffn.w_gate_up, layer.ffn.w_down)
        whole = peers.DenseExperts(layer.ffn.w_gate_up[:1], layer.ffn.w_down[:1])
        self.at.compiled(split)
        self.at.compiled(whole)
        with torch.no_grad():
            y_TD, routing = layer(self.x_TD, self.previous_TE)
            outputs = split(rows)
            expected_TD = torch.zeros_like(y_TD)
            for (token_N, choice_N), out_ND in zip(where, outputs, strict=True):
                expected_TD.index_add_(
                    0, token_N, out_ND * routing.gates[token_N, choice_N, None].to(out_ND.dtype)
                )
            if layer.zero_computation is not None:
                expected_TD += layer.zero_computation(self.x_TD, routing).value(self.x_TD)
            peers.check("layer and dense experts", y_TD, expected_TD)
            peers.check("one dense expert", whole([all_rows])[0][: len(rows[0])], outputs[0])
        return {
            "per expert": Timed(lambda: split(rows), [*rows, *split.parameters()]),
            "one MLP": Timed(lambda: whole([all_rows]), [all_rows, *whole.parameters()]),
        }

    def check_against_loop(self) -> None:
        """Output and gradients of the input as in the loop of the released code.

        Raises:
            NotEqual: they are not.
        """
        loop = peers.ReleasedLoop(self.layer)
        results = []
        for layer in (self.layer, loop):
            y_TD, _ = layer(self.x_TD, self.previous_TE)
            inputs = (self.x_TD, self.previous_TE)
            results.append((y_TD, *torch.autograd.grad(y_TD, inputs, self.gradients[0], allow_unused=True)))
        for name, ours, theirs in zip(("output", "dx", "d(previous logits)"), *results, strict=True):
            if theirs is not None:
                peers.check(f"layer and released loop, {name}", ours, theirs)


def layer(at: Setting) -> Iterator[Row]:
    """How close the layer comes to its matrix products."""
    subjects = {"vanilla": VANILLA, "τ = 0.75": MoEConfig(tau=0.75), "τ = 0.1": MoEConfig(tau=0.1)}
    for name, moe in subjects.items():
        routed = RoutedLayer(at, moe)
        limits = routed.limits()
        for passes, run in PASSES.items():
            rounds = at.time([bind(run, subject) for subject in (routed, *limits.values())])
            ms = f"{1e3 * median(ours for ours, *_ in rounds):.3g} ms"
            for i, limit in enumerate(limits, start=1):
                ratios = [one[i] / one[0] for one in rounds]
                yield measured("layer", f"{name}, {passes}, {limit}", "of the limit", ratios, note=ms)


def tau(at: Setting) -> Iterator[Row]:
    """How much faster than vanilla MoE, and how much of what fewer FFN rows make possible."""
    routed = [RoutedLayer(at, VANILLA), *(RoutedLayer(at, MoEConfig(tau=tau)) for tau in PAPER)]
    for passes, run in PASSES.items():
        rounds = at.time([bind(run, subject) for subject in routed])
        for i, (tau, paper) in enumerate(PAPER.items(), start=1):
            ideal = 1 / MoEConfig(tau=tau).ffn_share
            ratios = [one[0] / one[i] for one in rounds]
            yield measured("tau", f"τ = {tau:g}, {passes}", "×", ratios, ideal=ideal, paper=paper / ideal)


def zero_computation(at: Setting) -> Iterator[Row]:
    """Zero, copy and constant experts alone, against the whole layer."""
    routed = RoutedLayer(at, MoEConfig(tau=0.75))
    experts = routed.layer.zero_computation
    assert experts is not None
    routing = routed.layer(routed.x_TD, routed.previous_TE)[1]
    routing = replace(routing, logits=routing.logits.detach(), gates=routing.gates.detach().requires_grad_())
    with torch.no_grad():
        ffn_TD = routed.layer.ffn(routed.x_TD, routing)
        parts_TD = ffn_TD + experts(routed.x_TD, routing).value(routed.x_TD)
        peers.check("layer and the sum of its parts", routed.call()[0], parts_TD)
    at.compiled(experts)
    alone = Timed(
        lambda: [experts(routed.x_TD, routing).value(routed.x_TD)],
        [routed.x_TD, routing.gates, *experts.parameters()],
    )
    for passes, run in PASSES.items():
        rounds = at.time([bind(run, subject) for subject in (routed, alone)])
        shares = [100 * theirs / whole for whole, theirs in rounds]
        yield measured("zero", f"τ = 0.75, {passes}", "% of the layer", shares)


def bind(run: Callable[[Timed], None], subject: Timed) -> Callable[[], None]:
    return lambda: run(subject)


def tokens(at: Setting) -> Iterator[Row]:
    """How forward and backward time grows with tokens."""
    numbers = [at.sizes.n_tokens * eighths // 8 for eighths in (1, 2, 4, 8, 16)]
    cases = {f"{n:,} tokens": RoutedLayer(at, MoEConfig(), n_tokens=n) for n in numbers}
    yield from growth(at, "tokens", cases, f"× the time per token of {numbers[0]:,}", numbers)


def experts(at: Setting) -> Iterator[Row]:
    """With FFN experts, at the same number of rows for all of them together; and what the limit has of that."""
    share, numbers = MoEConfig().ffn_share, (8, 4, 16, 32, 64, 128)
    cases = {f"{n} FFN experts, same rows": RoutedLayer(at, MoEConfig(n_ffn=n), share) for n in numbers}
    limits = {
        f"{name}, matrix products alone": routed.limits()["per expert"]
        for name, routed in cases.items()
        if routed.layer.moe.n_ffn in (8, 64)
    }
    yield from growth(at, "experts", cases, "× the time of 8")
    yield from growth(at, "limit", limits, "× the time of 8")


def constants(at: Setting) -> Iterator[Row]:
    """With constant experts, at the same number of FFN rows."""
    share, numbers = MoEConfig().ffn_share, (2, 1, 4, 8, 16)
    cases = {f"{n} constant experts, same FFN rows": RoutedLayer(at, MoEConfig(n_const=n), share) for n in numbers}
    yield from growth(at, "constants", cases, "× the time of 2")


def growth(
    at: Setting, section: str, cases: Mapping[str, Timed], unit: str, amounts: Sequence[int] | None = None
) -> Iterator[Row]:
    """Time relative to the first case's; with `amounts`, time per amount."""
    rounds = at.time([subject.forward_and_backward for subject in cases.values()])
    per = amounts or [1] * len(cases)
    for i, name in enumerate(cases):
        if i == 0:
            yield measured(section, name, "ms", [1e3 * one[0] for one in rounds])
        else:
            yield measured(section, name, unit, [one[i] / one[0] * per[0] / per[i] for one in rounds])
