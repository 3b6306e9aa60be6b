"""A picture of what was counted on a text: a table of numbers, a sentence and a drawing; and what they share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moepp.study.figures.findings import Bootstrap, Estimate
from moepp.study.figures.routing_stats import MIN_COUNT
from moepp.study.style import BLACK, KIND_COLOURS, interval_bars

Drawn = tuple[pd.DataFrame, str, Figure]

KIND_NAMES = {"ffn": "FFN", "const": "constant", "copy": "copy", "zero": "zero"}
PER_TOKEN = "FFN experts per token"


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        title: its heading.
        needs: keys of `lacking`; without one of them there is nothing to see.
        draw: the numbers, what is seen in them, and the drawing. Its name is that of the files.
    """

    title: str
    needs: tuple[str, ...]
    draw: Callable[[Bootstrap], Drawn]


def picture(title: str, *needs: str) -> Callable[[Callable[[Bootstrap], Drawn]], Picture]:
    """Make a Picture of the function that draws it."""
    return lambda draw: Picture(title, needs, draw)


def lacking(measured: Bootstrap) -> dict[str, str]:
    """What pictures need and this model or text does not have, and the reason to show."""
    counts, top_k = measured.counts, measured.counts.moe.top_k
    needs = {
        "kinds": (len(counts.kinds) > 1, f"vanilla MoE has FFN experts alone, so every token uses {top_k}"),
        "domains": (len(counts.domains) > 1, "there is one domain only"),
        "layers": (counts.n_layers > 1, "there is one layer only"),
        "tokens": (len(counts.frequent_tokens), f"no token occurs {MIN_COUNT} times"),
        "budgets": (counts.at_budgets is not None, "it was trained without a budget (model.moe.ffn_budget)"),
        "words": (measured.sums.class_n_DC.any(), "no word was tagged"),
    }
    return {need: why for need, (there, why) in needs.items() if not there}


def whiskers(axes: Axes, at: Any, estimate: Estimate, horizontal: bool = False, **style: Any) -> None:
    """An estimate as points with their intervals."""
    style = {"color": BLACK, "markersize": 4, "linewidth": 1.2, "capsize": 2.5, "zorder": 4} | style
    interval_bars(axes, at, estimate.value, estimate.low, estimate.high, horizontal, **style)


def ffn_by_name(axes: Axes, names: Sequence[str], ffn: Estimate, what: str = "", **style: Any) -> None:
    """FFN experts per token, listed from top to bottom."""
    whiskers(axes, range(len(names)), ffn, horizontal=True, **{"fmt": "o", "color": KIND_COLOURS["ffn"]} | style)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=PER_TOKEN + what)


def legend_of_kinds(figure: Figure, kinds: Iterable[str], **others: Any) -> None:
    """Above the panels: kinds of experts, and `others`, handles by name."""
    handles = {KIND_NAMES[kind]: Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in kinds} | others
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
