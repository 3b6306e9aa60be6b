"""Rounds, quartiles and the timed training step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moepp.study.timing import TrainingStep, in_turn, quartiles

CPU = torch.device("cpu")


def test_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]

    def fast() -> None:
        calls.append("fast")
        clock[0] += 2

    def slow() -> None:
        calls.append("slow")
        clock[0] += 8

    monkeypatch.setattr("moepp.study.timing.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rounds = in_turn([fast, slow], CPU, 5, 0.0)
    assert rounds == [[2.0, 8.0]] * 5
    assert calls[:8] == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]


def test_quartiles_by_hand() -> None:
    assert quartiles([4.0, 1.0, 3.0, 5.0, 2.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_step_clips_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    norms: list[float] = []

    def clip(parameters, max_norm):  # type: ignore[no-untyped-def]
        norms.append(max_norm)
        return torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, torch.tensor(1.0))

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    step = TrainingStep(model, lambda: model(torch.ones(2, 3)).sum(), torch.autocast("cpu", enabled=False))
    step()
    assert norms == [1.0]
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
