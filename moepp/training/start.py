"""What a run starts from, where its weights are not drawn: a checkpoint's weights, experts that were added to
these (model/conversion.py) and are let in step by step, and a teacher to stay close to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepp.model import InputError, Transformer, TransformerConfig
from moepp.model.config import require
from moepp.model.sharding import as_shards
from moepp.training.checkpoint import differing, load, read_rest


@dataclass(frozen=True)
class ConvertConfig:
    """How the experts that `moepp convert` has added are let in: the bias on their scores rises to 0.

    Args:
        start: the bias of the first step. At -4 they have a fiftieth of the probability they will have.
        steps: optimizer steps until it is 0, in equal parts; null: a fifth of the run's.
    """

    start: float = -4.0
    steps: int | None = None

    def __post_init__(self) -> None:
        require(self.start <= 0, "convert.start", self.start, "must not be positive")
        require(self.steps is None or self.steps >= 0, "convert.steps", self.steps, "must not be negative")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: loss = (1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student).

    Args:
        teacher: a checkpoint with the same tokenizer, such as the one that was converted; null is off.
        weight: of the teacher's part, from 0 to 1.
        temperature: T, what both sides' logits are divided by.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, "distill.weight", self.weight, "must be between 0 and 1")
        require(self.temperature > 0, "distill.temperature", self.temperature, "must be positive")


def described_in(path: str) -> dict[str, dict[str, Any]]:
    """The configurations of a checkpoint's model, as `--model.transformer` and `--model.moe` take them."""
    meta = read_rest(path)["moepp"]
    return {part: meta[part] for part in ("transformer", "moe")}


def start_from(model: Transformer, path: str, tokenizer_json: str) -> list[str]:
    """Give `model` the checkpoint's weights. Returns what it does otherwise than the checkpoint's model.

    Raises:
        InputError: the checkpoint's model is of another shape, or has another tokenizer.
    """
    loaded = load(path)
    require_tokenizer("init_from", path, loaded.meta, tokenizer_json)
    configs = [(one.config, one.moe_config) for one in (loaded.model, model)]
    named = [f"{key}={new} (the checkpoint's is {old})" for key, old, new in differing(*configs)]
    state = loaded.model.state_dict()
    own = model.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    if shapes != {name: value.shape for name, value in own.items()}:
        raise InputError(f"model.init_from: {path} is of another shape: {', '.join(named)}")
    model.load_state_dict({name: as_shards(value, own[name]) for name, value in state.items()})
    return named


def require_tokenizer(option: str, path: str, meta: dict[str, Any], tokenizer_json: str) -> None:
    """Raise an InputError for a checkpoint of another tokenizer than the text's; one without any is taken."""
    if meta["tokenizer"] not in (None, tokenizer_json):
        raise InputError(
            f"model.{option}: {path} has another tokenizer than data.path was prepared with: give the text with "
            "--data.tokenizer=TOKENIZER.json, its own"
        )


class Teacher:
    """A frozen model, no part of the module that it teaches."""

    def __init__(self, path: str, student: TransformerConfig, tokenizer_json: str) -> None:
        loaded = load(path)
        require_tokenizer("distill.teacher", path, loaded.meta, tokenizer_json)
        self.model = loaded.model.requires_grad_(False)
        config = self.model.config
        self.configs = config, self.model.moe_config
        require(
            config.vocab_size == student.vocab_size,
            "model.distill.teacher",
            config.vocab_size,
            f"must have the student's vocab_size={student.vocab_size}",
        )
        require(
            config.context_length >= student.context_length,
            "model.distill.teacher",
            config.context_length,
            f"must have a context_length of {student.context_length} at least",
        )

    @torch.no_grad()
    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) what its head receives, and (V, D) the head's weight."""
        return self.model.hidden(tokens_BS)[0].flatten(0, 1), self.model.head.weight
