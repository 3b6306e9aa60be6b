"""`make soak`: kill a training run with SIGKILL at random moments, go on with it, and compare where it ends.

Every second kill strikes while a checkpoint is being written, which the process to be killed does in small pieces,
slowly. What must be equal, bit for bit, to a run that nobody disturbed: weights, optimizer state, best
checkpoint, and metrics.csv without its columns about speed.
"""

import argparse
import csv
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moepp.training.checkpoint import last_checkpoint, read_checkpoint, step_of, step_path
from tests.conftest import small_text, tiny

STEPS = 40
OPTIONS = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=8",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.log_every_n_steps=3",
]


@dataclass(frozen=True)
class Trial:
    """One killed run and how it ended."""

    killed: str  # when
    resumed: int | None  # from which step; None: there was no checkpoint yet
    equal: dict[str, bool]


def soak(kills: int, folder: Path, seed: int = 0, more: Sequence[str] = ()) -> list[Trial]:
    """Kill `kills` runs, one moment each; `more` are further options of `moepp fit`."""
    text = folder / "small.txt"
    text.write_text(small_text())
    options = [*tiny(text), *OPTIONS, f"--data.out_root={folder / 'prepared'}", *more]
    fit(options, folder / "undisturbed").wait()
    expected = end(folder / "undisturbed")
    rng = random.Random(seed)
    trials = []
    for n in track(range(kills), "killing", console=Console(stderr=True)):
        run = folder / f"killed{n}"
        killed = kill(fit(options, run, slow_writes=n % 2 == 1), run, writing=n % 2 == 1, rng=rng)
        last = last_checkpoint(run)
        goes_on = [] if last is None else [f"--ckpt_path={last}"]
        fit([*options, *goes_on], run).wait()
        found = end(run)
        equal = {what: same(expected[what], found[what]) for what in expected}
        trials.append(Trial(killed, None if last is None else step_of(last), equal))
    return trials


def fit(options: list[str], run: Path, slow_writes: bool = False) -> subprocess.Popen:
    """`moepp fit` in a process of its own."""
    run.mkdir(exist_ok=True)
    module = ["tests.soak", "--slow_fit"] if slow_writes else ["moepp", "fit"]
    with (run / "output.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *module, *options, f"--trainer.default_root_dir={run}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def kill(process: subprocess.Popen, run: Path, writing: bool, rng: random.Random) -> str:
    """Wait for a random moment and kill the run. Returns when that was."""
    step, delay = rng.randrange(STEPS), rng.uniform(0, 0.15)
    while process.poll() is None:
        reached = steps_done(run)
        if reached >= step and (not writing or list(run.glob("checkpoints/*.tmp"))):
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = list(run.glob("checkpoints/*.tmp"))
    moment = f"after step {steps_done(run)}" + (f", writing {cut[0].name[:13]}" if cut else "")
    return moment if process.returncode == -signal.SIGKILL else "it had ended before"


def steps_done(run: Path) -> int:
    rows = metrics(run)
    return int(rows[-1]["step"]) if rows and rows[-1]["step"].isdigit() else 0


def metrics(run: Path) -> list[dict[str, str]]:
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return [{name: text for name, text in row.items() if name and not name.startswith("speed/")} for row in rows]


def end(run: Path) -> dict[str, Any]:
    """What a run leaves behind."""
    if not (run / "result.json").is_file():
        return {"weights": None, "optimizer": None, "best": None, "metrics": None}
    checkpoint = read_checkpoint(step_path(run, STEPS))
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "best": read_checkpoint(run / "checkpoints" / "best.ckpt")["state_dict"],
        "metrics": metrics(run),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def slow_fit(arguments: list[str]) -> int:
    """`moepp fit` that writes its checkpoints in small pieces, as to a slow file system."""
    from moepp.cli import main
    from moepp.training import checkpoint

    at_once = torch.save

    def save(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        at_once(content, whole)
        pieces = 40
        size = -(-len(whole.getbuffer()) // pieces)
        for i in range(pieces):
            file.write(whole.getbuffer()[i * size : (i + 1) * size])
            file.flush()
            time.sleep(0.005)

    checkpoint.torch.save = save
    return main(["fit", *arguments])


def main() -> int:
    if sys.argv[1:2] == ["--slow_fit"]:
        return slow_fit(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description="kill training runs and see that nothing is lost; further options go to moepp fit"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        trials = soak(options.kills, Path(folder), options.seed, more)
    table = Table(title="killed with SIGKILL, continued, compared with an undisturbed run")
    for title in ("", "killed", "continued", "weights", "optimizer", "best", "metrics"):
        table.add_column(title, no_wrap=True)
    for n, trial in enumerate(trials, 1):
        start = "from the start" if trial.resumed is None else f"from step {trial.resumed}"
        table.add_row(str(n), trial.killed, start, *("equal" if ok else "DIFFER" for ok in trial.equal.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    good = sum(all(trial.equal.values()) for trial in trials)
    print(f"{good} of {len(trials)} equal")
    return 0 if good == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
