"""The bench's picture: bench.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from moepp.study.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE, interval_bars, save
from tests.bench.setting import BOTH, FORWARD, Row

COLOURS = {FORWARD: ORANGE, BOTH: BLUE}


def bench(path: Path, rows: Sequence[Row]) -> None:
    """Four panels: speed-up by τ, share of the limit, tokens/s of training steps, growth."""
    with plt.rc_context(STYLE):
        figure, ((by_tau, steps), (limits, growth)) = plt.subplots(2, 2, figsize=(12, 8))
        measured = [row for row in rows if row.value is not None]
        for passes, colour in COLOURS.items():
            chosen = [row for row in measured if row.case.section == "tau" and row.case.passes == passes]
            points(by_tau, chosen, colour, passes)
        taus = [row.x for row in chosen]
        by_tau.plot(taus, [row.ideal for row in chosen], color=GREY, linestyle="--", label="ideal")
        paper = [row.paper * row.ideal for row in chosen if row.paper and row.ideal]
        by_tau.plot(taus, paper, color=PINK, linestyle=":", marker="s", label="paper, 0.6B (forward)")
        by_tau.set_yscale("log")
        by_tau.set_yticks([1, 1.5, 2, 3, 4, 6], ["1×", "1.5×", "2×", "3×", "4×", "6×"])
        by_tau.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        by_tau.set_xlabel("τ")
        by_tau.set_title("layer: speed-up over vanilla MoE")

        chosen = [row for row in measured if row.case.section == "step" and row.ours is not None]
        bars(steps, chosen, [GREEN if row.ours else GREY for row in chosen])
        steps.set_title("training step: tokens/s")
        chosen = [row for row in measured if row.case.section == "layer"]
        bars(limits, chosen, [COLOURS[row.case.passes] for row in chosen])
        limits.set_title("layer: share of its limit")

        for section, colour in (("tokens", BLACK), ("experts", BLUE), ("constants", PINK)):
            chosen = [row for row in measured if row.case.section == section and row.x is not None]
            points(growth, sorted(chosen, key=lambda row: row.x or 0), colour, section)
        growth.set_xscale("log", base=2)
        growth.set_xticks([1, 4, 16, 64, 1024, 4096, 16384], ["1", "4", "16", "64", "1k", "4k", "16k"])
        growth.set_ylim(bottom=0)
        growth.set_title("layer: relative time by size")
        growth.set_xlabel("number (of tokens: relative time per token)")
        for axes in (by_tau, growth):
            axes.legend()
        for axes in figure.axes:
            if np.isinf(axes.dataLim.get_points()).any():  # left out, by --only
                axes.remove()
        limits.axvline(1, color=BLACK, linewidth=1)
        save(figure, path)


def points(axes: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
    """Medians with quartiles."""
    x = [row.x for row in rows]
    middle = np.array([row.value for row in rows], dtype=float)
    lower, upper = np.array([row.quartiles for row in rows], dtype=float).reshape(-1, 2).T
    style: dict[str, Any] = {"color": colour, "marker": "o", "capsize": 3, "linewidth": 2}
    interval_bars(axes, x, middle, lower, upper, label=label, **style)


def bars(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    """Medians with quartiles, from top to bottom."""
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        assert row.value is not None
        assert row.quartiles is not None
        lower, upper = row.quartiles
        axes.barh(y, row.value, color=colour, xerr=[[row.value - lower], [upper - row.value]], capsize=2)
    axes.set_yticks(range(len(rows)), [row.case.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
