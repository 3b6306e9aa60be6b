"""Every option of the Trainer, and the callbacks and loggers that people add: each does what Lightning documents,
or is refused in one line that says why."""

import inspect
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Optional, Union, get_args

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from moepp.cli import main
from moepp.text.data_module import TokenDataModule
from moepp.training.arguments import ints_before_floats
from moepp.training.checkpoint import read_checkpoint, step_path, write_checkpoint
from moepp.training.lightning_cli import MoECLI, parse
from moepp.training.module import LitMoE
from tests.conftest import assert_same, read_csv, refused, tiny

RUN = Path("runs/moepp/1")


class Run:
    """A finished run.

    Attributes:
        batches: the inputs (B, S) of its training steps.
        seen: what its steps found switched on.
        loaders: how often training batches were asked for anew.
        largest_gradient: after clipping, of the last step.
    """

    def __init__(self, *options: str) -> None:
        self.batches: list[Tensor] = []
        self.seen: dict[str, bool] = {}
        self.loaders = 0
        self.largest_gradient = math.nan
        whole_step, whole_clipping = LitMoE.training_step, LitMoE.configure_gradient_clipping
        whole_validation, whole_loader = LitMoE.validation_step, TokenDataModule.train_dataloader

        def training_step(model: LitMoE, batch: dict[str, Tensor], batch_idx: int) -> Any:
            self.batches.append(batch["inputs"].clone())
            self.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
            self.seen["anomaly"] = torch.is_anomaly_enabled()
            self.seen["benchmark"] = torch.backends.cudnn.benchmark
            return whole_step(model, batch, batch_idx)

        def validation_step(model: LitMoE, *args: Any) -> None:
            self.seen["inference"] = torch.is_inference_mode_enabled()
            whole_validation(model, *args)

        def train_dataloader(data: TokenDataModule) -> Any:
            self.loaders += 1
            return whole_loader(data)

        def clip(model: LitMoE, *args: Any, **kwargs: Any) -> None:
            whole_clipping(model, *args, **kwargs)
            self.largest_gradient = max(float(p.grad.abs().max()) for p in model.parameters())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LitMoE, "training_step", training_step)
            patch.setattr(LitMoE, "validation_step", validation_step)
            patch.setattr(TokenDataModule, "train_dataloader", train_dataloader)
            patch.setattr(LitMoE, "configure_gradient_clipping", clip)
            try:
                self.trainer: Any = parse(MoECLI, "fit", list(options)).trainer
            finally:
                torch.use_deterministic_algorithms(False)
                torch.backends.cudnn.benchmark = False

    @property
    def rows(self) -> list[dict[str, str]]:
        return read_csv(RUN)

    def steps(self, column: str) -> list[int]:
        """Which steps have a figure there."""
        return [int(row["step"]) for row in self.rows if row.get(column)]

    def has(self, callback: str) -> bool:
        return any(type(c).__name__ == callback for c in self.trainer.callbacks)


WORKS: dict[str, tuple[str, Callable[[Run], bool]]] = {
    "precision": ("precision=bf16-mixed", lambda run: run.trainer.precision == "bf16-mixed"),  # others: below
    "logger": ("logger=false", lambda run: not (RUN / "metrics.csv").exists()),  # others: below
    "callbacks": ("callbacks=Timer", lambda run: run.has("Timer") and run.has("Monitor")),  # others: below
    "fast_dev_run": ("fast_dev_run=1", lambda run: len(run.batches) == 1 and not (RUN / "checkpoints").exists()),
    "max_epochs": (
        "max_epochs=2 max_steps=-1 limit_train_batches=3",
        lambda run: run.trainer.global_step == 6 and run.steps("train/loss")[-1] == 6,
    ),
    "max_steps": ("max_steps=3", lambda run: run.trainer.global_step == 3),
    "max_time": (
        "max_time=00:00:00:01 max_steps=1000000 log_every_n_steps=1000000 val_check_interval=1000000",
        lambda run: run.steps("train/loss") == [run.trainer.global_step] and run.trainer.global_step < 1000000,
    ),
    "limit_train_batches": (
        "limit_train_batches=2 check_val_every_n_epoch=1 val_check_interval=1.0",
        lambda run: run.steps("val/loss") == [2, 4],
    ),
    "limit_val_batches": ("limit_val_batches=0", lambda run: not run.steps("val/loss")),
    "overfit_batches": (
        "overfit_batches=1 max_steps=3 val_check_interval=1",
        lambda run: all(torch.equal(batch, run.batches[0]) for batch in run.batches),
    ),
    "val_check_interval": ("val_check_interval=3", lambda run: run.steps("val/loss") == [3]),
    "check_val_every_n_epoch": (
        "check_val_every_n_epoch=2 val_check_interval=1.0 limit_train_batches=1",
        lambda run: run.steps("val/loss") == [2, 4],
    ),
    "num_sanity_val_steps": ("num_sanity_val_steps=1", lambda run: run.steps("val/loss") == [2, 4]),
    "log_every_n_steps": ("log_every_n_steps=3", lambda run: run.steps("train/loss") == [3, 4]),
    "enable_checkpointing": ("enable_checkpointing=false", lambda run: not (RUN / "checkpoints").exists()),
    "enable_progress_bar": ("enable_progress_bar=true", lambda run: run.has("RichProgressBar")),
    "enable_model_summary": ("enable_model_summary=true", lambda run: run.has("RichModelSummary")),
    "accumulate_grad_batches": ("accumulate_grad_batches=2", lambda run: len(run.batches) == 8),
    "gradient_clip_val": ("gradient_clip_val=0.001", lambda run: run.largest_gradient <= 0.001),
    "gradient_clip_algorithm": (
        "gradient_clip_algorithm=value gradient_clip_val=0.002",
        lambda run: run.largest_gradient == pytest.approx(0.002),
    ),
    "deterministic": ("deterministic=true", lambda run: run.seen["deterministic"]),
    "benchmark": ("benchmark=true", lambda run: run.seen["benchmark"]),
    "inference_mode": ("inference_mode=false", lambda run: not run.seen["inference"]),
    "profiler": (
        "profiler=simple",
        lambda run: "run_training_batch" in run.trainer.profiler.recorded_durations,
    ),
    "detect_anomaly": ("detect_anomaly=true", lambda run: run.seen["anomaly"]),
    "reload_dataloaders_every_n_epochs": (
        "reload_dataloaders_every_n_epochs=1 limit_train_batches=2",
        lambda run: run.loaders == 2 and len({str(batch.tolist()) for batch in run.batches}) == 4,
    ),
    "default_root_dir": ("default_root_dir=there", lambda run: Path("there/result.json").is_file()),
}
# what a run of four steps on one CPU shows nothing of, or what another test is about
HARMLESS = {
    "accelerator": "cpu",
    "strategy": "auto",  # others: test_processes.py
    "devices": "1",
    "num_nodes": "1",
    "min_epochs": "1",
    "min_steps": "2",
    "limit_test_batches": "1",  # and see below
    "sync_batchnorm": "true",  # there is none
    "enable_autolog_hparams": "false",
    "model_registry": "name",  # of Lightning's cloud
}
REFUSED = {
    "barebones": ("barebones=true", "trainer.barebones: leaves out the loggers"),
    "limit_predict_batches": ("limit_predict_batches=2", "there is nothing to predict"),
    "use_distributed_sampler": ("use_distributed_sampler=true", "every device gets its share of the text already"),
    "plugins": (
        "plugins=lightning.pytorch.plugins.io.TorchCheckpointIO",
        "CheckpointIO",
    ),
}


def options_of(text: Path, words: str) -> list[str]:
    return [*tiny(text), "--trainer.max_steps=4", *(f"--trainer.{word}" for word in words.split())]


def test_the_table_has_every_option_of_the_trainer() -> None:
    options = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert options == WORKS.keys() | HARMLESS.keys() | REFUSED.keys()


def test_harmless_options_are_taken(text_file: Path, workdir: Path) -> None:
    run = Run(*options_of(text_file, " ".join(f"{name}={value}" for name, value in HARMLESS.items())))
    assert run.trainer.global_step == 4
    assert (RUN / "result.json").is_file()
    assert run.seen["inference"]
    assert run.loaders == 1


def test_a_number_of_batches_is_no_fraction_whatever_typing_has_met() -> None:
    for clear_cache in typing._cleanups:
        clear_cache()
    hints = {"limit": Optional[Union[float, int]], "name": Optional[str]}  # noqa: UP007, UP045
    assert get_args(hints["limit"])[0] is float
    ints_before_floats(hints)
    assert get_args(hints["limit"]) == (int, float, NoneType)
    assert hints["name"] == Optional[str]  # noqa: UP045


@pytest.mark.parametrize("option", WORKS)
def test_an_option_does_what_lightning_documents(text_file: Path, workdir: Path, option: str) -> None:
    words, holds = WORKS[option]
    assert holds(Run(*options_of(text_file, words)))


@pytest.mark.parametrize("option", REFUSED)
def test_or_is_refused(text_file: Path, workdir: Path, capsys, option: str) -> None:
    words, message = REFUSED[option]
    assert message in refused(capsys, "fit", *options_of(text_file, words))


def test_a_test_can_be_limited(text_file: Path, workdir: Path, capsys) -> None:
    Run(*options_of(text_file, "max_steps=1"))
    losses = set()
    for limit in ("1", "null"):
        ckpt = "--ckpt_path=runs/moepp/1/checkpoints/step-00000001.ckpt"
        assert main(["test", *options_of(text_file, f"limit_test_batches={limit}"), ckpt]) == 0
        losses.add(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("final/loss")))
    assert len(losses) == 2


# ---- precisions --------------------------------------------------------------------------------------------

TRAINS = ["16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true"]
# on a CPU Lightning takes bf16 for fp16
ALIASES = {"64": "64-true", "32": "32-true", "16": "bf16-mixed", "bf16": "bf16-mixed"}


@pytest.mark.parametrize("precision", TRAINS)
def test_a_precision_trains(text_file: Path, workdir: Path, precision: str) -> None:
    options = options_of(text_file, f"precision={precision} max_steps=16 val_check_interval=8")
    run = Run(*options, "--model.moe.ffn_budget=1.2")
    losses = [float(row["val/loss"]) for row in run.rows if row["val/loss"]]
    assert losses[1] < losses[0] < 5.7
    assert all(float(row["train/skipped_steps"]) == 0 for row in run.rows)


@pytest.mark.parametrize("alias", ALIASES)
def test_or_is_another_name_of_one(text_file: Path, workdir: Path, alias: str) -> None:
    run = Run(*options_of(text_file, f"precision={alias} max_steps=1"))
    assert run.trainer.precision == ALIASES[alias]


@pytest.mark.parametrize("found", ["32-true", "bf16-mixed"])
def test_where_nobody_says_it_is_the_machines(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """And the run says so, where that is not float32."""
    monkeypatch.setattr("moepp.training.lightning_cli.default_precision", lambda device: found)
    run = Run(*options_of(text_file, "max_steps=1"))
    assert run.trainer.precision == found
    first, *_ = (RUN / "train.log").read_text().splitlines()
    assert f"{found} on " in first
    assert ("--trainer.precision=32-true for float32" in first) == (found == "bf16-mixed")


@pytest.mark.parametrize(
    ("precision", "other"), [("64-true", "64-true"), ("bf16-true", "bf16-true"), ("16-mixed", "32-true")]
)
def test_a_run_goes_on_in_its_precision_bit_for_bit_and_in_another(
    text_file: Path, workdir: Path, precision: str, other: str
) -> None:
    """Under 16-mixed AdamW is not fused, which a checkpoint says. On a CPU it is, so it is said here."""
    options = options_of(text_file, f"precision={precision} max_steps=4 val_check_interval=2")
    assert main(["fit", *options, "--trainer.default_root_dir=whole"]) == 0
    half = read_checkpoint(step_path(Path("whole"), 2))
    half["optimizer_states"][0]["param_groups"] = [
        group | {"fused": precision != "16-mixed"} for group in half["optimizer_states"][0]["param_groups"]
    ]
    path = step_path(Path("again"), 2)
    path.parent.mkdir(parents=True)
    write_checkpoint(path, half)
    options = options_of(text_file, f"precision={other} max_steps=4 val_check_interval=2")
    assert main(["fit", *options, "--trainer.default_root_dir=again", f"--ckpt_path={path}"]) == 0
    whole, again = (read_checkpoint(step_path(Path(name), 4))["state_dict"] for name in ("whole", "again"))
    if precision == other:
        assert_same(again, whole)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("16-true", "in 16-true AdamW's eps is 0: take 16-mixed or bf16-true"),
        ("transformer-engine", "transformer_engine"),
        ("transformer-engine-float16", "transformer_engine"),
    ],
)
def test_or_the_precision_is_refused(text_file: Path, workdir: Path, capsys, precision: str, message: str) -> None:
    assert message in refused(capsys, "fit", *options_of(text_file, f"precision={precision}"))


def test_the_table_has_every_precision() -> None:
    from lightning.fabric.connector import _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS

    listed = {*_PRECISION_INPUT_STR.__args__, *_PRECISION_INPUT_STR_ALIAS.__args__}
    assert listed == {*TRAINS, *ALIASES, "16-true", "transformer-engine", "transformer-engine-float16"}


# ---- callbacks and loggers ---------------------------------------------------------------------------------

CALLBACKS: dict[str, tuple[str, Callable[[Run], bool]]] = {
    "LearningRateMonitor": ("", lambda run: run.steps("lr-AdamW/pg1") == [0, 1, 2, 3]),
    "EarlyStopping": (
        "callbacks.monitor=val/loss callbacks.patience=1 callbacks.mode=max max_steps=20",
        lambda run: run.trainer.global_step == 4 and (RUN / "result.json").is_file(),
    ),
    "ModelCheckpoint": (
        "callbacks.monitor=val/loss callbacks.filename=mine",
        lambda run: read_checkpoint(RUN / "checkpoints/mine.ckpt")["global_step"] in (2, 4),
    ),
    "EMAWeightAveraging": ("", lambda run: run.has("EMAWeightAveraging") and run.trainer.global_step == 4),
    "TQDMProgressBar": ("", lambda run: run.has("TQDMProgressBar") and not run.has("RichProgressBar")),
}


def test_a_metric_that_is_not_there_ends_in_one_line(text_file: Path, workdir: Path, capsys) -> None:
    assert main(["fit", *options_of(text_file, "callbacks=EarlyStopping callbacks.monitor=nope")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nope" in line
    assert "val/loss" in line  # what there is


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_callback_works_beside_ours(text_file: Path, workdir: Path, callback: str) -> None:
    words, holds = CALLBACKS[callback]
    run = Run(*options_of(text_file, f"callbacks={callback} {words}"))
    assert holds(run)
    assert run.has("Monitor")
    assert run.has("Checkpoints")
    assert run.steps("train/loss")


def test_device_stats_are_logged_where_psutil_is(
    text_file: Path, workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_there = "lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE"
    monkeypatch.setattr(is_there, False)
    assert "psutil" in refused(capsys, "fit", *options_of(text_file, "callbacks=DeviceStatsMonitor"))
    stats = {"cpu_percent": 7.0}
    monkeypatch.setattr(is_there, True)
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu.CPUAccelerator.get_device_stats", lambda *_: stats)
    run = Run(*options_of(text_file, "callbacks=DeviceStatsMonitor"))
    assert run.steps("DeviceStatsMonitor.on_train_batch_end/cpu_percent")


@pytest.mark.parametrize("logger", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_missing(text_file: Path, workdir: Path, capsys, logger: str) -> None:
    package = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}[logger]
    if package in sys.modules:
        pytest.skip(f"{package} is installed")
    assert package in refused(capsys, "fit", *options_of(text_file, f"logger={logger}"))


def test_a_logger_of_ones_own_takes_the_place_of_ours(text_file: Path, workdir: Path) -> None:
    run = Run(*options_of(text_file, "logger=CSVLogger logger.save_dir=logs"))
    assert isinstance(run.trainer.logger, CSVLogger)
    assert not (RUN / "metrics.csv").exists()
    logged = Path(run.trainer.logger.log_dir, "metrics.csv").read_text()
    assert "train/loss" in logged
    assert "final/loss" in logged
