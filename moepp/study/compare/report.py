"""A study's results → report.md, results.csv, runs.csv and plots in `report/` under its folder, and a table printed."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moepp.study.compare import plots, speed
from moepp.study.compare.matrix import Matrix, Run
from moepp.study.compare.results import Results, read_results
from moepp.study.compare.stats import verdict
from moepp.study.style import STYLE, save
from moepp.training.metrics import BITS, FINAL

NOT_IN_CSV = ["equal_flops_loss", "equal_flops_reference_loss", "speed_rounds", "tau", "n_const"]
PLOTS = {
    "differences": (plots.differences, "Differences in loss with 95 % intervals"),
    "curves": (plots.loss_curves, "Validation loss against tokens and FLOPs"),
    "constants": (plots.constants, "Loss against the number of constant experts"),
    "tau": (plots.tau, "Expert-forward speed-up against τ"),
}


def write(matrix: Matrix, runs: list[Run], out: Path, command: str) -> int:
    """Write the report, print its main table, and return how many runs have failed."""
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    results = read_results(matrix, runs, speed.measure(matrix, runs, out / "timing.json"))
    failed = [run for run in runs if run.failure]
    by_variant = results.variants.drop(columns=NOT_IN_CSV, errors="ignore")
    by_run = results.runs.filter(regex=f"^(training_flops$|{FINAL})")
    for name, frame in (("results.csv", by_variant), ("runs.csv", by_run)):
        frame.to_csv(folder / name, lineterminator="\r\n")
    pictures = draw(results, folder)
    (folder / "report.md").write_text(markdown(results, runs, failed, pictures, command))
    print_table(results, failed, folder)
    return len(failed)


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draw what there is data for. Returns the pictures as Markdown, by plot."""
    pictures = dict.fromkeys(PLOTS, "")
    for name, (plot, caption) in PLOTS.items():
        with plt.rc_context(STYLE):
            if (figure := plot(results)) is not None:
                save(figure, folder / f"{name}.png")
                pictures[name] = f"![{caption}]({name}.png)"
    return pictures


# ---- Markdown ----------------------------------------------------------------------------------------------


def markdown(results: Results, runs: list[Run], failed: list[Run], pictures: dict[str, str], command: str) -> str:
    matrix, variants, reference = results.matrix, results.variants, results.matrix.reference.name
    seeds = len({run.seed for run in runs})
    parts = [
        f"# {matrix.path.stem}: {len(matrix.variants)} variants, {seeds} seed{'s' * (seeds > 1)}, "
        f"against {reference}",
        provenance(results, command),
    ]
    if failed:
        parts += ["## Runs that failed", "\n".join(f"- {run.name}: {run.failure}" for run in failed)]
    if variants.empty:
        return "\n\n".join([*parts, "No run has finished.\n"])
    domains = [name.partition("/")[2] for name in variants.filter(like=f"{BITS}_mean/")]
    parts += [
        "## Quality at equal tokens",
        table(
            ["variant", "seeds", "loss", "bits per byte", f"− {reference}", "95 % interval", "p", "", "paper"],
            [[*quality(row, reference), paper(variants, row, "accuracy")] for row in variants.itertuples()],
        ),
        f"Loss in nats per token and bits per byte, on all held-out text: mean ± s.d. over seeds. Differences are "
        f"paired: a seed gives each variant the same data in the same order and the same initial weights of what "
        f"they share; interval and p are of the paired t-test. Bits per byte leaves out the ends of "
        f"texts; its differences are in results.csv. {multiplicity(variants)}\n\n{source(matrix, 'accuracy')}",
        pictures["differences"],
        pictures["curves"],
        pictures["constants"],
        "## Quality at equal training FLOPs",
        table(
            ["variant", "FLOPs", "loss", f"{reference}'s loss", "difference", "95 % interval", "p", ""],
            map(equal_flops, variants.dropna(subset="equal_flops").itertuples()),
        ),
        "Read off the validation curves, on the straight line between two validations, where both have spent the "
        "FLOPs in the second column: the most that both reached, the last validation of the cheaper one. There "
        "the dearer one's learning rate has not finished its decay, which counts against it; a strict comparison "
        "trains it for fewer steps, or the cheaper one for more (trainer.max_steps of a variant). These losses "
        "are of the text validated on during training, not of all held-out text.",
        "## Cost",
        table(
            [
                "variant",
                "parameters",
                "active per token",
                "FFN experts per token",
                "expected",
                "FFN FLOPs per token",
                "training tokens",
                "training FLOPs",
            ],
            map(cost, variants.itertuples()),
        ),
        "Active parameters and FFN experts per token (of a layer) as measured on the held-out text; expected is "
        "K·τ·N_FFN / (τ·N_FFN + N_ZC), perfect balance. FLOPs per token are of a forward pass; a training step "
        "takes three times as many.",
        "## Speed",
        table(
            ["variant", "tokens/s", "training", "quartiles", "expert forward", "quartiles", "ideal", "paper"],
            [[*speeds(row), paper(variants, row, "speedup", "×")] for row in timed(variants).itertuples()],
        ),
        speed_note(results),
        pictures["tau"],
        "## Bits per byte by domain",
        table(
            ["variant", *domains],
            [
                [name, *(mean_sd(row[f"{BITS}_mean/{domain}"], row[f"{BITS}_sd/{domain}"]) for domain in domains)]
                for name, row in variants.iterrows()
            ],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(results: Results, command: str) -> str:
    """What these results came from."""

    def of_the_runs(template: str) -> str:
        return "; ".join(sorted({template.format_map(run) for run in results.runs.to_dict("records")})) or "none"

    reference = results.matrix.reference
    return (
        f"- command: `{command}`\n"
        f"- commit: {of_the_runs('{commit}')}\n"
        f"- machine: {of_the_runs('{device}, {precision}; {machine}')}\n"
        f"- versions: {of_the_runs('moepp {moepp}, torch {torch}, Python {python}')}\n"
        f"- reference: {reference.name}, {reference.steps} steps, "
        f"{reference.tokens:,} training tokens of {reference.options['data']['path']}"
    )


def multiplicity(variants: pd.DataFrame) -> str:
    n = variants["loss_difference_low"].count()
    if n == 0:
        return "With a single seed there is no interval and nothing is shown."
    if n == 1:
        return ""
    return (
        f"There are {n} comparisons and no correction for their number: were no variant different, about "
        f"{0.05 * n:.1f} of them would exclude zero by chance."
    )


def source(matrix: Matrix, quantity: str) -> str:
    """What the column `paper` holds."""
    return f"Paper: {matrix.sources[quantity]}." if quantity in matrix.sources else ""


def speed_note(results: Results) -> str:
    rounds, name = timed(results.variants)["speed_rounds"].min(), results.matrix.reference.name
    if math.isnan(rounds):
        return f"Not measured: {name} has no finished run with a checkpoint."
    return (
        f"Relative to {name}, measured in one process with the trained models in turn on the same batch: "
        f"the median of {rounds} or more rounds' ratios, and their quartiles; above 1 is faster. {name} "
        f"against itself shows the noise. Training is a whole optimizer step without data loading; tokens/s is "
        f"{name}'s in the comparison that was disturbed least, times this ratio. Expert forward is the FFN and "
        f"zero-computation experts of all layers, given the routing. Ideal is the ratio of expected FFN FLOPs, "
        f"(τ·N_FFN + N_ZC) / (τ·N_FFN) against vanilla MoE.\n\n"
        f"{source(results.matrix, 'speedup')}"
    )


def timed(variants: pd.DataFrame) -> pd.DataFrame:
    return variants[variants["speed_rounds"] > 0]


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- the cells of a table's row, from a named tuple of the variant's columns -------------------------------


def quality(row: Any, reference: str) -> list[str]:
    loss, bits = mean_sd(row.loss_mean, row.loss_sd), mean_sd(row.bits_per_byte_mean, row.bits_per_byte_sd)
    difference = ["", "", "", "reference"] if row.Index == reference else differences(row, "loss_difference")
    return [row.Index, str(row.seeds), loss, bits, *difference]


def differences(row: Any, name: str) -> list[str]:
    mean, low, high, p = (getattr(row, name + part) for part in ("", "_low", "_high", "_p"))
    interval = ["–", "–"] if math.isnan(low) else [f"[{low:+.4f}, {high:+.4f}]", f"{p:.2g}"]
    return ["–" if math.isnan(mean) else f"{mean:+.4f}", *interval, verdict(low, high)]


def equal_flops(row: Any) -> list[str]:
    losses = [f"{row.equal_flops_loss:.4f}", f"{row.equal_flops_reference_loss:.4f}"]
    return [row.Index, f"{row.equal_flops:.3g}", *losses, *differences(row, "equal_flops_loss_difference")]


def cost(row: Any) -> list[str]:
    return [
        row.Index,
        f"{row.parameters:,}",
        f"{row.active_parameters_per_token:,}",
        f"{row.ffn_experts_per_token:.3f}",
        f"{row.ffn_experts_per_token_expected:.3f}",
        f"{row.ffn_flops_per_token:.3g}",
        f"{row.training_tokens:,}",
        f"{row.training_flops:.3g}",
    ]


def speeds(row: Any) -> list[str]:
    cells = [row.Index, f"{row.speed_tokens_per_second:,.0f}"]
    for name in ("speed_training", "speed_expert_forward"):
        middle, lower, upper = (getattr(row, name + part) for part in ("", "_lower_quartile", "_upper_quartile"))
        cells += [f"{middle:.2f}×", f"{lower:.2f}–{upper:.2f}"]
    return [*cells, f"{row.speedup_ideal:.2f}×"]


def paper(variants: pd.DataFrame, row: Any, quantity: str, unit: str = "") -> str:
    """What the paper has for the variant, by model size."""
    prefix = f"paper_{quantity}/"
    values = variants.loc[row.Index].filter(like=prefix).dropna()
    return ", ".join(f"{name.removeprefix(prefix)}: {value:g}{unit}" for name, value in values.items())


def mean_sd(mean: float, deviation: float) -> str:
    return f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


# ---- terminal ----------------------------------------------------------------------------------------------


def print_table(results: Results, failed: list[Run], folder: Path) -> None:
    matrix, reference = results.matrix, results.matrix.reference.name
    console = Console(width=None if sys.stdout.isatty() else 140)
    shown = Table(title=f"{matrix.path.stem}: final validation loss in nats per token, over seeds", box=SIMPLE)
    shown.add_column("variant", no_wrap=True)
    for title in ("loss", f"− {reference}", "95 % interval", "p", "", "FFN/token", "expert speed"):
        shown.add_column(title, justify="right", no_wrap=True)
    rows = {row.Index: row for row in results.variants.itertuples()}
    for variant in matrix.variants:
        if (row := rows.get(variant.name)) is None:
            shown.add_row(variant.name, "no run finished")
            continue
        name, _, loss, _, *difference = quality(row, reference)
        expert_speed = f"{row.speed_expert_forward:.2f}×" if row.speed_rounds else "–"
        shown.add_row(name, loss, *difference, f"{row.ffn_experts_per_token:.2f}", expert_speed)
    console.print(shown)
    for run in failed:
        console.print(f"{run.name} failed: {run.failure}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True)
