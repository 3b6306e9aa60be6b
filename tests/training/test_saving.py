"""Which checkpoints a run keeps, and that it never writes over those of another."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest

from moepp.cli import main
from moepp.training.checkpoint import last_checkpoint, read_checkpoint, step_path
from moepp.training.module import LitMoE
from moepp.training.saving import Checkpoints
from tests.conftest import read_csv, refused, tiny, without_speed


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_ones_and_the_best_are_kept(text_file: Path, workdir: Path) -> None:
    options = ["--trainer.max_steps=8", "--checkpoints.keep=3", "--model.optim.warmup_steps=0"]
    assert main(["fit", *tiny(text_file), *options]) == 0
    run = Path("runs/moepp/1")
    assert names(run) == ["best.ckpt", "step-00000004.ckpt", "step-00000006.ckpt", "step-00000008.ckpt"]
    losses = {int(row["step"]): float(row["val/loss"]) for row in read_csv(run) if row["val/loss"]}
    assert read_checkpoint(run / "checkpoints/best.ckpt")["global_step"] == min(losses, key=losses.__getitem__)


def test_also_between_validations(text_file: Path, workdir: Path) -> None:
    options = ["--trainer.max_steps=7", "--trainer.val_check_interval=6", "--checkpoints.every_n_steps=3"]
    assert main(["fit", *tiny(text_file), *options, "--checkpoints.keep=9"]) == 0
    assert names(Path("runs/moepp/1")) == [
        "best.ckpt",
        *(f"step-0000000{step}.ckpt" for step in (3, 6, 7)),
    ]


def test_a_folder_with_a_run_in_it_is_refused(text_file: Path, workdir: Path, capsys) -> None:
    options = [*tiny(text_file), "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    run = Path("runs/moepp/1")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert f"{run} holds a run; go on with it" in refused(
        capsys, "fit", *options, f"--trainer.default_root_dir={run}"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("option", ["keep=0", "every_n_steps=0"])
def test_bad_options(text_file: Path, workdir: Path, capsys, option: str) -> None:
    assert f"checkpoints.{option.split('=')[0]}: must be at least 1" in refused(
        capsys, "fit", *tiny(text_file), f"--checkpoints.{option}"
    )


def stopped_in_a_validation(monkeypatch: pytest.MonkeyPatch, options: list[str], stage: str) -> list[int]:
    """SIGTERM comes with the first batch of a validation in this stage. The step of each batch that was begun."""
    whole_step = LitMoE.validation_step
    steps: list[int] = []

    def interrupted(self: LitMoE, batch: dict, batch_idx: int) -> None:
        steps.append(self.trainer.global_step)
        if self.trainer.state.fn == stage and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        whole_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitMoE, "validation_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *options])
    assert stopped.value.code == 143
    return steps


def test_a_signal_in_the_last_validation(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run leaves at once and says what is missing, which the one that goes on makes up for."""
    options = [*tiny(text_file), "--trainer.max_steps=2"]
    stopped_in_a_validation(monkeypatch, options, "validate")
    assert "stopped amid the last validation" in capsys.readouterr().out
    result = Path("runs/moepp/1/result.json")
    assert not result.exists()
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert result.exists()


def test_a_signal_does_not_wait_for_a_validation(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run leaves in the middle of it; the one that goes on validates from the start, with the same result."""
    options = [*tiny(text_file), "--trainer.max_steps=6", "--trainer.val_check_interval=3"]
    assert main(["fit", *options]) == 0
    assert stopped_in_a_validation(monkeypatch, options, "fit") == [3]
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    rows = [without_speed(Path(f"runs/moepp/{n}")) for n in (1, 2)]
    assert rows[0] == rows[1]
    assert rows[0][2]["val/loss"]
    best = [read_checkpoint(Path(f"runs/moepp/{n}/checkpoints/best.ckpt"))["global_step"] for n in (1, 2)]
    assert best[0] == best[1]
    assert step_path(Path("runs/moepp/2"), 3).is_file()


def test_a_full_disk_costs_no_checkpoint_of_a_run_that_logs_nothing(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Checkpoints.save

    def save(self: Checkpoints, trainer: L.Trainer, validation_due: bool = False) -> Path:
        if trainer.global_step == 4:
            raise OSError(28, "No space left on device")
        return whole(self, trainer, validation_due)

    monkeypatch.setattr(Checkpoints, "save", save)
    options = [*tiny(text_file), "--trainer.logger=false", "--checkpoints.every_n_steps=1"]
    assert main(["fit", *options, "--trainer.max_steps=6"]) == 2
    assert last_checkpoint(Path("runs/moepp/1")) == step_path(Path("runs/moepp/1"), 3)
