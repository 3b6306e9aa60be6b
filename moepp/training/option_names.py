"""The sections of a run's options, and what a mistyped name may have meant."""

import difflib

SECTIONS = (
    "trainer",
    "model",
    "model.transformer",
    "model.moe",
    "model.optim",
    "model.parallel",
    "model.budget",
    "model.convert",
    "model.distill",
    "data",
    "checkpoints",
)


def did_you_mean(name: str, known: list[str]) -> str:
    """A question to end a message with, empty where nothing known resembles `name`."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
