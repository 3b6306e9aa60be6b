"""The bias that keeps added experts silent, and how it rises while transformers' Trainer trains."""

from typing import Any

from transformers import TrainerCallback

from moepp.model.conversion import bias_at, set_bias


class BiasSchedule(TrainerCallback):
    """From `start` to 0 over the first `steps` optimizer steps. Without it nobody is ever sent to an added expert.

    Args:
        start: the first step's bias, low enough that few choose an added expert, not none.
        steps: when it has come to 0; a fifth of the training, say.
    """

    def __init__(self, steps: int, start: float = -4.0) -> None:
        self.start = start
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_bias(kwargs["model"], bias_at(state.global_step, self.start, self.steps))
