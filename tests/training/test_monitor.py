"""What is logged of a run, and when."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moepp.cli import main
from moepp.model import MoEConfig, TransformerConfig, flops_per_token
from moepp.training.bad_steps import BadSteps
from moepp.training.module import LitMoE
from moepp.training.monitor import Monitor, imbalance
from moepp.training.saving import Checkpoints
from tests.conftest import read_csv, tiny

SIZES = TransformerConfig(320, 2, 32, 48, 2, context_length=32, tie_embeddings=False)


def test_flops_are_three_forward_passes_with_the_experts_that_were_computed(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepp.training.monitor.peak_flops", lambda device, precision: 1e12)
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=3"]) == 0
    for row in read_csv(Path("runs/moepp/1")):
        forward = flops_per_token(SIZES, MoEConfig(), 32, float(row["routing/ffn_per_token"]))
        expected = 3 * forward * float(row["speed/tokens_per_second"])
        assert float(row["speed/tflops_per_second"]) == pytest.approx(expected / 1e12, rel=1e-6)
        assert float(row["speed/mfu"]) == pytest.approx(expected / 1e12, rel=1e-6)


def test_neither_a_validation_nor_its_checkpoint_counts_as_training(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation, save = LitMoE.validation_step, Checkpoints.save
    slept = 0.0

    def slow_validation(self: LitMoE, batch: dict, batch_idx: int) -> None:
        nonlocal slept
        slept += 100
        validation(self, batch, batch_idx)

    def slow_save(self: Checkpoints, *args: object) -> Path:
        nonlocal slept
        slept += 100
        return save(self, *args)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + slept)
    monkeypatch.setattr("moepp.training.monitor.time", clock)
    monkeypatch.setattr(LitMoE, "validation_step", slow_validation)
    monkeypatch.setattr(Checkpoints, "save", slow_save)
    options = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=3"]
    assert main(["fit", *tiny(text_file), *options, "--data.val_fraction=0.005"]) == 0
    _, after = read_csv(Path("runs/moepp/1"))
    assert slept >= 400  # two validations, and a checkpoint after each
    assert 3 * 4 * 32 / float(after["speed/tokens_per_second"]) < 1


def test_imbalance_is_of_the_layers_that_have_tokens() -> None:
    assert imbalance(torch.tensor([[3, 1, 2, 2], [5, 0, 0, 0], [0, 0, 0, 0]])) == pytest.approx((1.5 + 4) / 2)


def test_sums_are_reduced_on_the_device_and_are_left_as_they_are() -> None:
    """NCCL has nothing for a CPU, where counts are, and all of what a checkpoint gave back."""

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert value.device.type == "meta"
        return value.mul_(2)

    monitor = Monitor(BadSteps())
    monitor.sums = {"tokens": torch.tensor(3.0), "tokens_per_expert_LE": torch.ones(1, 2, dtype=torch.int64)}
    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("meta"))
    assert set(monitor.mean_sums(SimpleNamespace(strategy=strategy))) == set(monitor.sums)
    strategy.reduce, strategy.root_device = lambda value, reduce_op: value.mul_(2), torch.device("cpu")
    assert float(monitor.mean_sums(SimpleNamespace(strategy=strategy))["tokens"]) == 6.0
    assert float(monitor.sums["tokens"]) == 3.0


def test_a_run_resumed_between_two_rows_fills_every_column(text_file: Path, workdir: Path) -> None:
    options = [*tiny(text_file), "--trainer.log_every_n_steps=3", "--checkpoints.every_n_steps=1"]
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=9", "--ckpt_path=last"]) == 0
    rows = [row for row in read_csv(Path("runs/moepp/1")) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["3", "4", "7", "9"]
    assert all(row["train/skipped_steps"] == "0.0" for row in rows)
