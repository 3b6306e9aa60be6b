"""What the drawings share: points with intervals, lists of them, the legend of expert kinds, small PNGs."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from moepp.study.figures.findings import Estimate
from moepp.study.style import BLACK, KIND_COLOURS, interval_bars

KIND_NAMES = {"ffn": "FFN", "const": "constant", "copy": "copy", "zero": "zero"}
FFN_COLOUR = KIND_COLOURS["ffn"]
PER_TOKEN = "FFN experts per token"


def whiskers(axes: Axes, at: Any, estimate: Estimate, horizontal: bool = False, **style: Any) -> None:
    """An estimate as points with their intervals."""
    style = {"color": BLACK, "markersize": 4, "linewidth": 1.2, "capsize": 2.5, "zorder": 4} | style
    interval_bars(axes, at, estimate.value, estimate.low, estimate.high, horizontal, **style)


def whiskers_by_name(axes: Axes, names: Sequence[str], estimate: Estimate, **style: Any) -> None:
    """The same of a list, from top to bottom."""
    whiskers(axes, range(len(names)), estimate, horizontal=True, **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def legend_of_kinds(figure: Figure, kinds: Iterable[str], **others: Any) -> None:
    """Above the panels: kinds of experts, and `others`, handles by name."""
    handles = {KIND_NAMES[kind]: Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in kinds} | others
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))


def save_small(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours: a third of the bytes, and no difference to see."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
