"""`moepp fit` from end to end on a small text: what it learns, writes, logs and refuses."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moepp.cli import main
from moepp.training.checkpoint import last_checkpoint, load_model, read_checkpoint, step_of, step_path
from moepp.training.module import LitMoE
from tests.conftest import RECIPES, tiny


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which 60 steps have been run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--trainer.max_steps=60", "--trainer.val_check_interval=20", "--model.moe.capacity_factor=1.1"]
        assert main(["fit", *tiny(text_file), *options]) == 0
    return folder


def test_loss_falls_to_a_stated_value(trained: Path) -> None:
    """From ln 320 = 5.8 to below 2.2 nats in 60 steps (it was 1.55 when this was written)."""
    rows = read_csv(trained / "runs/moepp/1")
    assert float(rows[0]["train/cross_entropy"]) > 5.5
    result = json.loads((trained / "runs/moepp/1/result.json").read_text())
    assert result["final/loss"] < 2.2
    assert result["final/perplexity"] == pytest.approx(torch.tensor(result["final/loss"]).exp().item(), rel=1e-4)
    assert 0 < result["final/bits_per_byte"] < 2
    assert result["final/bits_per_byte/small"] == pytest.approx(result["final/bits_per_byte"])


def test_metrics_agree_with_each_other_and_between_loggers(trained: Path) -> None:
    run = trained / "runs/moepp/1"
    rows = read_csv(run)
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    for row in rows:
        value = {name: float(text) for name, text in row.items() if text}
        assert value["train/loss"] == pytest.approx(
            value["train/cross_entropy"] + 0.3 * value["train/balance"], abs=1e-5
        )
        shares = [value[f"routing/share/{kind}"] for kind in ("ffn", "const", "copy", "zero")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        computed = value["routing/ffn_per_token"]  # what is dropped was chosen, but is not computed
        assert computed <= 2 * shares[0] + 1e-6
        assert computed >= 2 * (shares[0] - value["train/dropped"]) - 1e-6
        assert value["routing/imbalance"] >= 1
        assert value["train/tokens"] == value["step"] * 4 * 32
        assert value["train/gradient_norm"] > 0
    assert any(float(row["train/dropped"]) > 0 for row in rows)
    assert sum(row["val/loss"] != "" for row in rows) == 3
    assert float(rows[0]["train/lr"]) == pytest.approx(
        0.01
    )  # the rate of the step to come, after 1 of 2 to warm up

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    logged = {name for name in rows[-1] if name != "step"}
    assert logged <= set(events.Tags()["scalars"])
    for name in logged:
        in_csv = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        in_tensorboard = {event.step: event.value for event in events.Scalars(name)}
        assert in_tensorboard == pytest.approx(in_csv, rel=1e-6), name


def test_a_run_leaves_everything_in_its_folder(trained: Path) -> None:
    run = trained / "runs/moepp/1"
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.csv", "result.json", "tensorboard", "train.log"}
    log = (run / "train.log").read_text()
    assert "step 60/60" in log
    assert "bits per byte" in log
    assert "small: " in log  # the sample
    model, tokenizer = load_model(run / "checkpoints/step-00000060.ckpt")
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("every token").ids) == "every token"
    assert model.config.vocab_size == 320
    assert torch.load(run / "checkpoints/step-00000060.ckpt", weights_only=True)["global_step"] == 60


def test_resolved_config_runs_again_and_never_collides(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    config = str(trained / "runs/moepp/1/config.yaml")
    before = (trained / "runs/moepp/1/metrics.csv").read_bytes()
    assert main(["fit", "--config", config, "--trainer.max_steps=2"]) == 0
    first, again = read_csv(trained / "runs/moepp/1"), read_csv(trained / "runs/config/1")
    assert first[0]["train/cross_entropy"] == again[0]["train/cross_entropy"]
    assert (trained / "runs/moepp/1/metrics.csv").read_bytes() == before


def test_generate(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    texts = []
    for _ in range(2):
        assert (
            main(
                [
                    "generate",
                    "--ckpt=runs/moepp/1/checkpoints/step-00000060.ckpt",
                    "--prompt",
                    "every token",
                    "--max_new_tokens=12",
                ]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("every token to")


def test_validate_and_test_print_the_final_metrics(trained: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    result = json.loads((trained / "runs/moepp/1/result.json").read_text())
    for verb in ("validate", "test"):
        config, ckpt = "runs/moepp/1/config.yaml", "runs/moepp/1/checkpoints/step-00000060.ckpt"
        assert main([verb, "--config", config, "--ckpt_path", ckpt]) == 0
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("final/"))
        assert float(printed["final/loss"]) == pytest.approx(result["final/loss"], abs=1e-4)


def test_vanilla_differs_in_nothing_but_the_switches(capsys: pytest.CaptureFixture[str]) -> None:
    configs = []
    for recipe in ("moepp.yaml", "vanilla.yaml"):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={RECIPES / recipe}", "--print_config"])
        configs.append(capsys.readouterr().out.splitlines())
    different = {tuple(map(str.strip, pair)) for pair in zip(*configs, strict=True) if pair[0] != pair[1]}
    assert different == {
        ("base: null", "base: moepp.yaml"),
        ("n_zero: 1", "n_zero: 0"),
        ("n_copy: 1", "n_copy: 0"),
        ("n_const: 2", "n_const: 0"),
        ("gating_residual: true", "gating_residual: false"),
    }


def test_accumulation_and_precision(text_file: Path, workdir: Path) -> None:
    """Two micro-batches a step give the metrics of one batch of twice the size; bf16 stays close to float32.

    Without L_b, that is: a product of means over a batch is not the mean of the products over its halves.
    """
    runs = {
        "whole": ["--data.batch_size=8"],
        "accumulated": ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2"],
        "half": ["--data.batch_size=8", "--trainer.precision=bf16-mixed"],
    }
    rows = {}
    for name, options in runs.items():
        options.append("--model.moe.balance_weight=0")
        options += [
            "--trainer.max_steps=3",
            f"--trainer.default_root_dir={name}",
            "--trainer.val_check_interval=100",
        ]
        assert main(["fit", *tiny(text_file), *options]) == 0
        rows[name] = [{key: float(text) for key, text in row.items() if text} for row in read_csv(workdir / name)]
    for whole, accumulated, half in zip(*rows.values(), strict=True):
        assert accumulated["train/tokens"] == whole["train/tokens"]
        assert accumulated["train/cross_entropy"] == pytest.approx(whole["train/cross_entropy"], rel=1e-4)
        assert accumulated["train/gradient_norm"] == pytest.approx(whole["train/gradient_norm"], rel=2e-2)
        assert half["train/cross_entropy"] == pytest.approx(whole["train/cross_entropy"], rel=2e-2)
        assert half["train/cross_entropy"] != whole["train/cross_entropy"]


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
    (other / "meta.json").write_text(json.dumps(meta | {"data_hash": "0123456789abcdef"}))
    options += ["--data.path=other", "--trainer.max_steps=4", "--ckpt_path=last"]
    assert main(["fit", *options]) == 2
    message = capsys.readouterr().err
    assert "other (" in message
    assert "hash 01234567) is not what the checkpoint was trained on, " in message
    assert f"hash {meta['data_hash'][:8]}" in message
    assert main(["fit", *options, "--data.allow_other_text=true"]) == 0
    assert read_checkpoint(step_path(Path("runs/moepp/1"), 4))["moepp"]["data_hash"] == "0123456789abcdef"


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
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    events = EventAccumulator("runs/moepp/1/tensorboard")
    events.Reload()
    rows = read_csv(Path("runs/moepp/1"))
    for name in ("train/cross_entropy", "val/loss"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in logged] == [int(row["step"]) for row in rows if row[name]]


@pytest.mark.parametrize(
    ("cut", "step", "accumulate", "workers"),
    [("power", 8, 1, 0), ("power", 8, 3, 2), ("SIGTERM", 8, 3, 0), ("SIGINT", 8, 1, 0), ("SIGTERM", 6, 3, 0)],
)
def test_a_resumed_run_is_the_same_run(
    text_file: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
    step: int,
    accumulate: int,
    workers: int,
) -> None:
    """Stopped in the middle of an accumulation and continued: the same run, bit for bit.

    Without power it goes on from the checkpoint of step 6; a signal still lets its step end and be saved. After
    step 6 a validation is due.
    """
    options = [*tiny(text_file), "--trainer.max_steps=10", f"--trainer.accumulate_grad_batches={accumulate}"]
    options += [f"--trainer.val_check_interval={3 * accumulate}", f"--data.num_workers={workers}"]
    options += ["--trainer.log_every_n_steps=3"]
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
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for index, state in whole["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, resumed["optimizer_states"][0]["state"][index][name]), name
    rows = [
        [{name: text for name, text in row.items() if not name.startswith("speed/")} for row in read_csv(run)]
        for run in (workdir / "runs/moepp/1", workdir / "runs/moepp/2")
    ]
    assert [row["step"] for row in rows[0]] == ["3", "6", "9", "10"]
    assert rows[0] == rows[1]
