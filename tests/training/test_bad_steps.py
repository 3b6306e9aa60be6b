"""A loss or gradient that is not finite: the step is skipped and counted, and too many in a row end the run."""

from pathlib import Path

import pytest
import torch

from moepp.cli import main
from moepp.training.checkpoint import load, read_checkpoint, step_path
from moepp.training.module import LitMoE
from tests.conftest import assert_same, read_csv, tiny


def spoil(monkeypatch: pytest.MonkeyPatch, what: str, steps: set[int]) -> None:
    """Make loss or gradient bad in the steps with these numbers (from 1)."""
    bad = torch.tensor(float("nan" if "nan" in what else "inf"))
    whole_step = LitMoE.training_step

    def training_step(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        outputs = whole_step(self, batch, batch_idx)
        spoilt = "loss" in what and self.trainer.global_step + 1 in steps
        return outputs | {"loss": outputs["loss"] * bad} if spoilt else outputs

    def on_after_backward(self: LitMoE) -> None:
        if "gradient" in what and self.trainer.global_step + 1 in steps:
            self.model.head.weight.grad[3, 5] = bad

    monkeypatch.setattr(LitMoE, "training_step", training_step)
    monkeypatch.setattr(LitMoE, "on_after_backward", on_after_backward)


@pytest.mark.parametrize("what", ["nan loss", "inf loss", "nan gradient", "inf gradient"])
def test_a_bad_step_changes_nothing_and_is_counted(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    options = [*tiny(text_file), "--checkpoints.keep=9", "--checkpoints.every_n_steps=1", "--trainer.max_steps=4"]
    spoil(monkeypatch, what, {3})
    assert main(["fit", *options]) == 0
    run = Path("runs/moepp/1")
    before, after, end = (read_checkpoint(step_path(run, step)) for step in (2, 3, 4))
    assert_same(after["state_dict"], before["state_dict"])
    assert_same(after["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"])
    assert all(value.isfinite().all() for value in end["state_dict"].values())
    assert any(not torch.equal(value, end["state_dict"][name]) for name, value in before["state_dict"].items())
    assert [row["train/skipped_steps"] for row in read_csv(run)] == ["0.0", "0.0", "1.0", "1.0"]


def test_too_many_in_a_row_end_the_run_with_what_reproduces_them(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a weight is so large that the loss of any batch overflows, so the dump alone is enough to see it."""
    whole_step = LitMoE.training_step

    def training_step(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        if self.trainer.global_step == 4:
            with torch.no_grad():
                self.model.head.weight[7] = 3e38
        return whole_step(self, batch, batch_idx)

    monkeypatch.setattr(LitMoE, "training_step", training_step)
    options = ["--trainer.max_steps=20", "--model.optim.max_bad_steps=3", "--trainer.accumulate_grad_batches=2"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *tiny(text_file), *options, "--trainer.val_check_interval=8"])
    assert "not finite in 3 steps in a row, up to step 7" in stopped.value.code
    dump = Path("runs/moepp/1/checkpoints/bad-step-00000007.ckpt")
    assert str(dump) in stopped.value.code
    assert "step-00000004.ckpt" in stopped.value.code
    assert not Path("runs/moepp/1/result.json").exists()
    model = load(dump).model
    batches = read_checkpoint(dump)["batches"]
    assert len(batches) == 2
    assert not all(model(batch["inputs"]).logits.isfinite().all() for batch in batches)


def test_a_good_step_before_the_next_row_does_not_hide_them(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "nan loss", {2, 3, 4})
    options = ["--trainer.max_steps=9", "--model.optim.max_bad_steps=3", "--trainer.log_every_n_steps=6"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *tiny(text_file), *options])
    assert "not finite in 3 steps in a row, before step 6" in stopped.value.code


def test_bad_steps_apart_do_not_end_the_run(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "nan loss", {2, 3, 5, 6})
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=8", "--model.optim.max_bad_steps=3"]) == 0


@pytest.mark.parametrize(
    "end",
    [
        ["--trainer.max_steps=5"],
        ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=5"],
    ],
)
def test_a_run_that_ends_before_metrics_are_due_is_looked_at_too(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, end: list[str]
) -> None:
    spoil(monkeypatch, "nan loss", {2, 3, 4, 5})
    options = [*end, "--trainer.log_every_n_steps=100", "--model.optim.max_bad_steps=3"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *tiny(text_file), *options])
    assert "not finite in 4 steps in a row, up to step 5" in stopped.value.code
    assert [row["step"] for row in read_csv(Path("runs/moepp/1")) if row["train/loss"]] == ["5"]
