"""The plots of a study. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from moepp.study.style import BLACK, BLUE, COLOURS, ORANGE, STYLE, save

if TYPE_CHECKING:  # drawing needs no scipy
    from moepp.study.compare.results import Curve
    from moepp.study.compare.speed import Ratio
    from moepp.study.compare.stats import Paired


def loss_curves(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Validation loss against tokens and against training FLOPs: the mean over seeds, ± s.d. as a band."""
    with plt.rc_context(STYLE):
        figure, (by_tokens, by_flops) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        late = []  # losses after the steep beginning, which would flatten all that follows
        for colour, (name, seeds) in zip(cycle(COLOURS), curves.items(), strict=False):
            # a curve per seed, all validated at the same steps
            losses = np.stack([curve.loss for curve in seeds])
            mean, late_from = losses.mean(0), max(0, min(losses.shape[1] // 3, losses.shape[1] - 2))
            late.append(losses[:, late_from:])
            for axes, x in ((by_tokens, seeds[0].tokens), (by_flops, np.mean([c.flops for c in seeds], axis=0))):
                axes.plot(x, mean, color=colour, label=name, linewidth=1.8)
                if len(seeds) > 1:
                    deviation = losses.std(0, ddof=1)
                    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        low, high = min(losses.min() for losses in late), max(losses.max() for losses in late)
        by_tokens.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        for axes in (by_tokens, by_flops):
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        by_tokens.set_xlabel("training tokens")
        by_flops.set_xlabel("training FLOPs (measured FFN share)")
        by_tokens.set_ylabel("validation loss (nats per token)")
        by_tokens.legend()
        save(figure, path)


def differences(path: Path, rows: Mapping[str, Paired], reference: str) -> None:
    """Each variant's loss minus the reference's, with its interval; side by side from top to bottom."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 1.4 + 0.36 * len(rows)))
        for y, difference in enumerate(rows.values()):
            errorbar(axes, difference.mean, y, difference, horizontal=True)
            label = f"{difference.mean:+.4f}"
            if difference.n > 1:
                label += f"  [{difference.low:+.4f}, {difference.high:+.4f}]"
            axes.annotate(
                label, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, family="monospace"
            )
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"validation loss minus {reference}'s (nats per token; left is better)\n{LEGEND}")
        save(figure, path)


LEGEND = "mean over seeds and 95 % interval;\nblue or orange where it excludes zero"


def constants(path: Path, points: Mapping[int, Paired], reference: str) -> None:
    """Loss relative to the reference's against the number of constant experts."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 4))
        numbers = sorted(points)
        axes.plot(numbers, [points[n].mean for n in numbers], color="#7F7F7F", linewidth=1, zorder=1)
        for n in numbers:
            errorbar(axes, n, points[n].mean, points[n], horizontal=False)
        axes.axhline(0, color=BLACK, linewidth=1, linestyle="--")
        axes.annotate(reference, (1, 0), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
        axes.set_xticks(numbers)
        axes.set_xlabel(f"constant experts\n{LEGEND}")
        axes.set_ylabel(f"validation loss minus {reference}'s\n(nats per token; lower is better)")
        save(figure, path)


def errorbar(axes: Axes, x: float, y: float, difference: Paired, horizontal: bool) -> None:
    colour = {"better": BLUE, "worse": ORANGE}.get(difference.verdict, "#7F7F7F")
    interval = None
    if difference.n > 1:
        interval = [[difference.mean - difference.low], [difference.high - difference.mean]]
    errors: dict[str, Any] = {"xerr" if horizontal else "yerr": interval}
    axes.errorbar(x, y, **errors, fmt="o", color=colour, capsize=3, markersize=5, linewidth=1.6)


def tau(
    path: Path,
    measured: Mapping[float, Ratio],
    ideal: Mapping[float, float],
    paper: Mapping[str, Mapping[float, float]],
) -> None:
    """Expert-forward speed-up against τ: measured here, ideal for these sizes, and the paper's by model size."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.4))
        for colour, marker, (size, values) in zip(cycle(COLOURS[2:]), cycle("svDP"), paper.items(), strict=False):
            taus = sorted(values)
            axes.plot(
                taus,
                [values[t] for t in taus],
                marker=marker,
                color=colour,
                linestyle=":",
                linewidth=1.2,
                label=f"paper, {size}",
            )
        taus = sorted(ideal)
        axes.plot(taus, [ideal[t] for t in taus], color="#7F7F7F", linestyle="--", label="ideal, this study")
        taus = sorted(measured)
        middle = np.array([measured[t].median for t in taus])
        below = middle - [measured[t].lower_quartile for t in taus]
        above = [measured[t].upper_quartile for t in taus] - middle
        axes.errorbar(
            taus,
            middle,
            yerr=[below, above],
            color=BLUE,
            marker="o",
            capsize=3,
            linewidth=2,
            label="measured, this study (median, quartiles)",
        )
        axes.set_yscale("log")
        ticks = [1, 1.5, 2, 3, 4, 6]
        axes.set_yticks(ticks, [f"{tick}×" for tick in ticks])
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xticks(taus, [f"{t:g}" for t in taus])
        axes.set_xlabel("τ")
        axes.set_ylabel("expert-forward speed-up over vanilla")
        axes.legend()
        save(figure, path)
