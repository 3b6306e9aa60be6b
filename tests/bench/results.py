"""The bench's rows → a table with the targets beside them, and bench.csv."""

import csv
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moepp
from moepp.system.machine import commit, device_name
from tests.bench.layers import PER_EXPERT, SAME_ROWS
from tests.bench.setting import BOTH, Case, Row, Setting
from tests.bench.steps import FLOAT32


@dataclass(frozen=True)
class Target:
    """What a row's value, or where it has an ideal its share of that, should reach.

    Attributes:
        cpu: two cores, float32; None where nothing is asked.
        gpu: one H100, bf16.
        cpu_bf16: two cores that multiply bf16.
        at_most: the value should stay below.
    """

    cpu: float | None
    gpu: float | None
    cpu_bf16: float | None = None
    at_most: bool = False

    def on(self, kind: str) -> float | None:
        """The aim on a `Setting.kind`."""
        aim: float | None = getattr(self, kind)
        return aim


TARGETS = {
    Case("layer", "τ = 0.75", BOTH, PER_EXPERT): Target(0.92, 0.80, 0.75),
    Case("layer", "τ = 0.1", BOTH, PER_EXPERT): Target(0.80, 0.60),
    Case("tau", "τ = 0.75", BOTH): Target(0.95, 0.90),
    Case("step", "MoE++ against Mixtral's best back-end"): Target(1.5, 1.5, 2.0),
    Case("step", "MoE++ against a dense Llama"): Target(1.0, 0.85, 1.1),
    Case("step", f"MoE++ against {FLOAT32}"): Target(None, None, 2.5),
    Case("zero", "τ = 0.75", BOTH): Target(5, 5, at_most=True),
    Case("mfu", "sizes/0.6b.yaml, compiled"): Target(None, 45),
    Case("experts", SAME_ROWS.format(64)): Target(1.25, 1.3, at_most=True),
}


def verdict(row: Row, kind: str) -> str:
    """met, missed, or why there is none; empty for a row without a target."""
    target = TARGETS.get(row.case)
    aim = target.on(kind) if target else None
    if target is None or aim is None:
        return ""
    value = row.value if row.share is None else row.share
    if value is None:
        return "not measured"
    return "met" if (value <= aim if target.at_most else value >= aim) else "missed"


def missing(rows: Sequence[Row], kind: str) -> list[Row]:
    """A row for each aim that nothing was measured for."""
    there = {row.case for row in rows}
    aims = [case for case, target in TARGETS.items() if target.on(kind) is not None]
    return [Row(case, note="not measured on this machine, or left out") for case in aims if case not in there]


# ---- output ------------------------------------------------------------------------------------------------

TITLES = ("", "measured", "", "quartiles", "ideal", "of it", "paper", "target", "", "")


def write(rows: Sequence[Row], kind: str, facts: dict[str, str], folder: Path) -> None:
    """The table as bench.txt and, one line a row, as bench.csv; `facts` are the provenance."""
    with (folder / "bench.csv").open("w", newline="") as file:
        lines = [csv_line(row, kind) | facts for row in rows]
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    with (folder / "bench.txt").open("w") as file:
        show(rows, kind, facts, Console(file=file, width=240))


def show(rows: Sequence[Row], kind: str, facts: dict[str, str], console: Console) -> None:
    """The table and what it was measured on."""
    console.print(table(rows, kind))
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False, soft_wrap=True)


def table(rows: Sequence[Row], kind: str) -> Table:
    shown = Table(box=SIMPLE, padding=(0, 1))
    for title in TITLES:
        shown.add_column(title, justify="left" if title == "" else "right")
    section = None
    for row in rows:
        if row.case.section != section:
            section = row.case.section
            shown.add_section()
            shown.add_row(f"[bold]{section}")
        shown.add_row(*cells(row, kind))
    return shown


def cells(row: Row, kind: str) -> tuple[str, ...]:
    target = TARGETS.get(row.case)
    aim = target.on(kind) if target else None
    quartiles = "–".join(number(q) for q in row.quartiles) if row.quartiles and row.rounds > 1 else ""
    return (
        row.case.name,
        number(row.value),
        row.unit,
        quartiles,
        number(row.ideal),
        number(row.share),
        number(row.paper),
        f"{'≤' if target.at_most else '≥'} {aim:g}" if target and aim is not None else "",
        verdict(row, kind),
        row.note,
    )


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def csv_line(row: Row, kind: str) -> dict[str, Any]:
    target = TARGETS.get(row.case)
    lower, upper = row.quartiles or (None, None)
    return {
        "section": row.case.section,
        "name": row.case.name,
        "value": row.value,
        "unit": row.unit,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "rounds": row.rounds,
        "ideal": row.ideal,
        "share_of_ideal": row.share,
        "paper_share_of_ideal": row.paper,
        "target": target.on(kind) if target else None,
        "verdict": verdict(row, kind),
        "note": row.note,
    }


def provenance(at: Setting, command: str) -> dict[str, str]:
    """Machine, versions, sizes, command and commit."""
    t = at.sizes.transformer
    machine = f"{device_name(at.device)}, {processor()}, {os.cpu_count()} CPU cores"
    return {
        "machine": f"{machine}, {at.dtype}".replace("torch.", ""),
        "versions": f"moepp {moepp.__version__}, torch {torch.__version__}, "
        f"transformers {installed('transformers')}, Python {platform.python_version()}",
        "layer": f"T = {at.sizes.n_tokens:,}, D = {t.hidden_size}, H = {t.intermediate_size}",
        "model": f"{t.n_layers} layers of these sizes, V = {t.vocab_size:,}, "
        f"{at.sizes.batch_size} × {t.context_length} tokens",
        "command": command,
        "commit": commit(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
