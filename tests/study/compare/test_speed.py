"""What is timed: the step that training takes, in its precision."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from moepp.study.compare import speed
from moepp.study.compare.matrix import Variant
from moepp.study.timing import TrainingStep
from tests.study.compare.test_results import SIZES, VANILLA

CPU = torch.device("cpu")


def variant(accumulate: int = 1, precision: str | None = None, checkpoint_activations: bool = False) -> Variant:
    options = {
        "model": {
            "transformer": SIZES,
            "moe": VANILLA,
            "compile": False,
            "checkpoint_activations": checkpoint_activations,
            "init_from": None,
            "distill": {"teacher": None},
        },
        "data": {"vocab_size": 320, "seq_len": 6, "batch_size": 5},
        "trainer": {"accelerator": "cpu", "accumulate_grad_batches": accumulate, "precision": precision},
    }
    return Variant("vanilla", lambda **last: options)


def timed(precision: str) -> speed.TimedModel:
    tokens_BS = torch.randint(320, (5, 6))
    return speed.TimedModel(variant(), {"inputs": tokens_BS, "targets": tokens_BS}, precision, CPU)


def test_a_ratio_by_hand() -> None:
    rounds = [[1.0, 2.0], [1.0, 3.0], [2.0, 2.0], [1.0, 5.0], [1.0, 4.0]]
    assert speed.ratio("x", rounds) == {"x": 3.0, "x_lower_quartile": 2.0, "x_upper_quartile": 4.0}


@pytest.mark.parametrize(
    ("precision", "weights", "products"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_it_is_timed_in_the_precision_of_training(
    precision: str, weights: torch.dtype, products: torch.dtype
) -> None:
    model = timed(precision)
    attention = model.lit.model.blocks[0].attention
    linear = next(module for module in attention.modules() if isinstance(module, torch.nn.Linear))
    seen: list[torch.dtype] = []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.training_step()
    model.expert_forward()()
    assert {parameter.dtype for parameter in model.lit.parameters()} == {weights}
    assert set(seen) == {products}


def test_a_planned_step_is_the_median_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, int]] = []

    def rounds(functions, device, least, seconds):  # type: ignore[no-untyped-def]
        asked.append((type(functions[0]), least))
        return [[5.0], [1.0], [2.0]]

    monkeypatch.setattr(speed, "in_turn", rounds)
    assert speed.step_seconds(variant(accumulate=4)) == 8.0
    assert asked == [(TrainingStep, 3)]


def test_a_planned_step_is_in_the_runs_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def rounds(functions, device, **_):  # type: ignore[no-untyped-def]
        seen.append(next(functions[0].model.parameters()).dtype)
        return [[1.0]]

    monkeypatch.setattr(speed, "in_turn", rounds)
    for precision in (None, "bf16-true"):
        speed.step_seconds(variant(precision=precision))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("again", [False, True])
def test_what_training_computes_a_second_time_is_timed_too(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def rounds(functions, device, **_):  # type: ignore[no-untyped-def]
        first = functions[0].model.model.blocks[0]
        first.moe.register_forward_pre_hook(lambda *_: passes.append(1))
        functions[0]()
        return [[1.0]]

    monkeypatch.setattr(speed, "in_turn", rounds)
    speed.step_seconds(variant(checkpoint_activations=again))
    assert len(passes) == 1 + again


def test_what_the_experts_receive_is_found_without_compiling() -> None:
    """With a hook that keeps it each layer would be compiled by itself, until torch gives up compiling."""
    model, compiler = timed("32-true"), CompileCounter()
    for block in model.lit.model.blocks:
        block.compile(backend=compiler)
    model.training_step()
    compiled = compiler.frame_count
    assert compiled > 0
    model.expert_forward()()
    assert compiler.frame_count == compiled
