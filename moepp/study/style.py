"""How every picture of a study looks. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLACK, BLUE, ORANGE, GREEN, PINK, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
COLOURS = [BLACK, BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", GREY]
KIND_COLOURS = {"ffn": BLUE, "const": "#E69F00", "copy": GREEN, "zero": "#BBBBBB"}  # of experts, everywhere
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def interval_bars(
    axes: Axes, at: Any, value: Any, low: Any, high: Any, horizontal: bool = False, **style: Any
) -> None:
    """Points with their intervals; an interval of the basic bootstrap may lie beside its point."""
    error = np.maximum(0, [value - low, high - value]).reshape(2, -1)
    if horizontal:
        axes.errorbar(value, at, xerr=error, **style)
    else:
        axes.errorbar(at, value, yerr=error, **style)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
