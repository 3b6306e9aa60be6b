"""The plots of a study and of the bench. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from moepp.study.style import BLACK, BLUE, COLOURS, GREEN, ORANGE, PINK, STYLE, save

if TYPE_CHECKING:  # drawing needs no scipy
    from moepp.study.compare.results import Curve
    from moepp.study.compare.speed import Ratio
    from moepp.study.compare.stats import Paired
    from tests.bench.setting import Row


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


def bench(path: Path, rows: Sequence[Row]) -> None:
    """Four panels: speed-up by τ, share of the limit, tokens/s of training steps, growth."""
    with plt.rc_context(STYLE):
        figure, ((by_tau, steps), (limits, growth)) = plt.subplots(2, 2, figsize=(12, 8))
        measured = [row for row in rows if row.value is not None]
        for passes, colour in (("forward", ORANGE), ("forward + backward", BLUE)):
            chosen = [row for row in measured if row.section == "tau" and row.name.endswith(f", {passes}")]
            points(by_tau, [number_in(row.name) for row in chosen], chosen, colour, passes)
        taus = [number_in(row.name) for row in chosen]
        by_tau.plot(taus, [row.ideal for row in chosen], color="#7F7F7F", linestyle="--", label="ideal")
        paper = [row.paper * row.ideal for row in chosen if row.paper and row.ideal]
        by_tau.plot(taus, paper, color=PINK, linestyle=":", marker="s", label="paper, 0.6B (forward)")
        by_tau.set_yscale("log")
        by_tau.set_yticks([1, 1.5, 2, 3, 4, 6], ["1×", "1.5×", "2×", "3×", "4×", "6×"])
        by_tau.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        by_tau.set_xlabel("τ")
        by_tau.set_title("layer: speed-up over vanilla MoE")

        chosen = [row for row in measured if row.section == "step" and row.unit == "tokens/s" and not row.note]
        bars(steps, chosen, [GREEN if row.name.startswith(("MoE++", "vanilla")) else "#7F7F7F" for row in chosen])
        steps.set_title("training step: tokens/s")
        chosen = [row for row in measured if row.section == "layer"]
        bars(limits, chosen, [BLUE if "backward" in row.name else ORANGE for row in chosen])
        limits.axvline(1, color=BLACK, linewidth=1)
        limits.set_title("layer: share of its limit")

        for section, colour in (("tokens", BLACK), ("experts", BLUE), ("constants", PINK)):
            chosen = [row for row in measured if row.section == section and row.unit.startswith("×")]
            chosen.sort(key=lambda row: number_in(row.name))
            points(growth, [number_in(row.name) for row in chosen], chosen, colour, section)
        growth.set_xscale("log", base=2)
        growth.set_xticks([1, 4, 16, 64, 1024, 4096, 16384], ["1", "4", "16", "64", "1k", "4k", "16k"])
        growth.set_ylim(bottom=0)
        growth.set_title("layer: relative time by size")
        growth.set_xlabel("number (of tokens: relative time per token)")
        for axes in (by_tau, growth):
            axes.legend()
        save(figure, path)


def points(axes: Axes, x: Sequence[float], rows: Sequence[Row], colour: str, label: str) -> None:
    """Medians with quartiles."""
    middle = np.array([row.value for row in rows], dtype=float)
    quartiles = np.array([row.quartiles for row in rows], dtype=float).reshape(-1, 2)
    spread = [middle - quartiles[:, 0], quartiles[:, 1] - middle]
    axes.errorbar(x, middle, yerr=spread, color=colour, marker="o", capsize=3, linewidth=2, label=label)


def bars(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    """Medians with quartiles, from top to bottom."""
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        assert row.value is not None
        assert row.quartiles is not None
        lower, upper = row.quartiles
        axes.barh(y, row.value, color=colour, xerr=[[row.value - lower], [upper - row.value]], capsize=2)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def number_in(name: str) -> float:
    """The first number of a row's name: "τ = 0.75, forward" → 0.75."""
    return float(re.findall(r"[\d,.]+\d|\d", name)[0].replace(",", ""))
