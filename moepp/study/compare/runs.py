"""The runs of a study, trained: each in a process and a folder of its own, several at once."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import torch
import yaml
from rich.progress import Progress

from moepp.model import InputError
from moepp.study.compare.matrix import Matrix, Run
from moepp.study.compare.speed import best_device
from moepp.system.files import remove, replacing
from moepp.training.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint

FIT = [sys.executable, "-m", "moepp", "fit"]


@dataclass(frozen=True)
class Workers:
    """How many runs at once, and what each gets of the machine."""

    jobs: int
    devices: int  # of the run that takes most
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them; empty: runs train on the CPU
    lock: IO[str]  # an open file for the runs to inherit

    @property
    def threads(self) -> int:
        """CPU threads of one process. Threads that compete for a core cost far more than they bring."""
        processes = 1 if self.gpus else self.jobs * self.devices
        return int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))

    def start(self, run: Run, options: dict[str, Any], slot: int) -> subprocess.Popen:
        """`moepp fit` in a process group of its own; what it prints goes to output.log in its folder."""
        run.folder.mkdir(parents=True, exist_ok=True)
        with replacing(run.folder / "options.yaml") as file:
            file.write(yaml.safe_dump(options, sort_keys=False).encode())
        (run.folder / "failed.txt").unlink(missing_ok=True)
        command = [*FIT, "--config", str(run.folder / "options.yaml"), f"--trainer.default_root_dir={run.folder}"]
        if (begun := last_checkpoint(run.folder)) is not None:
            command.append(f"--ckpt_path={begun}")
        with (run.folder / "output.log").open("a") as log:
            return subprocess.Popen(
                command,
                env=os.environ | self.environment(run.variant.devices, slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )

    def environment(self, devices: int, slot: int) -> dict[str, str]:
        """What shows a run its `devices` GPUs, or gives it its share of the cores."""
        if not self.gpus:
            return {"OMP_NUM_THREADS": str(self.threads)}
        first = slot * self.devices
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[(first + n) % len(self.gpus)] for n in range(devices))}


def visible_gpus(matrix: Matrix) -> list[str]:
    """The GPUs that the runs share, as CUDA_VISIBLE_DEVICES names them; none where they train on the CPU.

    Raises:
        InputError: a run takes more than there are.
    """
    if best_device(matrix.reference).type != "cuda":
        return []
    n_gpus = torch.cuda.device_count()
    if matrix.devices > n_gpus:
        raise InputError(f"trainer.devices: {matrix.devices} for a run, and there are {n_gpus} GPUs: take fewer")
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    return names.split(",")[:n_gpus]


def execute(runs: list[Run], workers: Workers) -> None:
    """Train them all. One that fails leaves failed.txt and does not keep the others back."""
    waiting = [(run, run.options) for run in runs]  # resolved now: a recipe may change in the meantime
    busy: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    steps = {run.name: steps_done(run) for run in runs}
    n_ended = 0
    with Progress(transient=True, speed_estimate_period=3600) as progress:  # a bar in a terminal alone
        bar = progress.add_task("", total=sum(run.variant.steps for run in runs), completed=sum(steps.values()))
        try:
            while waiting or busy:
                for slot in range(workers.jobs):
                    if slot not in busy and waiting:
                        run, options = waiting.pop(0)
                        busy[slot] = run, workers.start(run, options, slot)
                for slot, (run, process) in list(busy.items()):
                    steps[run.name] = steps_done(run)
                    if process.poll() is not None:
                        del busy[slot]
                        if run.finished:
                            keep_weights_alone(run)
                        else:
                            write_failure(run, process.returncode)
                        steps[run.name], n_ended = run.variant.steps, n_ended + 1
                        line = f"[{n_ended}/{len(runs)}] {run.name}: {run.failure or 'done'}"
                        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                names = ", ".join(run.name for run, _ in busy.values())
                progress.update(bar, description=names, completed=sum(steps.values()))
                time.sleep(0.2)
        finally:
            for _, process in busy.values():
                # nothing to be gentle about: a run survives being cut off at any moment
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def keep_weights_alone(run: Run) -> None:
    """Of the last checkpoint, and no other: a third of its size."""
    if (last := last_checkpoint(run.folder)) is not None:
        checkpoint = read_checkpoint(last)
        checkpoint.pop("optimizer_states", None)
        write_checkpoint(last, checkpoint)
        for other in set(last.parent.iterdir()) - {last}:
            remove(other)


def write_failure(run: Run, exit_code: int) -> None:
    """failed.txt: the exit code and the last line that the run printed."""
    output = (run.folder / "output.log").read_text(errors="replace").strip()
    last_line = output.rpartition("\n")[2].strip() or "it printed nothing"
    (run.folder / "failed.txt").write_text(f"exit code {exit_code}: {last_line}\n")


def by_commit(runs: list[Run]) -> dict[str, list[str]]:
    """The names of those that are finished, by the commit that made them."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.finished:
            names.setdefault(run.result["commit"], []).append(run.name)
    return names


def steps_done(run: Run) -> int:
    """The last step in the run's metrics.csv."""
    path = run.folder / "metrics.csv"
    whole_lines = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    step = whole_lines.rpartition(b"\n")[2].partition(b",")[0]
    return int(step) if step.isdigit() else 0
