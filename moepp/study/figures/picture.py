"""A picture of what was counted on a text: a table of numbers, a sentence and a drawing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from moepp.study.figures.findings import Bootstrap

Drawn = tuple[pd.DataFrame, str, Figure]
Obstacle = Callable[[Bootstrap], str]


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: what it is called where it is not drawn.
        title: its heading.
        obstacles: each gives a reason why there is nothing to see, or "".
        draw: the numbers, what is seen in them, and the drawing. Its name is that of the files.
    """

    name: str
    title: str
    obstacles: tuple[Obstacle, ...]
    draw: Callable[[Bootstrap], Drawn]

    @property
    def stem(self) -> str:
        return self.draw.__name__

    def obstacle(self, measured: Bootstrap) -> str:
        """The first of the reasons against it."""
        return next(filter(None, (obstacle(measured) for obstacle in self.obstacles)), "")


def picture(name: str, title: str, *obstacles: Obstacle) -> Callable[[Callable[[Bootstrap], Drawn]], Picture]:
    """Make a Picture of the function that draws it."""
    return lambda draw: Picture(name, title, obstacles, draw)


def no_kinds(measured: Bootstrap) -> str:
    moe = measured.counts.moe
    return "" if moe.n_zero_computation else f"vanilla MoE has FFN experts alone, so every token uses {moe.top_k}"


def one_domain(measured: Bootstrap) -> str:
    return "there is one domain only" if len(measured.counts.domains) == 1 else ""


def one_layer(measured: Bootstrap) -> str:
    return "there is one layer only" if len(measured.counts.layers) == 1 else ""


def combinations(**columns: Sequence[Any]) -> pd.DataFrame:
    """A row for each combination of the columns' values, in the order of an array with these axes."""
    return pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Six digits; nothing where a number is unknown."""
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\r\n")
