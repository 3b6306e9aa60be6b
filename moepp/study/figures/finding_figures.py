"""Pictures of the paper's five findings, and of the pathway of tokens from layer to layer."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moepp.study.figures.findings import Bootstrap, Estimate, combinations
from moepp.study.figures.picture import KIND_NAMES, Drawn, legend_of_kinds, picture, whiskers
from moepp.study.figures.routing_stats import Sums, by_kind
from moepp.study.style import BLACK, GREY, KIND_COLOURS


@picture("Finding 1: FFN load of pairs of layers", "kinds", "layers")
def finding1_correlation(measured: Bootstrap) -> Drawn:
    estimate_LL, layers = measured.estimate(Sums.correlation), measured.counts.layers
    table = estimate_LL.table("correlation", layer=layers, other_layer=layers)
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


@picture("Finding 2: variation of FFN load across domains, layer by layer", "kinds", "domains")
def finding2_spread(measured: Bootstrap) -> Drawn:
    variance_L, layers = measured.above_chance(Sums.spread_by_layer), measured.counts.layers
    sd_L = variance_L.map(lambda variance_L: np.sqrt(np.maximum(variance_L, 0)))
    table = sd_L.table("sd_between_domains", layer=layers)
    most, least = sd_L.value.argmax(), sd_L.value.argmin()
    sentence = (
        f"FFN experts per token differ most between domains in layer {layers[most]} (standard deviation "
        f"{sd_L.value[most]:.3f}), least in {layers[least]} ({sd_L.value[least]:.3f})."
    )
    return table, sentence, between_domains(sd_L, "s.d. between domains of\nFFN experts per token")


@picture("Finding 4: how often one expert of a kind is chosen", "kinds")
def finding4_activations(measured: Bootstrap) -> Drawn:
    domains, kinds = measured.counts.domains, list(measured.counts.kinds)
    share_Dk = measured.estimate(Sums.activations)
    table = share_Dk.table("share_of_tokens_per_expert", domain=domains, kind=kinds)
    means = zip(kinds, share_Dk.value.mean(0), strict=True)
    each = ", ".join(f"{KIND_NAMES[kind]} {mean:.3f}" for kind, mean in means)
    shares = pd.DataFrame(share_Dk.value, domains, kinds)
    error_k2D = np.maximum(0, [share_Dk.value - share_Dk.low, share_Dk.high - share_Dk.value]).T.swapaxes(1, 2)
    figure, axes = plt.subplots(figsize=(3 + 0.8 * len(domains), 3.8))
    shares.plot.bar(ax=axes, yerr=error_k2D, color=KIND_COLOURS, width=0.8, capsize=2.5, legend=False)
    axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylabel("share of tokens that choose\none expert of the kind")
    axes.grid(axis="x", visible=False)
    legend_of_kinds(figure, kinds)
    return table, f"Share of tokens that choose one expert of the kind, mean over domains: {each}.", figure


@picture("Finding 5: distance between the domains' expert distributions", "domains")
def finding5_divergence(measured: Bootstrap) -> Drawn:
    bits_L = measured.above_chance(Sums.divergence_by_layer)
    shuffled_L = measured.chance(Sums.divergence_by_layer)
    table = bits_L.table("bits", layer=measured.counts.layers).assign(bits_of_shuffled_domains=shuffled_L)
    sentence = (
        f"One choice of expert tells {bits_L.value.min():.3f} to {bits_L.value.max():.3f} bits, depending on the "
        f"layer, of which domain a text is from; shuffled domains reach {shuffled_L.max():.3f} (97.5 %)."
    )
    return table, sentence, between_domains(bits_L, "Jensen–Shannon divergence\n(bits)", shuffled_L)


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


@picture("Pathway: the flow between expert kinds, from layer to layer", "kinds", "layers")
def pathway(measured: Bootstrap) -> Drawn:
    """How choices flow from the kinds of one layer to those of the next; heights are shares of all choices."""
    sums, counts = measured.sums, measured.counts
    kinds, L = list(counts.kinds), counts.n_layers
    chosen_LE = sums.chosen_DLE.sum(0) / (sums.n_D.sum() * counts.moe.top_k)
    share_Lk = by_kind(counts.kinds, chosen_LE)
    flow_Lkk = counts.flow_Lkk / counts.flow_Lkk.sum((1, 2), keepdims=True)
    table = combinations(**{"layer": counts.layers[:-1], "from": kinds, "to": kinds}).assign(
        share_of_choices=flow_Lkk.ravel(),
        share_if_independent=(share_Lk[:-1, :, None] * share_Lk[1:, None]).ravel(),
    )
    again_L, chance_L = flow_Lkk[:, 0, 0] / share_Lk[:-1, 0], share_Lk[1:, 0]
    sentence = (
        "A token's choices in one layer go to its choices in the next in equal parts. Of FFN choices "
        f"{min(again_L):.0%} to {max(again_L):.0%} go to FFN experts again ({min(chance_L):.0%} to "
        f"{max(chance_L):.0%} if it were chance)."
    )

    figure, axes = plt.subplots(figsize=(min(18, 2 + 1.7 * L), 4))
    width = 0.12
    bottom_Lk = share_Lk.cumsum(1) - share_Lk
    for kind, share_L, bottom_L in zip(kinds, share_Lk.T, bottom_Lk.T, strict=True):
        bars = axes.bar(range(L), share_L, width, bottom_L, color=KIND_COLOURS[kind], linewidth=0)
        labels = [f"{share:.0%}" if share > 0.035 else "" for share in share_L]
        colour = "white" if kind == "ffn" else BLACK
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color=colour, zorder=3)
    leaves_Lkk = bottom_Lk[:-1, :, None] + flow_Lkk.cumsum(2) - flow_Lkk  # where ribbons begin, above one another
    arrives_Lkk = bottom_Lk[1:, None] + flow_Lkk.cumsum(1) - flow_Lkk
    t = np.linspace(0, 1, 50)
    across = width / 2 + (1 - width) * (1.5 * t - 1.5 * t**2 + t**3)
    up = 3 * t**2 - 2 * t**3  # a Bézier curve, level at both ends
    for layer, i, j in np.ndindex(flow_Lkk.shape):
        y = leaves_Lkk[layer, i, j] + up * (arrives_Lkk[layer, i, j] - leaves_Lkk[layer, i, j])
        colour, top = KIND_COLOURS[kinds[i]], y + flow_Lkk[layer, i, j]
        axes.fill_between(layer + across, y, top, color=colour, alpha=0.45, linewidth=0)
    axes.set(xlim=(-0.3, L - 0.7), ylim=(0, 1), yticks=[])
    axes.set_xticks(range(L), [f"layer {layer}" if L <= 9 else str(layer) for layer in counts.layers])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    legend_of_kinds(figure, kinds)
    return table, sentence, figure


PICTURES = [finding1_correlation, finding2_spread, finding4_activations, finding5_divergence, pathway]
