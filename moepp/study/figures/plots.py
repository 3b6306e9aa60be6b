"""Drawing for `moepp figures`: arrays in, a matplotlib figure out. Shapes as in routing_stats."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from PIL import Image

from moepp.model import MoEConfig
from moepp.study.figures.findings import Estimate
from moepp.study.style import BLACK, KIND_COLOURS, PINK

KIND_NAMES = {"ffn": "FFN", "const": "constant", "copy": "copy", "zero": "zero"}
GREY = "#7F7F7F"
FFN_SHADES = LinearSegmentedColormap.from_list("ffn", ["#FFFFFF", KIND_COLOURS["ffn"]])
PER_TOKEN = "FFN experts per token"


def save_small(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours: a third of the bytes, and no difference to see."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def load(
    chosen_LDE: np.ndarray, ffn_LD: Estimate, titles: Sequence[str], domains: Sequence[str], moe: MoEConfig
) -> Figure:
    """Figure 4: per domain, experts per token as a stack, one segment an expert. L panels."""
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    size = (1.2 + columns * max(1.9, 0.36 * len(domains)), 0.9 + 2.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, sharex=True, squeeze=False)
    x = np.arange(len(domains))
    for panel, axes in enumerate(grid.flat):
        if panel >= len(titles):
            axes.set_visible(False)
            continue
        bottom = np.zeros(len(domains))
        for kind, where in moe.kinds.items():
            for height in chosen_LDE[panel, :, where].T:
                axes.bar(x, height, 0.8, bottom, color=KIND_COLOURS[kind], edgecolor="white", linewidth=0.6)
                bottom += height
        _whiskers(axes, x, ffn_LD[panel], fmt="o-")
        axes.set_title(titles[panel], fontsize=10)
        axes.set_xticks(x, domains, rotation=40, ha="right", rotation_mode="anchor")
        axes.tick_params(labelbottom=panel + columns >= len(titles))
        axes.grid(axis="x", visible=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("experts per token")
    handles = [Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in _kinds(moe)]
    names = [KIND_NAMES[kind] for kind in _kinds(moe)]
    line = plt.Line2D([], [], color=BLACK, marker="o", markersize=4)
    figure.legend([*handles, line], [*names, PER_TOKEN], loc="outside upper center", ncols=len(names) + 1)
    return figure


def tokens(labels: Sequence[str], ffn: Estimate, count: np.ndarray, shown: int = 15) -> Figure:
    """Figure 5: all tokens in the order of their mean (N,), largest first, and the first and last by name."""
    figure, (every, most, least) = plt.subplots(
        1, 3, figsize=(10.5, 1.0 + 0.24 * min(shown, len(labels))), width_ratios=(1.3, 1, 1)
    )
    rank = np.arange(1, len(labels) + 1)
    every.fill_between(rank, ffn.low, ffn.high, color=KIND_COLOURS["ffn"], alpha=0.3, linewidth=0)
    every.plot(rank, ffn.value, color=KIND_COLOURS["ffn"], linewidth=2)
    every.set_xlabel("tokens, from most FFN experts to least")
    every.set_ylabel(f"{PER_TOKEN}, mean and 95 %")
    for axes, where, title in (
        (most, slice(0, shown), "most"),
        (least, slice(max(0, len(labels) - shown), None), "least"),
    ):
        y = np.arange(len(labels[where]))
        _whiskers(axes, y, ffn[where], fmt="o", colour=KIND_COLOURS["ffn"], horizontal=True)
        axes.set_yticks(y, [label[:11] + "…" * (len(label) > 11) for label in labels[where]], family="monospace")
        for name in axes.get_yticklabels():
            name.set_parse_math(False)
        for row, n in enumerate(count[where]):
            axes.annotate(f"×{n:,}", (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.set_ylim(len(y) - 0.5, -0.5)
        axes.set_xlim(every.get_ylim())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(PER_TOKEN)
    return figure


def parts_of_speech(names: Sequence[str], ffn: Estimate, count: np.ndarray) -> Figure:
    """Figure 5 by part of speech: (C,) means, with sample sizes."""
    figure, axes = plt.subplots(figsize=(6.5, 0.9 + 0.34 * len(names)))
    y = np.arange(len(names))
    axes.barh(y, ffn.value, 0.7, color=KIND_COLOURS["ffn"])
    _whiskers(axes, y, ffn, fmt="none", horizontal=True)
    axes.set_yticks(y, [f"{name} (n = {n:,})" for name, n in zip(names, count, strict=True)])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{PER_TOKEN}, mean and 95 %")
    return figure


def passage(texts: Sequence[str], ffn_S: np.ndarray, top_k: int, columns: int = 92) -> Figure:
    """A text with each token shaded by its FFN count, the mean over layers."""
    size, cells, line, column = 9.0, [], 0, 0  # a cell is (line, column, text, FFN count)
    for text, ffn in zip(texts, ffn_S, strict=True):
        shown = visible(text).replace("·", " ")
        if column + len(shown) > columns:
            line, column = line + 1, 0
        cells.append((line, column, shown, ffn))
        column += len(shown)
        if text.endswith("\n"):
            line, column = line + 1, 0
    width, height = size * 0.602 / 72, size * 1.9 / 72  # of a character of DejaVu Sans Mono, and of a line, inches
    figure, axes = plt.subplots(figsize=(columns * width + 1.2, (line + 1) * height + 0.3))
    for line, column, shown, ffn in cells:
        axes.add_patch(
            Rectangle((column, line), len(shown) - 0.1, 0.86, color=FFN_SHADES(ffn / top_k), linewidth=0)
        )
        colour = "white" if ffn / top_k > 0.85 else BLACK
        axes.text(
            column,
            line + 0.45,
            shown,
            family="monospace",
            fontsize=size,
            va="center",
            color=colour,
            parse_math=False,
        )
    axes.set_xlim(0, columns)
    axes.set_ylim(cells[-1][0] + 1, 0)
    axes.axis("off")
    shades = plt.cm.ScalarMappable(plt.Normalize(0, top_k), FFN_SHADES)
    figure.colorbar(shades, ax=axes, label="FFN experts\n(mean over layers)", aspect=12, shrink=0.9, pad=0.01)
    return figure


def scores(density_by_name: Mapping[str, np.ndarray]) -> Figure:
    """Figure 6: density (R, bins) of the highest and second-highest score, by checkpoint."""
    ranks = len(next(iter(density_by_name.values())))
    figure, grid = plt.subplots(1, ranks, figsize=(4.6 * ranks, 3.2), squeeze=False)
    for rank, (axes, title) in enumerate(zip(grid[0], ("highest score", "second-highest score"), strict=False)):
        for (name, density), colour, style in zip(
            density_by_name.items(), (BLACK, PINK), ("-", "--"), strict=False
        ):
            edges = np.linspace(0, 1, density.shape[1] + 1)
            axes.stairs(density[rank], edges, color=colour, linestyle=style, linewidth=1.8, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("softmax probability of the expert")
        axes.set_xlim(0, (0.5 if rank else 1) + 0.01)  # the second-highest is never above a half
    grid[0, 0].set_ylabel("density over tokens and layers")
    if len(density_by_name) > 1:
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(density_by_name)
        )
    return figure


def correlation(correlation_LL: np.ndarray) -> Figure:
    """Finding 1: between the FFN counts of all pairs of layers."""
    L = len(correlation_LL)
    figure, axes = plt.subplots(figsize=(2.6 + 0.34 * L, 1.6 + 0.34 * L))
    image = axes.imshow(correlation_LL, cmap="PuOr", vmin=-1, vmax=1)
    if L <= 12:
        for (i, j), value in np.ndenumerate(correlation_LL):
            colour = "white" if abs(value) > 0.6 else BLACK
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    layers = [str(layer) for layer in range(1, L + 1)]
    axes.set_xticks(range(L), layers)
    axes.set_yticks(range(L), layers)
    axes.grid(visible=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="correlation of FFN counts")
    return figure


def by_layer(estimate: Estimate, label: str, shuffled: np.ndarray | None = None) -> Figure:
    """Findings 2 and 5: a difference between domains (L,), and what it reaches where domains are shuffled."""
    figure, axes = plt.subplots(figsize=(5.4, 3.1))
    x = np.arange(1, len(estimate.value) + 1)
    _whiskers(axes, x, estimate, fmt="o-", colour=BLACK, label="domains of the text")
    if shuffled is not None:
        axes.plot(x, shuffled, "--", color=GREY, label="shuffled domains (97.5 %)")
        axes.legend()
    axes.set_ylim(bottom=min(0, np.nanmin([estimate.value, estimate.low])))
    axes.set_xticks(x)
    axes.set_xlim(0.6, len(x) + 0.4)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    return figure


def by_domain(domains: Sequence[str], ffn: Estimate) -> Figure:
    """Finding 3: FFN experts per token (D,)."""
    figure, axes = plt.subplots(figsize=(5.4, 0.9 + 0.32 * len(domains)))
    _whiskers(axes, np.arange(len(domains)), ffn, fmt="o", colour=KIND_COLOURS["ffn"], horizontal=True)
    axes.set_yticks(range(len(domains)), domains)
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.set_xlabel(f"{PER_TOKEN}, mean over layers and 95 %")
    return figure


def activations(domains: Sequence[str], share_Dk: Estimate, moe: MoEConfig) -> Figure:
    """Finding 4: how often one expert of a kind is chosen, (D, 4)."""
    figure, axes = plt.subplots(figsize=(1.6 + 0.95 * len(domains), 3.2))
    kinds = _kinds(moe)
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        where = list(KIND_NAMES).index(kind)
        x = np.arange(len(domains)) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(x, share_Dk.value[:, where], width, color=KIND_COLOURS[kind], label=KIND_NAMES[kind])
        _whiskers(axes, x, share_Dk[:, where], fmt="none")
    axes.set_xticks(range(len(domains)), domains)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("share of tokens that choose\none expert of the kind")
    figure.legend(loc="outside upper center", ncols=len(kinds))
    return figure


def pathway(share_Lk: np.ndarray, flow_Lkk: np.ndarray, moe: MoEConfig) -> Figure:
    """How choices flow from the kinds of one layer to those of the next; heights are shares of all choices."""
    L = len(share_Lk)
    figure, axes = plt.subplots(figsize=(min(18, 2 + 1.7 * L), 4))
    bar = 0.12
    top_Lk = np.cumsum(share_Lk, 1)
    for layer, shares in enumerate(share_Lk):
        for kind, share, top in zip(KIND_NAMES, shares, top_Lk[layer], strict=True):
            axes.add_patch(
                Rectangle((layer - bar / 2, top - share), bar, share, color=KIND_COLOURS[kind], linewidth=0)
            )
            if share > 0.035:
                axes.annotate(
                    f"{share:.0%}",
                    (layer, top - share / 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    zorder=3,
                    color="white" if kind == "ffn" else BLACK,
                )
    for layer, flow_kk in enumerate(flow_Lkk):
        leaves, arrives = (top_Lk - share_Lk)[layer : layer + 2].copy()
        for i, kind in enumerate(KIND_NAMES):
            for j, share in enumerate(flow_kk[i]):
                _ribbon(axes, (layer + bar / 2, leaves[i]), (layer + 1 - bar / 2, arrives[j]), share, kind)
                leaves[i] += share
                arrives[j] += share
    axes.set_xlim(-0.3, L - 0.7)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(L), [f"layer {layer}" if L <= 9 else str(layer) for layer in range(1, L + 1)])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    handles = [Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in _kinds(moe)]
    figure.legend(handles, [KIND_NAMES[kind] for kind in _kinds(moe)], loc="outside upper center", ncols=4)
    return figure


def _ribbon(axes: Axes, start: tuple[float, float], end: tuple[float, float], height: float, kind: str) -> None:
    (x0, y0), (x1, y1) = start, end
    middle = (x0 + x1) / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    points += [(x1, y1 + height), (middle, y1 + height), (middle, y0 + height), (x0, y0 + height), (x0, y0)]
    codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.CLOSEPOLY]
    axes.add_patch(PathPatch(Curve(points, codes), facecolor=KIND_COLOURS[kind], alpha=0.45, linewidth=0))


def _whiskers(
    axes: Axes,
    at: np.ndarray,
    estimate: Estimate,
    fmt: str,
    colour: str = BLACK,
    horizontal: bool = False,
    label: str | None = None,
) -> None:
    """Points with their intervals; an interval of the basic bootstrap may lie beside its point."""
    error = np.maximum(0, [estimate.value - estimate.low, estimate.high - estimate.value])
    x, y = (estimate.value, at) if horizontal else (at, estimate.value)
    errors: dict[str, Any] = {"xerr" if horizontal else "yerr": error}
    axes.errorbar(
        x, y, **errors, fmt=fmt, color=colour, markersize=4, linewidth=1.2, capsize=2.5, label=label, zorder=4
    )


def _kinds(moe: MoEConfig) -> list[str]:
    """Those that the model has."""
    return [kind for kind, where in moe.kinds.items() if where.stop > where.start]


def visible(text: str) -> str:
    """A token's text, with white space that can be seen."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\ufffd" for c in shown) or "▪"
