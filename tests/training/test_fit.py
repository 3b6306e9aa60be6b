"""`moepp fit` from end to end on a small text: what it learns, writes, logs and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moepp.cli import main
from moepp.text.batches import part_of
from moepp.text.token_files import TokenFiles
from moepp.training.checkpoint import load
from moepp.training.run_folder import recipe_name
from tests.conftest import RECIPES, read_csv, tiny


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


def test_each_part_of_the_held_out_text_is_validated_on(text_file: Path, workdir: Path) -> None:
    """The two halves make up the whole; no part changes the training."""
    loss, tokens = {}, {}
    for part in ("all", "tune", "report"):
        options = ["--trainer.max_steps=1", f"--data.val_part={part}", f"--trainer.default_root_dir={part}"]
        assert main(["fit", *tiny(text_file), *options]) == 0
        loss[part] = json.loads(Path(part, "result.json").read_text())["final/loss"]
        (folder,) = Path("data/prepared").glob("small*")
        tokens[part] = sum(end - begin for begin, end in part_of(TokenFiles.open(folder), part))
    assert tokens["tune"] + tokens["report"] == tokens["all"]
    assert abs(loss["tune"] - loss["report"]) > 1e-3
    whole = (loss["tune"] * tokens["tune"] + loss["report"] * tokens["report"]) / tokens["all"]
    assert whole == pytest.approx(loss["all"], abs=1e-3)  # windows are cut at other places


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
    loaded = load(run / "checkpoints/step-00000060.ckpt")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("every token").ids) == "every token"
    assert model.config.vocab_size == 320
    assert torch.load(run / "checkpoints/step-00000060.ckpt", weights_only=True)["global_step"] == 60


def test_resolved_config_runs_again_and_never_collides(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    config = str(trained / "runs/moepp/1/config.yaml")
    before = (trained / "runs/moepp/1/metrics.csv").read_bytes()
    assert main(["fit", "--config", config, "--trainer.max_steps=2"]) == 0
    first, again = read_csv(trained / "runs/moepp/1"), read_csv(trained / "runs/moepp/2")
    assert first[0]["train/cross_entropy"] == again[0]["train/cross_entropy"]
    assert (trained / "runs/moepp/1/metrics.csv").read_bytes() == before
    shutil.rmtree(trained / "runs/moepp/2")


def test_runs_are_called_as_their_recipe_is_or_as_the_run_whose_options_they_have() -> None:
    named = {"recipes/moepp.yaml": "moepp", "runs/quick/12/config.3.yaml": "quick", "my/config.yaml": "config"}
    named["/config.yaml"] = "config"
    assert {path: recipe_name(Path(path)) for path in named} == named


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
        "whole": ["--data.batch_size=8", "--trainer.precision=32-true"],
        "accumulated": [
            "--data.batch_size=4",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.precision=32-true",
        ],
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
