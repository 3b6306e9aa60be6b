"""What is measured on a text, and a picture of it: a table of numbers, a sentence and a drawing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moepp.study.figures.findings import Bootstrap
from moepp.study.figures.routing_stats import RoutingCounts, Scores


@dataclass(frozen=True)
class Measurements:
    """What was measured on one text.

    Attributes:
        scores: by checkpoint, first the one whose choices are counted.
        passage: token ids (S,) and FFN counts (S, L) of the text's beginning.
        texts_V: the text of each token.
        min_count: tokens that occur less often are left out of the picture by token.
    """

    counts: RoutingCounts
    scores: dict[str, Scores]
    passage: tuple[np.ndarray, np.ndarray]
    texts_V: list[str]
    min_count: int

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.counts)

    @property
    def domains(self) -> list[str]:
        return list(self.counts.passages.sums)

    @property
    def layers(self) -> range:
        """As people count them, from 1."""
        return range(1, self.counts.n_layers + 1)


Drawn = tuple[pd.DataFrame, str, Figure]
Obstacle = Callable[[Measurements], str]


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
    draw: Callable[[Measurements], Drawn]

    @property
    def stem(self) -> str:
        return self.draw.__name__

    def obstacle(self, measured: Measurements) -> str:
        """The first of the reasons against it."""
        return next(filter(None, (obstacle(measured) for obstacle in self.obstacles)), "")


def picture(name: str, title: str, *obstacles: Obstacle) -> Callable[[Callable[[Measurements], Drawn]], Picture]:
    """Make a Picture of the function that draws it."""
    return lambda draw: Picture(name, title, obstacles, draw)


def no_kinds(measured: Measurements) -> str:
    moe = measured.counts.moe
    return "" if moe.n_zero_computation else f"vanilla MoE has FFN experts alone, so every token uses {moe.top_k}"


def one_domain(measured: Measurements) -> str:
    return "there is one domain only" if len(measured.domains) == 1 else ""


def one_layer(measured: Measurements) -> str:
    return "there is one layer only" if len(measured.layers) == 1 else ""


def combinations(**columns: Sequence[Any]) -> pd.DataFrame:
    """A row for each combination of the columns' values, in the order of an array with these axes."""
    return pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Six digits; nothing where a number is unknown."""
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\r\n")
