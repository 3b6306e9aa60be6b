"""`moepp ablate`: train every variant of a matrix from every seed, then compare.

What is finished stays finished: a study that was stopped, or that broke, goes on where it was when it is started
again.
"""

import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moepp.model import InputError, add_zero_computation, count_parameters
from moepp.study.compare.matrix import Matrix, Run, Start, read_matrix, resolve
from moepp.study.compare.runs import Workers, by_commit, execute, visible_gpus
from moepp.study.compare.speed import step_seconds
from moepp.study.compare.tune import search
from moepp.system.files import differences
from moepp.system.machine import provenance
from moepp.text.data_module import TokenDataModule
from moepp.training.arguments import OwnOptions
from moepp.training.checkpoint import checkpoint_of, load, write_checkpoint

MOST = 1000  # seeds, or runs at once


class Options(OwnOptions):
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
        self.add_argument("--out", type=Path, help="folder of the study (default: runs/<matrix>[-tune][-quick])")
        self.add_argument("--jobs", type=int, help="runs at once (default: as many as there are GPUs for)")
        self.add_argument("--tune", action="store_true", help="first search for each variant's own best options")
        self.add_argument("--quick", action="store_true", help="the matrix's small version, for 2 CPU cores")
        self.add_argument("--dry_run", action="store_true", help="list the runs and what they cost, and stop")


def run(verb: str, arguments: list[str]) -> None:
    options, overrides = Options().parse_own(arguments)
    contents = read_matrix(options.matrix)
    versions = [name for name in ("tune", "quick") if getattr(options, name)]
    settings = {"seeds": 3, "jobs": 1, "part_of_steps": 1.0, "seeds_of_a_try": 1} | contents
    for name in versions:
        if name not in contents:
            raise InputError(f"{name}: {options.matrix} says nothing of it, as recipes/compare.yaml does")
        settings |= contents[name]
    settings |= {name: value for name in ("seeds", "jobs") if (value := getattr(options, name)) is not None}
    for name in ("seeds", "jobs", "seeds_of_a_try"):
        if not isinstance(settings[name], int) or not 1 <= settings[name] <= MOST:
            raise InputError(f"{name}: must be from 1 to {MOST}, got {settings[name]}")
    base = options.base or options.matrix.parent / str(settings.get("base"))
    out = options.out or Path("runs") / "-".join([options.matrix.stem, *versions])
    matrix = resolve(options.matrix, settings, base, overrides, out)
    to_tune = settings["options"] if options.tune else {}, settings["part_of_steps"], settings["seeds_of_a_try"]
    # as far as they are known: what is not finished is checked, not run
    tries = [run for trial in search(matrix, *to_tune, out, execute=check).trials for run in trial.runs]
    runs = matrix.runs(settings["seeds"], out)
    if not options.tune:
        refuse_changed_options(runs)
    if options.dry_run:
        dry_run(matrix, tries, runs)
        return
    gpus = visible_gpus(matrix)
    jobs = len(gpus) // matrix.devices if gpus and options.jobs is None else settings["jobs"]

    from moepp.study.compare import report  # matplotlib, pandas, scipy: before hours of training, not after

    data = TokenDataModule(**(tries + runs)[0].options["data"])
    data.prepare_data()
    data.setup()
    with locked(out) as lock:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops the runs as Ctrl-C does
        for commit, names in by_commit(tries + runs).items():
            if commit != provenance()["commit"]:
                print(f"moepp {verb}: {len(names)} runs are kept as commit {commit} made them", file=sys.stderr)
        workers = Workers(jobs, matrix.devices, gpus, lock)

        def train(runs: list[Run]) -> None:
            refuse_changed_options(runs)
            execute([run for run in runs if not run.finished], workers)

        found = search(matrix, *to_tune, out, lambda tries: train([run for run in tries if not run.failure]))
        matrix = found.tuned(matrix)
        runs = matrix.runs(settings["seeds"], out)
        if matrix.start is not None:
            train([matrix.start.run(seed) for seed in range(settings["seeds"])])
            convert(matrix.start, [run for run in runs if not run.finished])
        train(runs)
        torch.set_num_threads(workers.threads)  # the speeds in the report are measured as the runs were trained
        failed = report.write(matrix, runs, found, out, command=shlex.join(["moepp", verb, *arguments]))
    if failed:
        print(f"moepp {verb}: {failed} of {len(runs)} runs failed; {out / 'report'} says why", file=sys.stderr)
        raise SystemExit(1)


def convert(start: Start, runs: list[Run]) -> None:
    """Write what the runs start from, where that is not the trained model itself."""
    for run in runs:
        moe, trained = run.variant.moe, start.checkpoint(run.seed)
        if moe.n_zero_computation and trained.is_file():
            added = moe.n_zero, moe.n_copy, moe.n_const
            loaded = load(trained)
            model = add_zero_computation(loaded.model, *added, noise=run.variant.noise, seed=run.seed)
            path = start.checkpoint(run.seed, run.variant.name)
            write_checkpoint(path, checkpoint_of(model, **loaded.origin))


def check(tries: list[Run]) -> None:
    """That all values can be tried.

    Raises:
        InputError: one cannot, or a run's folder was made with other options.
    """
    for run in tries:
        _ = run.variant.transformer, run.variant.moe
    refuse_changed_options(tries)


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
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"out: {out} is in use by another study, or by a run that one started") from None
        yield lock


def dry_run(matrix: Matrix, tries: list[Run], runs: list[Run]) -> None:
    """Print every variant with its runs and what these would cost."""
    runs, heading = tries + runs, f"{len(tries + runs)} runs of {matrix.path}"
    if tries:
        heading += f", {len(tries)} of them tries of {max(run.variant.steps for run in tries):,} steps at most"
    reference = matrix.reference
    per_flop = step_seconds(reference) * reference.steps / reference.training_flops()
    table = Table("variant", title=heading, box=SIMPLE)
    for title in ("to run", "finished", "parameters", "active/token", "tokens", "FLOPs/run", "time/run"):
        table.add_column(title, justify="right", no_wrap=True)
    for variant in matrix.variants:
        done = [run.finished for run in runs if run.variant.name == variant.name]
        parameters, flops = count_parameters(variant.transformer, variant.moe), variant.training_flops()
        active = parameters.active(variant.moe.expected_ffn_per_token)
        millions = (f"{number / 1e6:.2f}M" for number in (parameters.total, active, variant.tokens))
        time = timedelta(seconds=round(flops * per_flop))
        n_runs = str(done.count(False)), str(done.count(True))
        table.add_row(variant.name, *n_runs, *millions, f"{flops:.3g}", str(time))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    flops_left = sum(run.variant.training_flops() for run in runs if not run.finished)
    total = timedelta(seconds=round(flops_left * per_flop))
    how = f"from a measured step of {reference.name}; starting and validating come on top"
    console.print(f"in all {flops_left:.3g} FLOPs, about {total} one after another, {how}", highlight=False)
