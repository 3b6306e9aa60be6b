"""`moepp ablate`: train every variant of a matrix from every seed, then compare.

Each run is a process and a folder of its own. What is finished stays finished: a study that was stopped, or that
broke, goes on where it was when it is started again.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, NoReturn

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from moepp.model import InputError, count_parameters
from moepp.study.compare.matrix import Matrix, Run, read_matrix, resolve
from moepp.study.compare.speed import best_device, step_seconds
from moepp.system.files import differences, replacing
from moepp.text.data_module import TokenDataModule
from moepp.training.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint

MOST = 1000  # seeds, or runs at once
FIT = [sys.executable, "-m", "moepp", "fit"]


class Options(argparse.ArgumentParser):
    """The study's own options; what it does not know is left for the runs."""

    def __init__(self) -> None:
        super().__init__(
            "moepp ablate",
            allow_abbrev=False,
            description="Train every variant of a matrix from every seed and compare them in one report. Any "
            "other option is passed to every run: --trainer.max_steps=100 --data.path=my.txt --config more.yaml",
        )
        self.add_argument("--matrix", type=Path, required=True, help="the variants: recipes/compare.yaml")
        self.add_argument("--base", type=Path, help="the recipe that variants change, instead of the matrix's")
        self.add_argument("--seeds", type=int, help="train from the seeds 0 … N-1 (default: the matrix's)")
        self.add_argument("--out", type=Path, help="folder of the study (default: runs/<matrix>[-quick])")
        self.add_argument("--jobs", type=int, help="runs at once (default: as many as there are GPUs)")
        self.add_argument("--quick", action="store_true", help="the matrix's small version, for 2 CPU cores")
        self.add_argument("--dry_run", action="store_true", help="list the runs and what they cost, and stop")

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(verb: str, arguments: list[str]) -> None:
    options, overrides = Options().parse_known_args(arguments)
    contents = read_matrix(options.matrix)
    if options.quick and "quick" not in contents:
        raise InputError(f"quick: {options.matrix} has no quick version")
    if options.quick and options.base:
        raise InputError("base: --quick has a base of its own, so leave out one of the two")
    settings = contents | (contents["quick"] if options.quick else {})
    base = options.base or options.matrix.parent / str(settings.get("base"))
    seeds = settings.get("seeds", 3) if options.seeds is None else options.seeds
    jobs = settings.get("jobs", 1) if options.jobs is None else options.jobs
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: must be at least 1, got {value}")
        if value > MOST:
            raise InputError(f"{name}: must be at most {MOST}, got {value}")
    out = options.out or Path("runs") / (options.matrix.stem + ("-quick" if options.quick else ""))
    matrix = resolve(options.matrix, contents, base, overrides)
    runs = matrix.runs(seeds, out)
    refuse_changed_options(runs)
    if options.dry_run:
        dry_run(matrix, runs)
        return
    on_gpu = best_device(matrix.reference).type == "cuda"
    if on_gpu and options.jobs is None:
        jobs = torch.cuda.device_count()

    from moepp.study.compare import report  # matplotlib and scipy, before hours of training rather than after

    data = TokenDataModule(**matrix.reference.options["data"])
    data.prepare_data()
    data.setup()
    with locked(out) as lock, terminated_like_interrupted():
        workers = Workers(jobs, on_gpu, lock)
        execute([run for run in runs if not run.finished], workers)
        torch.set_num_threads(workers.threads)  # the speeds in the report are measured as the runs were trained
        command = shlex.join(["moepp", verb, *arguments])
        failed = report.write(matrix, runs, out, command)
    if failed:
        print(f"moepp {verb}: {failed} of {len(runs)} runs failed; {out / 'report'} says why", file=sys.stderr)
        raise SystemExit(1)


def refuse_changed_options(runs: list[Run]) -> None:
    """Folders keep the options they were made with.

    Raises:
        InputError: a run's folder was made with others.
    """
    for run in runs:
        stored = run.folder / "options.yaml"
        if stored.is_file():
            for key, old, new in differences(yaml.safe_load(stored.read_text()), run.options):
                raise InputError(
                    f"out: {run.folder} was made with {key}={old}, not {new}: name another --out, or remove it"
                )


@contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """Hold `out`, for this process and for the runs that inherit the open file (which filelock's cannot be): where
    a run outlives its killed study, nobody else may write to its folder.

    Raises:
        InputError: somebody else holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            raise InputError(f"out: {out} is in use by {holder}, or by a run that it started") from None
        lock.truncate(0)
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        lock.flush()
        yield lock


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM stops the runs as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- running -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workers:
    """How many runs at once, and what each gets of the machine."""

    jobs: int
    on_gpu: bool
    lock: IO[str]

    @property
    def threads(self) -> int:
        """CPU threads of one run. Threads that compete for a core cost far more than they bring."""
        shared = (os.cpu_count() or 1) // (1 if self.on_gpu else self.jobs)
        return int(os.environ.get("OMP_NUM_THREADS", max(1, shared)))

    def start(self, run: Run, slot: int) -> subprocess.Popen:
        """`moepp fit` in a process group of its own; what it prints goes to output.log in its folder."""
        run.folder.mkdir(parents=True, exist_ok=True)
        with replacing(run.folder / "options.yaml") as file:
            file.write(yaml.safe_dump(run.options, sort_keys=False).encode())
        (run.folder / "failed.txt").unlink(missing_ok=True)
        command = [*FIT, "--config", str(run.folder / "options.yaml"), f"--trainer.default_root_dir={run.folder}"]
        if (begun := last_checkpoint(run.folder)) is not None:
            command.append(f"--ckpt_path={begun}")
        with (run.folder / "output.log").open("a") as log:
            return subprocess.Popen(
                command,
                env=self.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )

    def environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.on_gpu:
            every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            devices = every.split(",")
            if self.jobs > 1:
                environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        else:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        return environment


def execute(runs: list[Run], workers: Workers) -> None:
    """Train them all. One that fails leaves failed.txt and does not keep the others back."""
    if not runs:
        return
    waiting = list(runs)
    busy: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    with Overview(runs) as overview:
        try:
            while waiting or busy:
                for slot in range(workers.jobs):
                    if slot not in busy and waiting:
                        run = waiting.pop(0)
                        busy[slot] = (run, workers.start(run, slot))
                for slot, (run, process) in list(busy.items()):
                    if process.poll() is not None:
                        del busy[slot]
                        settle(run, process.returncode)
                        overview.end(run)
                overview.update([run for run, _ in busy.values()])
                time.sleep(0.2)
        finally:
            for _, process in busy.values():
                # nothing to be gentle about: a run survives being cut off at any moment
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def settle(run: Run, exit_code: int) -> None:
    """Write down a failure; of a success keep the weights alone, a third of a checkpoint."""
    if not run.finished:
        lines = (run.folder / "output.log").read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        (run.folder / "failed.txt").write_text(f"exit code {exit_code}: {said}\n")
        return
    if (last := last_checkpoint(run.folder)) is not None:
        checkpoint = read_checkpoint(last)
        checkpoint.pop("optimizer_states", None)
        write_checkpoint(last, checkpoint)
        for other in set((run.folder / "checkpoints").iterdir()) - {last}:
            other.unlink()


class Overview:
    """One line for the whole study: a bar in a terminal, a printed line as each run ends elsewhere."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.begun = time.monotonic()
        self.done_before = {run.name: steps_done(run) for run in runs}
        self.ended: set[str] = set()
        self.total = sum(self.cost(run) for run in runs)
        self.console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self.progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console)
        self.task = self.progress.add_task("", total=1.0, left="")

    def __enter__(self) -> "Overview":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def cost(self, run: Run, steps: int | None = None) -> float:
        """FLOPs of what this call does of the run: up to `steps`, by default to its end."""
        new_steps = (run.variant.steps if steps is None else steps) - self.done_before[run.name]
        last_validation = 0.05 if steps is None else 0.0  # roughly; its FLOPs are not known before the run
        return run.variant.training_flops() * (max(0, new_steps) / run.variant.steps + last_validation)

    def update(self, running: list[Run]) -> None:
        if not self.console.is_terminal:
            return
        names = ", ".join(f"{run.name} {steps_done(run)}/{run.variant.steps}" for run in running)
        self.progress.update(
            self.task,
            description=f"{len(self.ended)}/{len(self.runs)} runs │ {names}",
            completed=self.share(running),
            left=self.time_left(running),
        )

    def share(self, running: list[Run]) -> float:
        done = sum(self.cost(run) for run in self.runs if run.name in self.ended)
        return (done + sum(self.cost(run, steps_done(run)) for run in running)) / self.total

    def time_left(self, running: list[Run]) -> str:
        share = self.share(running)
        if share <= 0:
            return ""
        seconds = (time.monotonic() - self.begun) * (1 - share) / share
        return f"about {timedelta(seconds=round(seconds))} left"

    def end(self, run: Run) -> None:
        """Print how the run ended."""
        self.ended.add(run.name)
        what = f"failed: {run.failure}" if run.failure else "done"
        line = f"[{len(self.ended)}/{len(self.runs)}] {run.name} {what} │ {self.time_left([])}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def steps_done(run: Run) -> int:
    """The last step in the run's metrics.csv."""
    path = run.folder / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        whole_lines = file.read().decode(errors="replace").split("\n")[:-1]
    step = whole_lines[-1].split(",")[0] if whole_lines else ""
    return int(step) if step.isdigit() else 0


# ---- planning ----------------------------------------------------------------------------------------------


def dry_run(matrix: Matrix, runs: list[Run]) -> None:
    """Print every variant with its runs and what these would cost."""
    finished = [run for run in runs if run.finished]
    if finished:
        seconds = sum(json.loads((run.folder / "result.json").read_text())["seconds"] for run in finished)
        per_flop = seconds / sum(run.variant.training_flops() for run in finished)
        how = f"from the {len(finished)} runs that are finished"
    else:
        reference = matrix.reference
        per_flop = step_seconds(reference) * reference.steps / reference.training_flops()
        how = f"from a measured step of {reference.name}; starting and validating come on top"
    table = Table(title=f"{len(runs)} runs of {matrix.path}", box=SIMPLE)
    table.add_column("variant", no_wrap=True)
    for title in ("to run", "finished", "parameters", "active/token", "tokens", "FLOPs/run", "time/run"):
        table.add_column(title, justify="right", no_wrap=True)
    seconds_left = flops_left = 0.0
    for variant in matrix.variants:
        own = [run for run in runs if run.variant is variant]
        to_run = [run for run in own if not run.finished]
        flops = variant.training_flops()
        parameters = count_parameters(variant.transformer, variant.moe)
        active = parameters.active(variant.moe.expected_ffn_per_token)
        flops_left += len(to_run) * flops
        seconds_left += len(to_run) * flops * per_flop
        table.add_row(
            variant.name,
            str(len(to_run)),
            str(len(own) - len(to_run)),
            f"{parameters.total / 1e6:.2f}M",
            f"{active / 1e6:.2f}M",
            f"{variant.tokens / 1e6:.2f}M",
            f"{flops:.3g}",
            str(timedelta(seconds=round(flops * per_flop))),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    total = timedelta(seconds=round(seconds_left))
    console.print(f"in all {flops_left:.3g} FLOPs, about {total} one after another, {how}", highlight=False)
