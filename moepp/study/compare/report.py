"""A study's results as a folder (report.md, results.csv, runs.csv, plots) and as a printed table."""

import math
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markdown import Markdown

from moepp.study.compare import plots, speed
from moepp.study.compare.matrix import Matrix, Run
from moepp.study.compare.results import PAIRED, REFERENCE, Results, read_results
from moepp.study.compare.runs import by_commit
from moepp.study.compare.tune import Search, matters
from moepp.study.style import STYLE, save
from moepp.training.budget import CALIBRATION_TOKENS
from moepp.training.metrics import BITS, FINAL

PLOTS = (plots.differences, plots.curves, plots.constants, plots.tau, plots.compute, plots.frontier, plots.tune)
Row = dict[str, Any]  # of `Results.variants`


def write(matrix: Matrix, runs: list[Run], search: Search, out: Path, command: str) -> int:
    """Write `out`/report, print what it says on quality, and return how many runs have failed."""
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    results = read_results(matrix, runs, search, speed.measure(matrix, runs))
    failed = [run for run in runs if run.failure]
    results.variants.to_csv(folder / "results.csv", lineterminator="\r\n")
    results.runs.filter(regex=f"^(training_flops$|{FINAL})").to_csv(folder / "runs.csv", lineterminator="\r\n")
    if search.trials:
        results.trials.to_csv(folder / "tune.csv", index=False, lineterminator="\r\n")
    text = markdown(results, runs, search, failed, draw(results, folder), command)
    (folder / "report.md").write_text(text)
    console = Console(width=None if sys.stdout.isatty() else 140)
    of_quality = text.partition("\n## Cost")[0]
    console.print(Markdown("".join(line for line in of_quality.splitlines(True) if not line.startswith("!["))))
    print(f"cost, speed and pictures: {folder / 'report.md'}")
    return len(failed)


def draw(results: Results, folder: Path) -> list[str]:
    """Draw what there is data for. Returns the names of these plots."""
    drawn: list[str] = []
    if results.variants.empty:
        return drawn
    for plot in PLOTS:
        with plt.rc_context(STYLE):
            if (figure := plot(results)) is not None:
                save(figure, folder / f"{plot.__name__}.png")
                drawn.append(plot.__name__)
    return drawn


def markdown(
    results: Results, runs: list[Run], search: Search, failed: list[Run], pictures: list[str], command: str
) -> str:
    """The report as text. Its words stand in report.md.jinja."""

    def of_the_runs(template: str) -> str:
        return "; ".join(sorted({template.format_map(run) for run in results.runs.to_dict("records")})) or "none"

    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = results.variants.reset_index().to_dict("records")
    commits = by_commit([run for trial in search.trials for run in trial.runs] + runs)
    of_most = max(commits, key=lambda commit: len(commits[commit]), default="")
    tuned = list(search.trials[0].values) if search.trials else []
    text = templates.get_template("report.md.jinja").render(
        matrix=results.matrix,
        reference=results.matrix.reference.name,
        rows=rows,
        quantities={quantity for variant in results.matrix.variants for quantity in variant.paper},
        val_part=results.matrix.reference.options["data"]["val_part"],
        trials=results.trials.to_dict("records"),
        tuning=results.trials.sum(numeric_only=True),
        tuned=tuned,
        calibration_tokens=CALIBRATION_TOKENS,
        idle=[v.name for v in results.matrix.variants for option in tuned if not matters(option, v)],
        commits=[c if c == of_most else f"{c} made {', '.join(names)}" for c, names in commits.items()],
        domains=[name.removeprefix(f"{FINAL}{BITS}/") for name in results.runs.filter(like=f"{FINAL}{BITS}/")],
        n_seeds=len({run.seed for run in runs}),
        n_intervals=sum(not math.isnan(row["loss_difference_low"]) for row in rows if not row["flops_of"]),
        failed=failed,
        pictures=pictures,
        command=command,
        of_the_runs=of_the_runs,
        mean_sd=mean_sd,
        difference=difference,
        speed_up=speed_up,
        paper=paper,
        duration=duration,
    )
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"  # what is left out leaves empty lines


def mean_sd(row: Row, metric: str) -> str:
    mean, deviation = row[f"{metric}_mean"], row[f"{metric}_sd"]
    return f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


def difference(row: Row, metric: str) -> list[str]:
    """Mean, interval, p, verdict."""
    mean, low, high, p, verdict = (row[f"{metric}_difference{part}"] for part in PAIRED)
    if verdict == REFERENCE:
        return ["", "", "", verdict]
    interval = ["–", "–"] if math.isnan(low) else [f"[{low:+.4f}, {high:+.4f}]", f"{p:.2g}"]
    return ["–" if math.isnan(mean) else f"{mean:+.4f}", *interval, verdict]


def duration(seconds: float) -> str:
    return "–" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))


def speed_up(row: Row, part: str) -> list[str]:
    """Median, quartiles."""
    middle, lower, upper = (row[f"speed_{part}{what}"] for what in ("", "_lower_quartile", "_upper_quartile"))
    return [f"{middle:.2f}×", f"{lower:.2f}–{upper:.2f}"]


def paper(row: Row, quantity: str, unit: str = "") -> str:
    """What the paper has for the variant, by model size."""
    prefix = f"paper_{quantity}/"
    figures = {name: value for name, value in row.items() if name.startswith(prefix) and not math.isnan(value)}
    return ", ".join(f"{name.removeprefix(prefix)}: {value:g}{unit}" for name, value in figures.items())
