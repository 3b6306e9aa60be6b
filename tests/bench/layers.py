"""The MoE++ layer against its matrix products, against vanilla MoE, and by size.

T tokens, D hidden size, H intermediate size, N rows of an expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import yaml
from torch import Tensor

from moepp.model import MoEConfig, MoELayer
from moepp.model.init import init_parameters
from tests.bench import peers
from tests.bench.setting import BOTH, FORWARD, RECIPES, VANILLA, Case, Row, Setting, measured


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


PASSES = {FORWARD: Timed.forward, BOTH: Timed.forward_and_backward}
SAME_ROWS = "{} FFN experts, same rows"
PER_EXPERT, ONE_MLP = "per expert", "one MLP"  # limits


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
        at.compile(self.layer)
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
        self.at.compile(split)
        self.at.compile(whole)
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
            PER_EXPERT: Timed(lambda: split(rows), [*rows, *split.parameters()]),
            ONE_MLP: Timed(lambda: whole([all_rows]), [all_rows, *whole.parameters()]),
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
                # what reaches float32 logits has been through products in the layer's dtype
                peers.check(f"layer and released loop, {name}", ours.to(self.at.dtype), theirs)


def layer(at: Setting) -> Iterator[Row]:
    """How close the layer comes to its matrix products."""
    subjects = {"vanilla": VANILLA, "τ = 0.75": MoEConfig(tau=0.75), "τ = 0.1": MoEConfig(tau=0.1)}
    for name, moe in subjects.items():
        routed = RoutedLayer(at, moe)
        limits = routed.limits()
        for passes, run in PASSES.items():
            rounds = at.time([partial(run, subject) for subject in (routed, *limits.values())])
            ms = f"{1e3 * median(ours for ours, *_ in rounds):.3g} ms"
            for i, limit in enumerate(limits, start=1):
                ratios = [one[i] / one[0] for one in rounds]
                yield measured(Case("layer", name, passes, limit), "of the limit", ratios, note=ms)


def tau(at: Setting) -> Iterator[Row]:
    """How much faster than vanilla MoE, and how much of what fewer FFN rows make possible."""
    speedups = paper_speedups()
    routed = [RoutedLayer(at, VANILLA), *(RoutedLayer(at, MoEConfig(tau=tau)) for tau in speedups)]
    for passes, run in PASSES.items():
        rounds = at.time([partial(run, subject) for subject in routed])
        for i, (tau, paper) in enumerate(speedups.items(), start=1):
            case, ratios = Case("tau", f"τ = {tau:g}", passes), [one[0] / one[i] for one in rounds]
            ideal = 1 / MoEConfig(tau=tau).ffn_share
            yield measured(case, "×", ratios, ideal=ideal, paper=paper / ideal, x=tau)


def paper_speedups() -> dict[float, float]:
    """Of the expert forward pass of the paper's 0.6B, by τ, from the recipe of the ablations."""
    variants = yaml.safe_load((RECIPES / "ablate.yaml").read_text())["variants"].values()
    taus = {one["model"]["moe"]["tau"]: one["paper"] for one in variants if "tau" in one["model"]["moe"]}
    return {tau: paper["speedup"]["0.6B"] for tau, paper in sorted(taus.items())}


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
    at.compile(experts)
    alone = Timed(
        lambda: [experts(routed.x_TD, routing).value(routed.x_TD)],
        [routed.x_TD, routing.gates, *experts.parameters()],
    )
    for passes, run in PASSES.items():
        rounds = at.time([partial(run, subject) for subject in (routed, alone)])
        shares = [100 * theirs / whole for whole, theirs in rounds]
        yield measured(Case("zero", "τ = 0.75", passes), "% of the layer", shares)


def tokens(at: Setting) -> Iterator[Row]:
    """How forward and backward time grows with tokens."""
    numbers = [at.sizes.n_tokens * eighths // 8 for eighths in (1, 2, 4, 8, 16)]
    layers = {n: RoutedLayer(at, MoEConfig(), n_tokens=n) for n in numbers}
    unit = f"× the time per token of {numbers[0]:,}"
    yield from growth(at, "tokens", "{:,} tokens", layers, unit, per_amount=True)


def experts(at: Setting) -> Iterator[Row]:
    """With FFN experts, at the same number of rows for all of them together; and what the limit has of that."""
    share, numbers = MoEConfig().ffn_share, (8, 4, 16, 32, 64, 128)
    layers = {n: RoutedLayer(at, MoEConfig(n_ffn=n), share) for n in numbers}
    limits = {n: layers[n].limits()[PER_EXPERT] for n in (8, 64)}
    yield from growth(at, "experts", SAME_ROWS, layers, "× the time of 8")
    yield from growth(at, "limit", f"{SAME_ROWS}, matrix products alone", limits, "× the time of 8")


def constants(at: Setting) -> Iterator[Row]:
    """With constant experts, at the same number of FFN rows."""
    share, numbers = MoEConfig().ffn_share, (2, 1, 4, 8, 16)
    layers = {n: RoutedLayer(at, MoEConfig(n_const=n), share) for n in numbers}
    yield from growth(at, "constants", "{} constant experts, same FFN rows", layers, "× the time of 2")


def growth(
    at: Setting, section: str, name: str, subjects: Mapping[int, Timed], unit: str, per_amount: bool = False
) -> Iterator[Row]:
    """Time relative to the first subject's, by the number that it is of; `per_amount`, for one of that number."""
    rounds = at.time([subject.forward_and_backward for subject in subjects.values()])
    first = next(iter(subjects))
    for i, n in enumerate(subjects):
        case, amounts = Case(section, name.format(n)), first / n if per_amount else 1
        if i == 0:
            yield measured(case, "ms", [1e3 * one[0] for one in rounds])
        else:
            yield measured(case, unit, [one[i] / one[0] * amounts for one in rounds], x=n)
