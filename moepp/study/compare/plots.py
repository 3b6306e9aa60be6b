"""The plots of a study: each shows columns of its results, or is left out where there is too little to show."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from moepp.study.compare.results import PAIRED, REFERENCE, Results
from moepp.study.style import BLACK, BLUE, COLOURS, GREY, ORANGE, interval_bars

LEGEND = "mean over seeds and 95 % interval;\nblue or orange where it excludes zero"


def curves(results: Results) -> plt.Figure | None:
    """Validation loss against tokens and against training FLOPs: the mean over seeds, ± s.d. as a band."""
    by_variant = {name: pd.concat(results.curves[name].values()) for name in results.shown_in("curves").index}
    by_variant = {name: curve for name, curve in by_variant.items() if curve.index.nunique() > 1}
    if not by_variant:
        return None
    figure, (by_tokens, by_flops) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    late = []  # losses where a third is done: the steep beginning would flatten all that follows
    for colour, (name, curve) in zip(cycle(COLOURS), by_variant.items(), strict=False):
        by_step = curve.groupby("step")
        mean, deviation = by_step.mean(), by_step["loss"].std()
        late.append(mean.loss.iloc[len(mean) // 3])
        for axes, x in ((by_tokens, mean.tokens), (by_flops, mean.flops)):
            axes.plot(x, mean.loss, color=colour, label=name, linewidth=1.8)
            axes.fill_between(
                x, mean.loss - deviation, mean.loss + deviation, color=colour, alpha=0.2, linewidth=0
            )
    by_tokens.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    by_tokens.set_ylim(top=max(late))
    by_flops.set_xlabel("training FLOPs (measured FFN share)")
    for axes in (by_tokens, by_flops):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    by_tokens.legend()
    return figure


def differences(results: Results) -> plt.Figure | None:
    """Each variant's loss minus the reference's, with its interval; side by side from top to bottom."""
    compared = results.variants[results.variants["flops_of"] == ""].dropna(subset="loss_difference")
    if compared.empty:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.36 * len(compared)))
    for y, (_, row) in enumerate(compared.iterrows()):
        loss_difference(axes, y, row, horizontal=True)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(compared)), list(compared.index))
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    reference = results.matrix.reference.name
    axes.set_xlabel(f"validation loss minus {reference}'s (nats per token; left is better)\n{LEGEND}")
    return figure


def constants(results: Results) -> plt.Figure | None:
    """Loss relative to the reference's against the number of constant experts."""
    points = results.shown_in("constants").dropna(subset="loss_difference").set_index("n_const").sort_index()
    if len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(points["loss_difference"], color=GREY, linewidth=1, zorder=1)
    for n_const, row in points.iterrows():
        loss_difference(axes, n_const, row)
    axes.axhline(0, color=BLACK, linewidth=1, linestyle="--")
    axes.set_xticks(points.index)
    axes.set_xlabel(f"constant experts\n{LEGEND}")
    axes.set_ylabel(above_reference(results))
    return figure


def compute(results: Results) -> plt.Figure | None:
    """Loss relative to the reference's against FFN experts per token, and against the experts' measured speed."""
    costs = {
        "ffn_experts_per_token": "FFN experts per token (left is cheaper)",
        "speed_expert_forward": "speed-up of the experts' forward (right is faster)",
    }
    return by_cost(results, "compute", costs, line_of=str)


def frontier(results: Results) -> plt.Figure | None:
    """Loss relative to the reference's against what it cost, in three ways. A line joins what has the same name
    before its first _."""
    costs = {
        "ffn_flops_per_token": "FFN FLOPs per token, forward",
        "training_flops": "training FLOPs in all",
        "speed_training_time": f"training time over {results.matrix.reference.name}'s (measured)",
    }
    return by_cost(results, "frontier", costs, line_of=lambda name: name.partition("_")[0])


def by_cost(
    results: Results, plot: str, costs: dict[str, str], line_of: Callable[[str], str]
) -> plt.Figure | None:
    """A panel for each column of `costs`, column → label. Variants with the same `line_of` are joined."""
    points = results.shown_in(plot)
    points = points[points["speed_rounds"] > 0]
    if len(points) < 2:
        return None
    figure, panels = plt.subplots(1, len(costs), figsize=(1 + 4 * len(costs), 4.4), sharey=True)
    for axes, (cost, label) in zip(panels, costs.items(), strict=True):
        lines = points.sort_values(cost).groupby(line_of, sort=False)
        for colour, (name, line) in zip(cycle(COLOURS), sorted(lines, key=lambda line: line[0]), strict=False):
            of_itself = line["loss_difference_verdict"] == REFERENCE
            mean = line["loss_difference"].mask(of_itself, 0.0)  # else there is none where no seed is in common
            low, high = (line[f"loss_difference{part}"].fillna(mean) for part in PAIRED[1:3])
            style: dict[str, Any] = {"color": colour, "marker": "o", "capsize": 3, "label": name}
            interval_bars(axes, line[cost], mean, low, high, **style)
        axes.axhline(0, color=BLACK, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        if "flops" in cost:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(above_reference(results))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def above_reference(results: Results) -> str:
    return f"validation loss minus {results.matrix.reference.name}'s\n(nats per token; lower is better)"


def loss_difference(axes: Axes, at: Any, row: pd.Series, horizontal: bool = False) -> None:
    """A variant's, with its interval."""
    mean, low, high, _, verdict = (row[f"loss_difference{part}"] for part in PAIRED)
    colour = {"better": BLUE, "worse": ORANGE}.get(verdict, GREY)
    style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 5, "linewidth": 1.6}
    interval_bars(axes, at, mean, low, high, horizontal, **style)


def tau(results: Results) -> plt.Figure | None:
    """Expert-forward speed-up against τ: measured here, ideal for these sizes, and the paper's by model size."""
    points = results.shown_in("tau").set_index("tau").sort_index()
    points = points[points["speed_rounds"] > 0]
    if len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.4))
    papers = points.filter(like="paper_speedup/").dropna(axis="columns", how="all")
    for colour, marker, (name, values) in zip(cycle(COLOURS[2:]), cycle("svDP"), papers.items(), strict=False):
        label = f"paper, {name.removeprefix('paper_speedup/')}"
        axes.plot(values.dropna(), marker=marker, color=colour, linestyle=":", linewidth=1.2, label=label)
    axes.plot(points["speedup_ideal"], color=GREY, linestyle="--", label="ideal, this study")
    middle = points["speed_expert_forward"]
    lower, upper = (points[f"speed_expert_forward_{side}_quartile"] for side in ("lower", "upper"))
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "capsize": 3, "linewidth": 2}
    label = "measured, this study (median, quartiles)"
    interval_bars(axes, points.index, middle, lower, upper, label=label, **style)
    axes.set_yscale("log")
    ticks = [1, 1.5, 2, 3, 4, 6]
    axes.set_yticks(ticks, [f"{tick}×" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(points.index, [f"{t:g}" for t in points.index])
    axes.set(xlabel="τ", ylabel="expert-forward speed-up over vanilla")
    axes.legend()
    return figure


def tune(results: Results) -> plt.Figure | None:
    """Loss against each option that was searched over, by variant: the best with each of its values, and its s.d.
    over seeds."""
    trials = results.trials
    options = [name for name in trials.columns if "." in name]
    if not options:
        return None
    figure, panels = plt.subplots(1, len(options), figsize=(5 * len(options), 4), sharey=True, squeeze=False)
    for axes, option in zip(panels[0], options, strict=True):
        for colour, (name, tried) in zip(cycle(COLOURS), trials.groupby("variant", sort=False), strict=False):
            chosen = tried[tried.chosen].iloc[0]
            best = tried.sort_values("loss").drop_duplicates(option).set_index(option).sort_index()
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(best.index, best.loss, best.loss_sd, label=name, **style)
            axes.plot(chosen[option], chosen.loss, color=colour, marker="*", markersize=13)
        if trials[option].min() > 0:
            axes.set_xscale("log")
        axes.set_xticks(values := sorted(trials[option].unique()), [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(option)
    panels[0, 0].set_ylabel("loss on the text chosen by (nats per token)")
    panels[0, 0].legend(title="★: chosen; bars: s.d. over seeds")
    return figure
