"""A run that was stopped, however that happened, goes on as the same run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moepp.cli import main
from moepp.text.token_files import data_hash
from moepp.training.checkpoint import last_checkpoint, read_checkpoint, step_of, step_path
from moepp.training.module import LitMoE
from tests.conftest import RECIPES, assert_same, read_csv, tiny, without_speed


class PowerCut(Exception):
    pass


def test_resume_keeps_the_options_of_the_run(text_file: Path, workdir: Path) -> None:
    """What the recipe says by then does not matter; what the command line says is obeyed and written down."""
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=2", "--model.moe.tau=0.5"]) == 0
    run = Path("runs/moepp/1")
    before = (run / "config.yaml").read_text()
    recipe = f"--config={RECIPES / 'moepp.yaml'}"
    assert main(["fit", recipe, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    assert (run / "config.yaml").read_text() == before
    changed = set((run / "config.2.yaml").read_text().splitlines()) ^ set(before.splitlines())
    assert changed == {"  max_steps: 2", "  max_steps: 4"}
    assert [int(row["step"]) for row in read_csv(run)] == [1, 2, 3, 4]
    assert "trainer.max_steps=4 (was 2)" in (run / "train.log").read_text()
    for stranger in ("config.old.yaml", "configs.yaml"):
        (run / stranger).write_text("not ours")
    # the next time it goes on with what it had then
    assert main(["fit", recipe, "--ckpt_path=last", "--model.optim.lr=0.005"]) == 0
    third = yaml.safe_load((run / "config.3.yaml").read_text())
    assert third["trainer"]["max_steps"] == 4
    assert third["model"]["optim"]["lr"] == 0.005


def test_a_changed_learning_rate_is_obeyed(text_file: Path, workdir: Path) -> None:
    options = [*tiny(text_file), "--model.optim.min_lr=0.01"]  # constant after the warm-up
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    changed = ["--model.optim.lr=0.002", "--model.optim.min_lr=0.002", "--model.optim.weight_decay=0.3"]
    assert main(["fit", *options, *changed, "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
    run = Path("runs/moepp/1")
    assert [float(row["train/lr"]) for row in read_csv(run)] == pytest.approx([0.01] * 4 + [0.002] * 2)
    groups = read_checkpoint(step_path(run, 6))["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_another_text_is_refused_unless_it_is_meant(text_file: Path, workdir: Path, capsys) -> None:
    options = [*tiny(text_file), "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    prepared = next(Path("data/prepared").glob("small-*"))
    other = Path(shutil.copytree(prepared, "other"))
    meta = json.loads((other / "meta.json").read_text())
    before = meta["data_hash"]
    meta["files"]["train-00000.bin"]["sha256"] = 64 * "0"
    meta["data_hash"] = data_hash(meta)
    (other / "meta.json").write_text(json.dumps(meta))
    options += ["--data.path=other", "--trainer.max_steps=4", "--ckpt_path=last"]
    assert main(["fit", *options]) == 2
    message = capsys.readouterr().err
    assert "other (" in message
    assert f"hash {meta['data_hash'][:8]}) is not what the checkpoint was trained on, " in message
    assert f"hash {before[:8]})" in message
    assert main(["fit", *options, "--data.allow_other_text=true"]) == 0
    assert read_checkpoint(step_path(Path("runs/moepp/1"), 4))["moepp"]["data_hash"] == meta["data_hash"]


def test_tensorboard_forgets_what_a_resumed_run_logs_again(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny(text_file), "--trainer.max_steps=5", "--trainer.val_check_interval=3"]
    whole_step = LitMoE.training_step

    def cut(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        if self.trainer.global_step == 4:
            raise PowerCut
        return whole_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitMoE, "training_step", cut)
        with pytest.raises(PowerCut):
            main(["fit", *options])
    time.sleep(1)  # event files are read in the order of their names, in which there is the second
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    events = EventAccumulator("runs/moepp/1/tensorboard")
    events.Reload()
    rows = read_csv(Path("runs/moepp/1"))
    for name in ("train/cross_entropy", "val/loss"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in logged] == [int(row["step"]) for row in rows if row[name]]


@pytest.mark.parametrize(
    ("cut", "step", "accumulate", "workers", "batch_size"),
    [
        ("power", 8, 1, 0, 4),
        ("power", 8, 3, 2, 4),
        ("SIGTERM", 8, 3, 0, 4),
        ("SIGINT", 8, 1, 0, 4),
        ("SIGTERM", 6, 3, 0, 4),
        ("power", 8, 1, 2, 112),  # an epoch ends with step 7
        ("SIGTERM", 7, 1, 0, 112),
        ("power", 8, 3, 0, 48),  # and here after 16 batches, of which 15 make up 5 steps
    ],
)
def test_a_resumed_run_is_the_same_run(
    text_file: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
    step: int,
    accumulate: int,
    workers: int,
    batch_size: int,
) -> None:
    """Stopped in the middle of an accumulation and continued: the same run, bit for bit.

    Without power it goes on from the checkpoint of step 6; a signal still lets its step end and be saved. After
    step 6 a validation is due.
    """
    options = [*tiny(text_file), "--trainer.max_steps=10", f"--trainer.accumulate_grad_batches={accumulate}"]
    options += [f"--trainer.val_check_interval={3 * accumulate}", f"--data.num_workers={workers}"]
    options += ["--trainer.log_every_n_steps=3", f"--data.batch_size={batch_size}", "--model.moe.ffn_budget=1.2"]
    assert main(["fit", *options]) == 0

    whole_step = LitMoE.training_step

    def step_until_the_cut(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        if self.trainer.fit_loop.total_batch_idx == (step - 1) * accumulate + accumulate // 2:
            if cut == "power":
                raise PowerCut
            os.kill(os.getpid(), getattr(signal, cut))
        return whole_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitMoE, "training_step", step_until_the_cut)
        with pytest.raises((PowerCut, SystemExit)) as stopped:
            main(["fit", *options])
    if cut != "power":
        assert stopped.value.code == {"SIGINT": 130, "SIGTERM": 143}[cut]
    saved = last_checkpoint(Path("runs/moepp/2"))
    assert saved is not None
    assert step_of(saved) == (6 if cut == "power" else step)
    assert main(["fit", *options, "--ckpt_path=last"]) == 0

    whole, resumed = (read_checkpoint(step_path(Path(f"runs/moepp/{n}"), 10)) for n in (1, 2))
    assert whole["global_step"] == resumed["global_step"] == 10
    assert_same(resumed["state_dict"], whole["state_dict"])
    assert_same(resumed["optimizer_states"][0]["state"], whole["optimizer_states"][0]["state"])
    rows = [without_speed(workdir / f"runs/moepp/{n}") for n in (1, 2)]
    assert [row["step"] for row in rows[0]] == ["3", "6", "9", "10"]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("cut", ["power", "SIGTERM"])
def test_a_run_that_was_cut_after_its_last_step_has_its_end_before_it(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """By power while its budget is set, or by a signal before the last validation. Once more, and it stays."""
    options = [*tiny(text_file), "--trainer.max_steps=6", "--trainer.val_check_interval=3"]
    options += ["--model.moe.ffn_budget=0.7"]
    assert main(["fit", *options]) == 0
    whole_step = LitMoE.training_step

    def told_in_the_last_step(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        if self.trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(self, batch, batch_idx)

    def no_power(self: LitMoE) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        if cut == "power":
            patch.setattr(LitMoE, "on_train_end", no_power)
        else:
            patch.setattr(LitMoE, "training_step", told_in_the_last_step)
        with pytest.raises((PowerCut, SystemExit)):
            main(["fit", *options])
    runs = [Path(f"runs/moepp/{n}") for n in (1, 2)]
    for _ in range(2):
        assert main(["fit", *options, "--ckpt_path=last"]) == 0
        for path in ("step-00000006.ckpt", "best.ckpt"):
            assert_same(*(read_checkpoint(run / "checkpoints" / path)["state_dict"] for run in reversed(runs)))
        assert without_speed(runs[0]) == without_speed(runs[1])


def test_no_step_to_go_costs_no_checkpoint(text_file: Path, workdir: Path) -> None:
    options = [*tiny(text_file), "--trainer.default_root_dir=run"]
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    earlier = f"--ckpt_path={step_path(Path('run'), 2)}"
    assert main(["fit", *options, "--trainer.max_steps=2", earlier]) == 0
    assert step_path(Path("run"), 4).exists()
    assert main(["fit", *options, "--trainer.max_steps=4", "--trainer.limit_train_batches=0", earlier]) == 0
    assert step_path(Path("run"), 4).exists()


def test_an_error_of_the_training_is_not_blamed_on_the_checkpoint(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny(text_file)
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0

    def broken(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(LitMoE, "training_step", broken)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        main(["fit", *options, "--trainer.max_steps=3", "--ckpt_path=last"])


def test_a_finished_run_resumed_keeps_its_metrics(text_file: Path, workdir: Path, capsys) -> None:
    options = [*tiny(text_file), "--trainer.max_steps=5", "--trainer.val_check_interval=2"]
    assert main(["fit", *options]) == 0
    before = read_csv(Path("runs/moepp/1"))
    said = capsys.readouterr().out
    for step, row in ((2, before[1]), (4, before[3])):
        assert f"validated after step {step}: {float(row['val/loss']):.3f} nats" in said
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert "finished at step 5 already: a larger --trainer.max_steps goes on" in capsys.readouterr().out
    assert read_csv(Path("runs/moepp/1")) == before


def test_tokens_are_counted_where_the_batch_size_changes(text_file: Path, workdir: Path) -> None:
    options = [*tiny(text_file), "--data.batch_size=4"]
    assert main(["fit", *options, "--trainer.max_steps=3"]) == 0
    resumed = ["--data.batch_size=8", "--trainer.max_steps=5", "--ckpt_path=last"]
    assert main(["fit", *options, *resumed]) == 0
    rows = read_csv(Path("runs/moepp/1"))
    assert [float(row["train/tokens"]) / 32 for row in rows] == [4, 8, 12, 20, 28]
