"""One run, one folder, however its processes are started: by Lightning, by torchrun, by SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.training.checkpoint import read_checkpoint, step_path
from tests.conftest import read_csv, tiny
from tests.ranks import free_port

FIT = ["-m", "moepp", "fit"]
TWO = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_steps=2", "--model.moe.ffn_budget=1.2"]


def by_lightning(fit: list[str]) -> list[subprocess.Popen]:
    return [start([sys.executable, *fit], {})]


def by_torchrun(fit: list[str]) -> list[subprocess.Popen]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    return [start([*torchrun, *fit], {})]


def by_slurm(fit: list[str]) -> list[subprocess.Popen]:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    return [start([sys.executable, *fit], job | rank) for rank in ranks]


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.heavy
@pytest.mark.parametrize("launch", [by_lightning, by_torchrun, by_slurm])
def test_two_processes_are_one_run(text_file: Path, workdir: Path, launch) -> None:
    for process in launch([*FIT, *tiny(text_file), *TWO]):
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
    assert [path.name for path in Path("runs/moepp").iterdir()] == ["1"]
    run = Path("runs/moepp/1")
    names = {"checkpoints", "config.yaml", "metrics.csv", "result.json", "tensorboard", "train.log"}
    assert {path.name for path in run.iterdir()} == names
    assert (run / "train.log").read_text().count("step 2/2") == 1
    assert [float(row["train/tokens"]) for row in read_csv(run)] == [2 * 4 * 32, 2 * 2 * 4 * 32]
    assert read_checkpoint(step_path(run, 2))["state_dict"]["model.budget.steps"] == 2  # steered by both together
