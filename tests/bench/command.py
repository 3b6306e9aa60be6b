"""`make bench`: how fast the layer and the training step are, against their limits and peers, in one table.

    setting.py  where and at which sizes, and the rows of the table
    peers.py    what is compared with, and how routing is forced
    layers.py   the layer: limits, τ, zero-computation experts, growth
    steps.py    the training step: peers, memory, MFU
    start.py    data and start-up
    devices.py  several devices: bytes sent, time, memory; ranks.py is what each of them does
    results.py  targets, table, CSV
    plots.py    the picture

All functions that a row compares take turns in one process; a row is the median over rounds of their ratio within
a round. Outputs are compared before anything is timed (peers.check). Data are random.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moepp.model import InputError
from moepp.system.machine import default_precision, keep_freed_memory, quiet_lightning
from tests.bench import devices, layers, plots, results, start, steps
from tests.bench.peers import NotEqual
from tests.bench.setting import SIZES, Case, Row, Setting

PRECISIONS = ("32-true", "bf16-mixed")
SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "layer": layers.layer,
    "tau": layers.tau,
    "zero": layers.zero_computation,
    "tokens": layers.tokens,
    "experts": layers.experts,
    "constants": layers.constants,
    "step": steps.step,
    "mfu": steps.mfu,
    "start": start.start,
    "devices": devices.devices,
}


class Options(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__("make bench", description="Speed against limits and peers: a table, a CSV and a plot.")
        self.add_argument("--size", choices=SIZES, help="of layer and model (default: by device)")
        self.add_argument("--only", metavar="A,B", help=f"sections out of {','.join(SECTIONS)} (default: all)")
        self.add_argument(
            "--precision", choices=PRECISIONS, help="of ours and all peers (default: as `moepp fit`)"
        )
        self.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.csv and bench.png")
        self.add_argument("--quick", action="store_true", help="few rounds and no devices: to see that it works")

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(arguments: list[str]) -> None:
    options = Options().parse_args(arguments)
    slow = {"devices"} if options.quick else set()  # minutes on few cores
    wanted = options.only.split(",") if options.only else [name for name in SECTIONS if name not in slow]
    if unknown := set(wanted) - set(SECTIONS):
        raise InputError(f"only: no section {min(unknown)!r}: use {', '.join(SECTIONS)}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = SIZES[options.size or ("gpu" if on_gpu else "cpu")]
    rounds, seconds = (3, 0.0) if options.quick else (15, 6.0)
    at = Setting(sizes, device, rounds, seconds, options.precision or default_precision(device))
    keep_freed_memory(device)  # as `moepp fit` does
    # as many sizes of one layer are compiled; beyond the limit one would run uncompiled, without a word
    torch._dynamo.config.recompile_limit = 64
    options.out.mkdir(parents=True, exist_ok=True)
    quiet_lightning()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which counts memory on a CPU

    rows: list[Row] = []
    broken: list[str] = []
    facts = results.provenance(at, shlex.join(["python", "-m", "tests.bench", *arguments]))

    def keep(row: Row) -> None:
        """Whatever cuts the bench off, what was measured is in the file."""
        rows.append(row)
        results.write([*rows, *results.missing(rows, at.kind)], at.kind, facts, options.out)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in wanted:
            task = progress.add_task(name, total=1)
            if not progress.console.is_terminal:
                progress.console.print(f"measuring {name}")
            torch.manual_seed(0)
            torch.compiler.reset()
            try:
                for row in SECTIONS[name](at):
                    keep(row)
            except NotEqual as error:
                message = f"moepp bench: {name}: {error}: not the same computation, so it is not timed"
                raise SystemExit(message) from error
            except torch.OutOfMemoryError:
                keep(Row(Case(name, "the rest"), note="left out: does not fit the memory"))
            except Exception as error:  # the other sections' figures are worth having, minutes of a GPU's time
                traceback.print_exc()
                broken.append(name)
                keep(Row(Case(name, "the rest"), note=f"broken: {type(error).__name__}: {error}"))
            progress.update(task, completed=1)

    table = [*rows, *results.missing(rows, at.kind)]
    results.show(table, at.kind, facts, Console(width=None if sys.stdout.isatty() else 240))
    plots.bench(options.out / "bench.png", rows)
    print(options.out / "bench.csv", options.out / "bench.png", file=sys.stderr)
    if broken:
        raise SystemExit(f"moepp bench: {', '.join(broken)} ended in an error, printed above")
