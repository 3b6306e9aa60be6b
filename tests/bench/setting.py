"""Where and at which sizes the bench measures, and the rows that it measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moepp.model import MoEConfig, TransformerConfig
from moepp.study.timing import in_turn, quartiles
from moepp.system.machine import product_dtype

RECIPES = Path(__file__).parents[2] / "recipes"
VANILLA = MoEConfig(n_zero=0, n_copy=0, n_const=0, gating_residual=False)


@dataclass(frozen=True)
class Sizes:
    """A layer on `n_tokens` tokens, and a model on `batch_size` sequences.

    Args:
        transformer: the model; D and H are the layer's as well.
        n_tokens: T of the layer.
        batch_size: B of the model; S is its context length.
        calls: of a function between two looks at the clock. A GPU works off what the host has queued; waiting for
            each call would measure the host.
    """

    transformer: TransformerConfig
    n_tokens: int
    batch_size: int
    calls: int = 1


def model_of(*sizes: int) -> TransformerConfig:
    """V, L, D, H, heads, S. Weights are drawn larger than for training: beside what copy experts write, parity
    would not see the outputs of FFN experts."""
    V, n_layers, D, H, n_heads, S = sizes
    return TransformerConfig(V, n_layers, D, H, n_heads, context_length=S, tie_embeddings=False, init_std=D**-0.5)


# The head takes about the share of the FLOPs that it has in the paper's 0.6B, which has 12 layers and V = 65,536.
SIZES = {
    "toy": Sizes(model_of(320, 2, 32, 48, 2, 16), n_tokens=256, batch_size=2),
    "cpu": Sizes(model_of(8192, 4, 256, 688, 4, 256), n_tokens=8192, batch_size=8),
    "paper": Sizes(model_of(8192, 2, 768, 2048, 12, 256), n_tokens=2048, batch_size=8),  # its layer, for a CPU
    "gpu": Sizes(model_of(24576, 4, 768, 2048, 12, 2048), n_tokens=32768, batch_size=8, calls=10),
}


FORWARD, BOTH = "forward", "forward + backward"  # passes


class Case(NamedTuple):
    """What a row is of; targets are looked up by it.

    Attributes:
        section: of the table.
        subject: a configuration, a model, a pair of these.
        passes: FORWARD or BOTH, where a section has rows of each.
        limit: what the subject is held against, where a section has several.
    """

    section: str
    subject: str
    passes: str = ""
    limit: str = ""

    @property
    def name(self) -> str:
        return ", ".join(part for part in self[1:] if part)


@dataclass(frozen=True)
class Row:
    """One line of the table. What could not be measured has no value and a note that says why.

    Attributes:
        ideal: the value if nothing but FFN experts took time.
        paper: the share of the ideal that the paper reached.
        x: τ, or the number of what the time grows with, where the value is a point of a curve in the picture.
        ours: whether the model is, where the value is a bar among other models' in the picture.
    """

    case: Case
    unit: str = ""
    value: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    ideal: float | None = None
    paper: float | None = None
    x: float | None = None
    ours: bool | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """Of the ideal."""
        return self.value / self.ideal if self.value is not None and self.ideal is not None else None


def measured(case: Case, unit: str, values: Sequence[float], **more: Any) -> Row:
    """The median of a value by round, and its quartiles."""
    lower, median, upper = quartiles(values)
    return Row(case, unit, median, (lower, upper), len(values), **more)


@dataclass(frozen=True)
class Setting:
    """Where, how large and how long."""

    sizes: Sizes
    device: torch.device
    rounds: int  # at least
    seconds: float  # at least, for one row's functions
    precision: str = "32-true"  # of training steps; a layer by itself is in the dtype of their products

    @property
    def dtype(self) -> torch.dtype:
        return product_dtype(self.precision)

    @property
    def kind(self) -> str:
        """What aims there are for: gpu, cpu, cpu_bf16."""
        if self.device.type == "cuda":
            return "gpu"
        return "cpu" if self.dtype == torch.float32 else "cpu_bf16"

    def time(self, functions: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Seconds of one call of each function, by round."""
        calls = self.sizes.calls

        def repeat(function: Callable[[], object]) -> None:
            for _ in range(calls):
                function()

        repeated = [partial(repeat, function) for function in functions]
        rounds = in_turn(repeated, self.device, self.rounds, self.seconds)
        return [[seconds / calls for seconds in one] for one in rounds]

    def autocast(self) -> torch.autocast:
        """As `moepp fit` trains in this precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision == "bf16-mixed")

    def compile(self, module: nn.Module) -> None:
        """As in the recipes for GPUs; a CPU is not compiled for (recipes/results/LOG.md)."""
        if self.device.type == "cuda":
            module.compile()
