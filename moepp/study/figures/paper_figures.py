"""The paper's figures 4 to 6: expert load by domain, FFN experts by token and part of speech, routing scores."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from moepp.study.figures.findings import Bootstrap, Estimate, combinations
from moepp.study.figures.parts_of_speech import CLASSES
from moepp.study.figures.picture import PER_TOKEN, Drawn, ffn_by_name, legend_of_kinds, picture, whiskers
from moepp.study.figures.routing_stats import MIN_COUNT, Sums, moments
from moepp.study.style import BLACK, KIND_COLOURS, PINK

FFN_COLOUR = KIND_COLOURS["ffn"]
FFN_SHADES = LinearSegmentedColormap.from_list("ffn", ["#FFFFFF", FFN_COLOUR])
NAMED = 15  # tokens from either end of the order
RANKS = ("highest", "second-highest")
DRAWN_BINS = 100


@picture("Expert load by domain (the paper's figure 4)")
def load(measured: Bootstrap) -> Drawn:
    """A panel for each layer, their mean first: experts per token as a stack, one segment an expert."""
    counts, sums, domains = measured.counts, measured.sums, measured.counts.domains
    kind_E = [kind for kind, where in counts.kinds.items() for _ in range(where.start, where.stop)]
    panels = ["all layers, mean", *(f"layer {layer}" for layer in counts.layers)]
    chosen_LDE = (sums.chosen_DLE / sums.n_D[:, None, None]).swapaxes(0, 1)
    chosen_PDE = np.concatenate([chosen_LDE.mean(0, keepdims=True), chosen_LDE])
    ffn_PD = measured.estimate(Sums.ffn_by_panel).map(np.transpose)
    table = combinations(layers=panels, domain=domains, expert=range(len(kind_E))).assign(
        tokens=np.tile(sums.n_D.astype(int).repeat(len(kind_E)), len(panels)),
        kind=kind_E * (len(panels) * len(domains)),
        experts_per_token=chosen_PDE.ravel(),
        **ffn_PD.map(lambda ffn_PD: ffn_PD.repeat(len(kind_E))).columns("ffn_per_token"),
    )
    ffn_D, ffn_L = ffn_PD.value[0], ffn_PD.value[1:].mean(1)
    sentence = (
        f"Of {counts.moe.top_k} experts per token, {ffn_D.min():.2f} are FFN experts in "
        f"{domains[ffn_D.argmin()]} and {ffn_D.max():.2f} in {domains[ffn_D.argmax()]}; layers "
        f"range from {ffn_L.min():.2f} to {ffn_L.max():.2f}."
    )

    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    size = (1.2 + columns * max(1.9, 0.36 * len(domains)), 0.9 + 2.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, sharex=True, squeeze=False)
    x = np.arange(len(domains))
    for i, panel in enumerate(panels):
        axes = grid.flat[i]
        bottom_DE = chosen_PDE[i].cumsum(-1) - chosen_PDE[i]
        for kind, height_D, bottom_D in zip(kind_E, chosen_PDE[i].T, bottom_DE.T, strict=True):
            axes.bar(x, height_D, 0.8, bottom_D, color=KIND_COLOURS[kind], edgecolor="white", linewidth=0.6)
        whiskers(axes, x, ffn_PD[i], fmt="o-")
        axes.set_title(panel, fontsize=10)
        axes.set_xticks(x, domains, rotation=40, ha="right", rotation_mode="anchor")
        axes.tick_params(labelbottom=i + columns >= len(panels))
        axes.grid(axis="x", visible=False)
    plt.setp(grid.flat[len(panels) :], visible=False)
    plt.setp(grid[:, 0], ylabel="experts per token")
    line = plt.Line2D([], [], color=BLACK, marker="o", markersize=4)
    legend_of_kinds(figure, counts.kinds, **{PER_TOKEN: line})
    return table, sentence, figure


@picture("FFN experts per token, by token (figure 5)", "kinds", "tokens")
def tokens(measured: Bootstrap) -> Drawn:
    """All tokens in the order of their mean, largest first, and the first and last by name."""
    counts = measured.counts
    ids, L = counts.frequent_tokens, counts.n_layers
    n = counts.token_n[ids]
    mean = counts.token_ffn[ids] / (n * L)
    variance = np.maximum(0, (counts.token_ffn_squared[ids] / L**2 - n * mean**2) / (n - 1))
    half = 1.96 * np.sqrt(variance / n)  # over the occurrences of the token
    order = np.lexsort((ids, -n, -mean))  # the most frequent first among equals
    ids, n, ffn = ids[order], n[order], Estimate(mean, mean - half, mean + half)[order]
    labels = [visible(counts.texts_V[i]) for i in ids]
    rank = np.arange(1, len(ids) + 1)
    table = pd.DataFrame({"rank": rank, "token": labels, "id": ids, "count": n, **ffn.columns("ffn_per_token")})
    sentence = (
        f"Of {len(ids):,} tokens that occur {MIN_COUNT} times or more, “{labels[0]}” takes most FFN "
        f"experts ({ffn.value[0]:.2f}) and “{labels[-1]}” least ({ffn.value[-1]:.2f}); half lie between "
        f"{np.quantile(ffn.value, 0.25):.2f} and {np.quantile(ffn.value, 0.75):.2f}. · is a space, ↵ a line end."
    )

    size = (10.5, 1.0 + 0.24 * max(10, min(NAMED, len(ids))))
    figure, (every, most, least) = plt.subplots(1, 3, figsize=size, width_ratios=(1.3, 1, 1))
    every.fill_between(rank, ffn.low, ffn.high, color=FFN_COLOUR, alpha=0.3, linewidth=0)
    every.plot(rank, ffn.value, color=FFN_COLOUR, linewidth=2)
    every.set(xlabel="tokens, from most FFN experts to least", ylabel=f"{PER_TOKEN}, mean and 95 %")
    for axes, where, title in ((most, slice(NAMED), "most"), (least, slice(-NAMED, None), "least")):
        names = [label[:11] + "…" * (len(label) > 11) for label in labels[where]]
        ffn_by_name(axes, names, ffn[where])
        plt.setp(axes.get_yticklabels(), family="monospace", parse_math=False)
        axes.set_xlim(every.get_ylim())
        axes.set_title(title, fontsize=10)
    return table, sentence, figure


@picture("FFN experts per token, by part of speech (figure 5)", "kinds", "words")
def parts_of_speech(measured: Bootstrap) -> Drawn:
    count_C = measured.sums.class_n_DC.sum(0).astype(int)
    found = np.flatnonzero(count_C)
    names, count = [CLASSES[c] for c in found], count_C[found]
    ffn = measured.estimate(Sums.ffn_by_class)[found]
    table = pd.DataFrame({"part_of_speech": names, "count": count, **ffn.columns("ffn_per_token")})
    order = ", ".join(f"{names[i]} {ffn.value[i]:.2f}" for i in np.argsort(-ffn.value))
    sentence = (
        f"FFN experts per token fall in the order {order} "
        "(in the paper verbs take most, then nouns, and word fragments least)."
    )
    figure, axes = plt.subplots(figsize=(6.5, 0.9 + 0.34 * len(names)))
    axes.barh(range(len(names)), ffn.value, 0.7, color=FFN_COLOUR)
    labels = [f"{name} (n = {n:,})" for name, n in zip(names, count, strict=True)]
    ffn_by_name(axes, labels, ffn, ", mean and 95 %", fmt="none", color=BLACK)
    axes.grid(axis="y", visible=False)
    return table, sentence, figure


@picture("A passage, shaded by FFN experts", "kinds")
def passage(measured: Bootstrap) -> Drawn:
    """The text with each token shaded by its FFN count, the mean over layers."""
    counts, (ids, ffn_SL) = measured.counts, measured.counts.passage
    texts, ffn_S, top_k = [counts.texts_V[i] for i in ids], ffn_SL.mean(1), counts.moe.top_k
    table = pd.DataFrame(ffn_SL, columns=[f"layer_{layer}" for layer in counts.layers])
    table.insert(0, "position", range(len(ids)))
    table.insert(1, "token", [visible(text) for text in texts])
    sentence = (
        f"The text begins so ({counts.domains[0]}): its tokens take {ffn_S.mean():.2f} FFN experts on average, "
        f"from {ffn_S.min():.2f} to {ffn_S.max():.2f}. The darker, the more."
    )

    columns, size, line, column = 92, 9.0, 0, 0
    figure, axes = plt.subplots()
    font: dict[str, Any] = {"family": "monospace", "fontsize": size, "va": "center", "parse_math": False}
    for text, share in zip(texts, ffn_S / top_k, strict=True):
        printed = visible(text).replace("·", " ")
        if column + len(printed) > columns:
            line, column = line + 1, 0
        axes.add_patch(Rectangle((column, line), len(printed) - 0.1, 0.86, color=FFN_SHADES(share), linewidth=0))
        axes.text(column, line + 0.45, printed, color="white" if share > 0.85 else BLACK, **font)
        axes.set(xlim=(0, columns), ylim=(line + 1, 0))
        column += len(printed)
        if text.endswith("\n"):
            line, column = line + 1, 0
    width, height = size * 0.602 / 72, size * 1.9 / 72  # of a character of DejaVu Sans Mono, and of a line, inches
    figure.set_size_inches(columns * width + 1.2, (line + 1) * height + 0.3)
    axes.axis("off")
    shades = plt.cm.ScalarMappable(plt.Normalize(0, top_k), FFN_SHADES)
    figure.colorbar(shades, ax=axes, label="FFN experts\n(mean over layers)", aspect=12, shrink=0.9, pad=0.01)
    return table, sentence, figure


@picture("Routing scores (figure 6)")
def scores(measured: Bootstrap) -> Drawn:
    """Of the highest and the second-highest score: its density, of one or two checkpoints."""
    bins = [f"tokens_from_{b / DRAWN_BINS:.2f}" for b in range(DRAWN_BINS)]
    rows = [
        {"checkpoint": name, "layer": layer, "rank": rank, **moments(tokens_X)}
        | dict(zip(bins, tokens_X.reshape(DRAWN_BINS, -1).sum(1), strict=True))
        for name, tokens_LRX in measured.counts.scores_LRX.items()
        for layer, tokens_RX in (("all", tokens_LRX.sum(0)), *enumerate(tokens_LRX, 1))
        for rank, tokens_X in zip(RANKS, tokens_RX, strict=False)
    ]
    table = pd.DataFrame(rows)
    of_all_layers = table[table["layer"] == "all"]
    sentence = "; ".join(
        f"the {score['rank']} score of {score['checkpoint']} has mean {score['mean']:.3f}, variance "
        f"{score['variance']:.4f}, range {score['least']:.2f} to {score['largest']:.2f}"
        for score in of_all_layers.to_dict("records")
    )
    figure, grid = plt.subplots(1, of_all_layers["rank"].nunique(), figsize=(9.2, 3.4), squeeze=False)
    edges = np.linspace(0, 1, DRAWN_BINS + 1)
    for axes, (rank, by_checkpoint) in zip(grid[0], of_all_layers.groupby("rank"), strict=True):
        for (_, row), (colour, line) in zip(by_checkpoint.iterrows(), ((BLACK, "-"), (PINK, "--")), strict=False):
            density_X = row[bins].astype(float) / row[bins].sum() * DRAWN_BINS
            axes.stairs(density_X, edges, color=colour, linestyle=line, linewidth=1.8, label=row["checkpoint"])
        axes.set(xlabel="softmax probability of the expert", xlim=(0, by_checkpoint["largest"].max() + 0.01))
        axes.set_title(f"{rank} score", fontsize=10)
    grid[0, 0].set_ylabel("density over tokens and layers")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center")
    return table, sentence, figure


def visible(text: str) -> str:
    """A token's text, with white space that can be seen."""
    spaced = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\ufffd" for c in spaced) or "▪"


PICTURES = [load, tokens, parts_of_speech, passage, scores]
