"""How long a run of `moepp fit` waits: for its first step, and for data in every step."""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler

from moepp.model import MoEConfig
from moepp.study.timing import synchronize
from moepp.text.data_module import TokenDataModule
from moepp.training.module import LitMoE
from tests.bench.setting import RECIPES, Case, Row, Setting, measured

STARTS = 3  # of `moepp fit`


def start(at: Setting) -> Iterator[Row]:
    """How much of `moepp fit` is spent waiting for data, and how long it takes to its first step."""
    t, rng = at.sizes.transformer, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
        # about two tokens a word; an epoch of some 50 steps
        n_words = 25 * at.sizes.batch_size * t.context_length
        text = "\n\n".join(" ".join(rng.choices(words, k=200)) for _ in range(n_words // 200 + 100))
        path = Path(folder, "words.txt")
        path.write_text(text)
        data = TokenDataModule(
            str(path), min(512, t.vocab_size), t.context_length, at.sizes.batch_size, out_root=folder
        )
        data.prepare_data()
        data.setup()
        yield waiting(at, data)
        case = Case("start", "`moepp fit` to the end of its first step")
        if lacking := [package for package in ("jsonargparse", "omegaconf") if find_spec(package) is None]:
            yield Row(case, "s", note=f"left out: `moepp fit` needs {' and '.join(lacking)}")
            return
        starts = [seconds_to_first_step(data, Path(folder)) for _ in range(STARTS)]
    yield measured(case, "s", starts, note="the default model; text that is prepared already")


def waiting(at: Setting, data: TokenDataModule) -> Row:
    """Share of training steps under Lightning that passes before the batch is on the device."""
    profiler, warm_up, on_gpu = Durations(at.device), 5, at.device.type == "cuda"
    trainer = L.Trainer(
        accelerator=at.device.type,
        devices=1,
        precision=at.precision,  # type: ignore[arg-type]
        max_steps=warm_up + at.rounds,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        profiler=profiler,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitMoE(at.sizes.transformer, MoEConfig(), compile=on_gpu), data)
    actions = (
        "[_TrainingEpochLoop].train_dataloader_next",
        "[Strategy]SingleDeviceStrategy.batch_to_device",
        "run_training_batch",
    )
    durations = list(zip(*(profiler.recorded_durations[action] for action in actions), strict=False))[warm_up:]
    shares = [100 * (fetch + copy) / (fetch + copy + compute) for fetch, copy, compute in durations]
    return measured(Case("start", "waiting for data"), "% of a training step", shares)


class Durations(SimpleProfiler):
    """Lightning's profiler, which here waits for a GPU to finish what it times, and does not print its report."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def start(self, action_name: str) -> None:
        synchronize(self.device)
        super().start(action_name)

    def stop(self, action_name: str) -> None:
        synchronize(self.device)
        super().stop(action_name)

    def summary(self) -> str:
        return ""


def seconds_to_first_step(data: TokenDataModule, folder: Path) -> float:
    begun = time.perf_counter()
    fit = [sys.executable, "-m", "moepp", "fit", "--trainer.log_every_n_steps=1"]
    fit += [f"--data.path={data.files.path.absolute()}", f"--data.vocab_size={data.vocab_size}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES.parent), *sys.path])}
    with subprocess.Popen(fit, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = next((line for line in process.stdout if line.startswith("step")), None)
        seconds = time.perf_counter() - begun
        process.kill()
    if first is None:
        raise RuntimeError("`moepp fit` ended without a step")
    return seconds
