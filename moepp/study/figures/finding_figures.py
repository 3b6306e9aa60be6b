"""Pictures of the paper's five findings, and of the pathway of tokens from layer to layer."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from moepp.study.figures.findings import Bootstrap, Estimate
from moepp.study.figures.picture import (
    FFN_COLOUR,
    KIND_NAMES,
    PER_TOKEN,
    Drawn,
    combinations,
    legend_of_kinds,
    picture,
    whiskers,
    whiskers_by_name,
)
from moepp.study.figures.routing_stats import Sums
from moepp.study.style import BLACK, GREY, KIND_COLOURS


@picture("finding 1", "Finding 1: FFN load of pairs of layers", "kinds", "layers")
def finding1_correlation(measured: Bootstrap) -> Drawn:
    estimate_LL, layers = measured.estimate(Sums.correlation), measured.counts.layers
    columns = estimate_LL.map(np.ravel).columns("correlation")
    table = combinations(layer=layers, other_layer=layers).assign(**columns)
    adjacent = np.diagonal(estimate_LL.value, 1)
    sentence = (
        "The number of FFN experts that a token takes in one layer correlates with that in the next by "
        f"{min(adjacent):.2f} to {max(adjacent):.2f}."
    )
    L = len(layers)
    figure, axes = plt.subplots(figsize=(2.6 + 0.34 * L, 1.6 + 0.34 * L))
    extent = (0.5, L + 0.5, L + 0.5, 0.5)
    image = axes.imshow(estimate_LL.value, cmap="PuOr", vmin=-1, vmax=1, extent=extent)
    if L <= 12:
        for (i, j), value in np.ndenumerate(estimate_LL.value):
            colour = "white" if abs(value) > 0.6 else BLACK
            axes.text(j + 1, i + 1, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set(xlabel="layer", ylabel="layer", xticks=layers, yticks=layers)
    axes.grid(visible=False)
    figure.colorbar(image, label="correlation of FFN counts")
    return table, sentence, figure


@picture("finding 2", "Finding 2: variation of FFN load across domains, layer by layer", "kinds", "domains")
def finding2_spread(measured: Bootstrap) -> Drawn:
    variance_L, layers = measured.above_chance(Sums.spread_by_layer), measured.counts.layers
    sd_L = variance_L.map(lambda variance_L: np.sqrt(np.maximum(variance_L, 0)))
    table = pd.DataFrame({"layer": layers, **sd_L.columns("sd_between_domains")})
    most, least = sd_L.value.argmax(), sd_L.value.argmin()
    sentence = (
        f"FFN experts per token differ most between domains in layer {layers[most]} (standard deviation "
        f"{sd_L.value[most]:.3f}), least in {layers[least]} ({sd_L.value[least]:.3f})."
    )
    return table, sentence, between_domains(sd_L, "s.d. between domains of\nFFN experts per token")


@picture("finding 3", "Finding 3: FFN experts per token, by domain", "kinds")
def finding3_ffn_by_domain(measured: Bootstrap) -> Drawn:
    domains, n_D = measured.counts.domains, measured.sums.n_D.astype(int)
    ffn_D = measured.estimate(lambda sums: sums.ffn_by_layer()[..., -1])
    table = pd.DataFrame({"domain": domains, "tokens": n_D, **ffn_D.columns("ffn_per_token")})
    each = ", ".join(f"{domains[d]} {ffn_D.value[d]:.3f}" for d in np.argsort(-ffn_D.value))
    figure, axes = plt.subplots(figsize=(5.4, 0.9 + 0.32 * len(domains)))
    whiskers_by_name(axes, domains, ffn_D, fmt="o", color=FFN_COLOUR)
    axes.set_xlabel(f"{PER_TOKEN}, mean over layers and 95 %")
    return table, f"FFN experts per token, mean over layers: {each}.", figure


@picture("finding 4", "Finding 4: how often one expert of a kind is chosen", "kinds")
def finding4_activations(measured: Bootstrap) -> Drawn:
    domains, kinds = measured.counts.domains, list(measured.counts.kinds)
    share_Dk = measured.estimate(Sums.activations)
    columns = share_Dk.map(np.ravel).columns("share_of_tokens_per_expert")
    table = combinations(domain=domains, kind=kinds).assign(**columns)
    means = zip(kinds, share_Dk.value.mean(0), strict=True)
    each = ", ".join(f"{KIND_NAMES[kind]} {mean:.3f}" for kind, mean in means)
    figure, axes = plt.subplots(figsize=(1.6 + 0.95 * len(domains), 3.2))
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        x = np.arange(len(domains)) + (k - (len(kinds) - 1) / 2) * width
        axes.bar(x, share_Dk.value[:, k], width, color=KIND_COLOURS[kind])
        whiskers(axes, x, share_Dk[:, k], fmt="none")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("share of tokens that choose\none expert of the kind")
    axes.grid(axis="x", visible=False)
    legend_of_kinds(figure, kinds)
    return table, f"Share of tokens that choose one expert of the kind, mean over domains: {each}.", figure


@picture("finding 5", "Finding 5: distance between the domains' expert distributions", "domains")
def finding5_divergence(measured: Bootstrap) -> Drawn:
    bits_L = measured.above_chance(Sums.divergence_by_layer)
    shuffled_L = measured.chance(Sums.divergence_by_layer)
    columns = {"layer": measured.counts.layers, **bits_L.columns("bits"), "bits_of_shuffled_domains": shuffled_L}
    sentence = (
        f"One choice of expert tells {bits_L.value.min():.3f} to {bits_L.value.max():.3f} bits, depending on the "
        f"layer, of which domain a text is from; shuffled domains reach {shuffled_L.max():.3f} (97.5 %)."
    )
    figure = between_domains(bits_L, "Jensen–Shannon divergence\n(bits)", shuffled_L)
    return pd.DataFrame(columns), sentence, figure


def between_domains(difference_L: Estimate, label: str, shuffled_L: np.ndarray | None = None) -> Figure:
    """A difference between domains, layer by layer, and what it reaches where domains are shuffled."""
    figure, axes = plt.subplots(figsize=(5.4, 3.1))
    layers = np.arange(1, len(difference_L.value) + 1)
    whiskers(axes, layers, difference_L, fmt="o-", label="domains of the text")
    if shuffled_L is not None:
        axes.plot(layers, shuffled_L, "--", color=GREY, label="shuffled domains (97.5 %)")
        axes.legend()
    axes.set_ylim(bottom=min(0, np.nanmin([difference_L.value, difference_L.low])))
    axes.set(xlabel="layer", ylabel=label, xticks=layers, xlim=(0.6, len(layers) + 0.4))
    return figure


@picture("pathway", "Pathway: the flow between expert kinds, from layer to layer", "kinds", "layers")
def pathway(measured: Bootstrap) -> Drawn:
    """How choices flow from the kinds of one layer to those of the next; heights are shares of all choices."""
    sums, counts = measured.sums, measured.counts
    kinds, L = list(counts.kinds), counts.n_layers
    chosen_LE = sums.chosen_DLE.sum(0) / (sums.n_D.sum() * counts.moe.top_k)
    share_Lk = np.stack([chosen_LE[:, where].sum(1) for where in counts.kinds.values()], 1)
    flow_Lkk = counts.flow_Lkk / counts.flow_Lkk.sum((1, 2), keepdims=True)
    table = combinations(**{"layer": counts.layers[:-1], "from": kinds, "to": kinds}).assign(
        share_of_choices=flow_Lkk.ravel(),
        share_if_independent=(share_Lk[:-1, :, None] * share_Lk[1:, None]).ravel(),
    )
    steps = "; ".join(
        f"from layer {layer} to {layer + 1} {flow_kk[0, 0] / ffn:.0%} of FFN choices go to FFN experts again "
        f"({next_ffn:.0%} if it were chance)"
        for layer, (flow_kk, (ffn, next_ffn)) in enumerate(zip(flow_Lkk, pairwise(share_Lk[:, 0]), strict=True), 1)
    )

    figure, axes = plt.subplots(figsize=(min(18, 2 + 1.7 * L), 4))
    width = 0.12
    bottom_Lk = share_Lk.cumsum(1) - share_Lk
    for layer, k in np.ndindex(share_Lk.shape):
        bottom, share, kind = float(bottom_Lk[layer, k]), float(share_Lk[layer, k]), kinds[k]
        bar = Rectangle((layer - width / 2, bottom), width, share, color=KIND_COLOURS[kind], linewidth=0)
        axes.add_patch(bar)
        if share > 0.035:
            colour, y = "white" if kind == "ffn" else BLACK, bottom + share / 2
            axes.text(layer, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=colour, zorder=3)
    leaves_Lkk = bottom_Lk[:-1, :, None] + flow_Lkk.cumsum(2) - flow_Lkk  # where ribbons begin, above one another
    arrives_Lkk = bottom_Lk[1:, None] + flow_Lkk.cumsum(1) - flow_Lkk
    for layer, i, j in np.ndindex(flow_Lkk.shape):
        start = (layer + width / 2, leaves_Lkk[layer, i, j])
        end = (layer + 1 - width / 2, arrives_Lkk[layer, i, j])
        ribbon(axes, start, end, flow_Lkk[layer, i, j], KIND_COLOURS[kinds[i]])
    axes.set(xlim=(-0.3, L - 0.7), ylim=(0, 1), yticks=[])
    axes.set_xticks(range(L), [f"layer {layer}" if L <= 9 else str(layer) for layer in counts.layers])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    legend_of_kinds(figure, kinds)
    return table, f"A token's choices in one layer go to its choices in the next in equal parts: {steps}.", figure


def ribbon(axes: Axes, start: tuple[float, float], end: tuple[float, float], height: float, colour: str) -> None:
    (x0, y0), (x1, y1) = start, end
    middle = (x0 + x1) / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    points += [(x1, y1 + height), (middle, y1 + height), (middle, y0 + height), (x0, y0 + height), (x0, y0)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=0.45, linewidth=0))


PICTURES = [
    finding1_correlation,
    finding2_spread,
    finding3_ffn_by_domain,
    finding4_activations,
    finding5_divergence,
    pathway,
]
