"""How a run comes to its budget (model/budget.py), and by how much text it sets that of evaluation."""

from dataclasses import dataclass

from moepp.model.config import require

CALIBRATION_TOKENS = 1 << 19  # at most: more did not make a budget of 0.2 more exact (recipes/results/LOG.md)


@dataclass(frozen=True)
class BudgetConfig:
    """How `moe.ffn_budget` is reached.

    Args:
        start: FFN experts per token of the first step, from there in equal parts; null: `moe.ffn_budget` at once.
        steps: optimizer steps that this takes; null: half of the run's.
    """

    start: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps > 0, "budget.steps", self.steps, "must be positive")

    def at(self, step: int, total_steps: int, end: float) -> float:
        """The budget of optimizer step `step` (from 0) of `total_steps`."""
        steps = self.steps or max(1, total_steps // 2)
        return end if self.start is None or step >= steps else self.start + (end - self.start) * step / steps


def calibration_tokens(training_tokens: int) -> int:
    """Of the end of the training, read again to set a budget by: a quarter costs a twentieth of training."""
    return min(training_tokens // 4, CALIBRATION_TOKENS)
