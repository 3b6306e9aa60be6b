"""A study's runs → report.md, results.csv, runs.csv and plots, in `report/` under the study's folder."""

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moepp.model import count_parameters
from moepp.study.compare import plots, speed
from moepp.study.compare.matrix import Matrix, Run, Variant
from moepp.study.compare.results import Result, at_equal_flops, read_result
from moepp.study.compare.speed import Ratio, Speed
from moepp.study.compare.stats import Paired, mean_sd, paired
from moepp.training.checkpoint import last_checkpoint


@dataclass
class Row:
    """All that a study knows of one variant."""

    variant: Variant
    results: dict[int, Result]  # by seed, of the finished runs
    reference: "Row | None" = None  # None: this is the reference
    speed: Speed | None = None

    def final(self, name: str) -> dict[int, float]:
        return {seed: result.final[f"final/{name}"] for seed, result in self.results.items()}

    def mean(self, name: str) -> float:
        return mean_sd(list(self.final(name).values()))[0]

    @cached_property
    def loss_difference(self) -> Paired | None:
        return paired(self.final("loss"), self.reference.final("loss")) if self.reference else None

    @cached_property
    def bits_difference(self) -> Paired | None:
        return (
            paired(self.final("bits_per_byte"), self.reference.final("bits_per_byte")) if self.reference else None
        )

    @cached_property
    def equal_flops(self) -> "EqualFlops | None":
        if self.reference is None or not (found := at_equal_flops(self.results, self.reference.results)):
            return None
        ours = {seed: loss for seed, (_, loss, _) in found.items()}
        theirs = {seed: loss for seed, (_, _, loss) in found.items()}
        difference = paired(ours, theirs)
        return EqualFlops(mean_sd([budget for budget, _, _ in found.values()])[0], ours, theirs, difference)

    @property
    def parameters(self) -> int:
        return count_parameters(self.variant.transformer, self.variant.moe).total

    @property
    def active_parameters(self) -> float:
        """Per token, with the measured FFN experts."""
        return count_parameters(self.variant.transformer, self.variant.moe).active(self.mean("ffn_per_token"))

    def ffn_flops(self, ffn_per_token: float) -> float:
        """Of the FFN experts, per token, forward."""
        t = self.variant.transformer
        return t.n_layers * ffn_per_token * 6 * t.hidden_size * t.intermediate_size

    @property
    def ffn_expected(self) -> float:
        """FFN experts per token and layer at perfect balance."""
        return self.variant.moe.expected_ffn_per_token

    @property
    def ideal_speedup(self) -> float:
        """Of the experts over the reference's, if nothing but FFN experts took time and balance were perfect."""
        reference = self.reference or self
        return reference.ffn_flops(reference.ffn_expected) / self.ffn_flops(self.ffn_expected)

    @property
    def training_flops(self) -> float:
        return mean_sd([result.flops for result in self.results.values()])[0]

    def domain(self, name: str) -> tuple[float, float]:
        return mean_sd([result.domains[name] for result in self.results.values()])


@dataclass(frozen=True)
class EqualFlops:
    """Both sides' validation loss where the same training FLOPs were spent; losses by seed."""

    flops: float
    ours: dict[int, float] = field(repr=False)
    theirs: dict[int, float] = field(repr=False)
    difference: Paired


def write(matrix: Matrix, runs: list[Run], out: Path, command: str) -> int:
    """Write the report, print its main table, and return how many runs have failed."""
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    rows = read_rows(matrix, runs)
    add_speed(matrix, rows, out)
    failed = [run for run in runs if run.failure]
    with_results = [row for row in rows if row.results]
    write_csv(folder / "results.csv", [csv_row(row) for row in with_results])
    write_csv(folder / "runs.csv", [csv_run(result) for row in rows for result in row.results.values()])
    pictures = draw(matrix, with_results, folder)
    text = markdown(matrix, rows, runs, failed, pictures, command)
    (folder / "report.md").write_text(text)
    print_table(matrix, rows, failed, folder)
    return len(failed)


def read_rows(matrix: Matrix, runs: list[Run]) -> list[Row]:
    """In the matrix's order."""
    results: dict[str, dict[int, Result]] = {variant.name: {} for variant in matrix.variants}
    for run in runs:
        if run.finished:
            results[run.variant.name][run.seed] = read_result(run)
    reference = Row(matrix.reference, results[matrix.reference.name])
    return [
        reference if variant is matrix.reference else Row(variant, results[variant.name], reference)
        for variant in matrix.variants
    ]


def add_speed(matrix: Matrix, rows: list[Row], out: Path) -> None:
    """Time a trained model of each variant against the reference's; that against itself shows the noise."""
    trained = {}
    for row in rows:
        # one is enough: to see that a checkpoint is whole, all of it is read
        runs = (result.run for _, result in sorted(row.results.items()))
        if (run := next((run for run in runs if last_checkpoint(run.folder)), None)) is not None:
            trained[row.variant.name] = run
    if matrix.reference.name not in trained:
        return
    speeds = speed.measure(list(trained.values()), trained[matrix.reference.name], out / "timing.json")
    for row in rows:
        row.speed = speeds.get(row.variant.name)


# ---- tables ------------------------------------------------------------------------------------------------


def csv_row(row: Row) -> dict[str, Any]:
    """One variant. Columns that begin with `speed` are timings; all others are the same on every repetition."""
    loss, bits = (mean_sd(list(row.final(name).values())) for name in ("loss", "bits_per_byte"))
    difference = row.loss_difference or Paired(0, math.nan)
    equal = row.equal_flops
    equal_difference = equal.difference if equal else Paired(0, math.nan)
    ffn = row.mean("ffn_per_token")
    columns: dict[str, Any] = {
        "variant": row.variant.name,
        "seeds": len(row.results),
        "parameters": row.parameters,
        "active_parameters_per_token": round(row.active_parameters),
        "ffn_experts_per_token": ffn,
        "ffn_experts_per_token_expected": row.ffn_expected,
        "ffn_flops_per_token": row.ffn_flops(ffn),
        "training_tokens": row.variant.tokens,
        "training_flops": row.training_flops,
        "loss_mean": loss[0],
        "loss_sd": loss[1],
        "bits_per_byte_mean": bits[0],
        "bits_per_byte_sd": bits[1],
        **csv_difference("loss_difference", difference),
        **csv_difference("bits_per_byte_difference", row.bits_difference or Paired(0, math.nan)),
        "equal_flops": equal.flops if equal else math.nan,
        **csv_difference("equal_flops_loss_difference", equal_difference),
        "speedup_ideal": row.ideal_speedup,
    }
    if row.speed:
        columns |= {"speed_tokens_per_second": row.speed.tokens_per_second}
        for name in ("training", "expert_forward"):
            measured: Ratio = getattr(row.speed, name)
            columns |= {
                f"speed_{name}": measured.median,
                f"speed_{name}_lower_quartile": measured.lower_quartile,
                f"speed_{name}_upper_quartile": measured.upper_quartile,
            }
    for domain in domains([row]):
        columns[f"bits_per_byte_mean/{domain}"], columns[f"bits_per_byte_sd/{domain}"] = row.domain(domain)
    for quantity, values in row.variant.paper.items():
        columns |= {f"paper_{quantity}/{size}": value for size, value in values.items()}
    return columns


def csv_difference(name: str, difference: Paired) -> dict[str, Any]:
    return {
        name: difference.mean,
        f"{name}_low": difference.low,
        f"{name}_high": difference.high,
        f"{name}_p": difference.p,
    }


def csv_run(result: Result) -> dict[str, Any]:
    final = {name: value for name, value in result.final.items() if name.startswith("final/")}
    return {"variant": result.run.variant.name, "seed": result.run.seed, "training_flops": result.flops, **final}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})


def markdown(
    matrix: Matrix, rows: list[Row], runs: list[Run], failed: list[Run], pictures: dict[str, str], command: str
) -> str:
    reference = matrix.reference.name
    done = [row for row in rows if row.results]
    seeds = len({run.seed for run in runs})
    parts = [
        f"# {matrix.path.stem}: {len(rows)} variants, {seeds} seed{'s' * (seeds > 1)}, against {reference}",
        "\n".join(provenance(matrix, done, command)),
    ]
    if failed:
        parts += ["## Runs that failed", "\n".join(f"- {run.name}: {run.failure}" for run in failed)]
    if not done:
        return "\n\n".join([*parts, "No run has finished.\n"])
    parts += [
        "## Quality at equal tokens",
        table(
            ["variant", "seeds", "loss", "bits per byte", f"− {reference}", "95 % interval", "p", "", "paper"],
            [quality_cells(row) for row in done],
        ),
        f"Loss in nats per token and bits per byte, on all held-out text: mean ± s.d. over seeds. Differences are "
        f"paired: a seed gives each variant the same data in the same order and the same initial weights of what "
        f"they share; interval and p are of the paired t-test. Bits per byte leaves out the ends of "
        f"texts; its differences are in results.csv. {multiplicity(done)}\n\n{source(matrix, 'accuracy')}",
        picture(pictures, "differences", "Differences in loss with 95 % intervals"),
        picture(pictures, "curves", "Validation loss against tokens and FLOPs"),
        picture(pictures, "constants", "Loss against the number of constant experts"),
        "## Quality at equal training FLOPs",
        table(
            ["variant", "FLOPs", "loss", f"{reference}'s loss", "difference", "95 % interval", "p", ""],
            [equal_flops_cells(row) for row in done if row.equal_flops],
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
            [cost_cells(row) for row in done],
        ),
        "Active parameters and FFN experts per token (of a layer) as measured on the held-out text; expected is "
        "K·τ·N_FFN / (τ·N_FFN + N_ZC), perfect balance. FLOPs per token are of a forward pass; a training step "
        "takes three times as many.",
        "## Speed",
        table(
            ["variant", "tokens/s", "training", "quartiles", "expert forward", "quartiles", "ideal", "paper"],
            [speed_cells(row) for row in done if row.speed],
        ),
        f"{speed_note(matrix, done)}",
        picture(pictures, "tau", "Expert-forward speed-up against τ"),
    ]
    names = domains(done)
    parts += [
        "## Bits per byte by domain",
        table(["variant", *names], [[row.variant.name, *(pm(row.domain(n), 4) for n in names)] for row in done]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(matrix: Matrix, done: list[Row], command: str) -> list[str]:
    """What these results came from."""
    finals = [result.final for row in done for result in row.results.values()]

    def of_the_runs(template: str) -> str:
        return "; ".join(sorted({template.format_map(final) for final in finals})) or "none"

    return [
        f"- command: `{command}`",
        f"- commit: {of_the_runs('{commit}')}",
        f"- machine: {of_the_runs('{device}, {precision}; {machine}')}",
        f"- versions: {of_the_runs('moepp {moepp}, torch {torch}, Python {python}')}",
        f"- reference: {matrix.reference.name}, {matrix.reference.steps} steps, "
        f"{matrix.reference.tokens:,} training tokens of {matrix.reference.options['data']['path']}",
    ]


def quality_cells(row: Row) -> list[str]:
    return [
        row.variant.name,
        str(len(row.results)),
        pm(mean_sd(list(row.final("loss").values())), 4),
        pm(mean_sd(list(row.final("bits_per_byte").values())), 4),
        *difference_cells(row.loss_difference),
        paper(row, "accuracy"),
    ]


def difference_cells(difference: Paired | None) -> list[str]:
    if difference is None:
        return ["", "", "", "reference"]
    interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]" if difference.n > 1 else "–"
    p = f"{difference.p:.2g}" if difference.n > 1 else "–"
    return [f"{difference.mean:+.4f}" if difference.n else "–", interval, p, difference.verdict]


def equal_flops_cells(row: Row) -> list[str]:
    equal = row.equal_flops
    assert equal is not None
    losses = [f"{mean_sd(list(side.values()))[0]:.4f}" for side in (equal.ours, equal.theirs)]
    return [row.variant.name, f"{equal.flops:.3g}", *losses, *difference_cells(equal.difference)]


def cost_cells(row: Row) -> list[str]:
    ffn = row.mean("ffn_per_token")
    return [
        row.variant.name,
        f"{row.parameters:,}",
        f"{row.active_parameters:,.0f}",
        f"{ffn:.3f}",
        f"{row.ffn_expected:.3f}",
        f"{row.ffn_flops(ffn):.3g}",
        f"{row.variant.tokens:,}",
        f"{row.training_flops:.3g}",
    ]


def speed_cells(row: Row) -> list[str]:
    assert row.speed is not None
    cells = [row.variant.name, f"{row.speed.tokens_per_second:,.0f}"]
    for measured in (row.speed.training, row.speed.expert_forward):
        cells += [f"{measured.median:.2f}×", f"{measured.lower_quartile:.2f}–{measured.upper_quartile:.2f}"]
    return [*cells, f"{row.ideal_speedup:.2f}×", paper(row, "speedup", "×")]


def speed_note(matrix: Matrix, done: list[Row]) -> str:
    rounds = [row.speed.expert_forward.rounds for row in done if row.speed]
    if not rounds:
        return f"Not measured: {matrix.reference.name} has no finished run with a checkpoint."
    name = matrix.reference.name
    return (
        f"Relative to {name}, measured in one process with the trained models in turn on the same batch: "
        f"the median of {min(rounds)} or more rounds' ratios, and their quartiles; above 1 is faster. {name} "
        f"against itself shows the noise. Training is a whole optimizer step without data loading; tokens/s is "
        f"{name}'s in the comparison that was disturbed least, times this ratio. Expert forward is the FFN and "
        f"zero-computation experts of all layers, given the routing. Ideal is the ratio of expected FFN FLOPs, "
        f"(τ·N_FFN + N_ZC) / (τ·N_FFN) against vanilla MoE.\n\n"
        f"{source(matrix, 'speedup')}"
    )


def multiplicity(done: list[Row]) -> str:
    n = sum(row.loss_difference is not None and row.loss_difference.n > 1 for row in done)
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


def paper(row: Row, quantity: str, unit: str = "") -> str:
    values = row.variant.paper.get(quantity, {})
    return ", ".join(f"{size}: {value:g}{unit}" for size, value in values.items())


def domains(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for result in row.results.values() for name in result.domains))


def pm(value: tuple[float, float], digits: int) -> str:
    mean, deviation = value
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(pictures: dict[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({pictures[name]})" if name in pictures else ""


def print_table(matrix: Matrix, rows: list[Row], failed: list[Run], folder: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    shown = Table(title=f"{matrix.path.stem}: final validation loss in nats per token, over seeds", box=SIMPLE)
    titles = ["loss", f"− {matrix.reference.name}", "95 % interval", "p", "", "FFN/token", "expert speed"]
    shown.add_column("variant", no_wrap=True)
    for title in titles:
        shown.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if not row.results:
            shown.add_row(row.variant.name, "no run finished")
            continue
        cells = quality_cells(row)
        speed = f"{row.speed.expert_forward.median:.2f}×" if row.speed else "–"
        shown.add_row(cells[0], cells[2], *cells[4:8], f"{row.mean('ffn_per_token'):.2f}", speed)
    console.print(shown)
    for run in failed:
        console.print(f"{run.name} failed: {run.failure}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True)


# ---- plots -------------------------------------------------------------------------------------------------


def draw(matrix: Matrix, rows: list[Row], folder: Path) -> dict[str, str]:
    """Draw what there is data for. Returns file names by plot."""
    drawn: dict[str, str] = {}
    reference = matrix.reference.name

    def path(name: str) -> Path:
        drawn[name] = f"{name}.png"
        return folder / drawn[name]

    compared = {row.variant.name: row.loss_difference for row in rows if row.loss_difference}
    compared = {name: difference for name, difference in compared.items() if difference.n}
    curves = {
        row.variant.name: [result.curve for result in row.results.values()] for row in rows if wants(row, "curves")
    }
    curves = {name: seeds for name, seeds in curves.items() if len(seeds[0].loss) > 1}
    if curves:
        plots.loss_curves(path("curves"), curves)
    if compared:
        plots.differences(path("differences"), compared, reference)
    by_number = {
        row.variant.moe.n_const: compared[row.variant.name]
        for row in rows
        if wants(row, "constants") and row.variant.name in compared
    }
    if len(by_number) > 1:
        plots.constants(path("constants"), by_number, reference)
    by_tau = {row.variant.moe.tau: row for row in rows if wants(row, "tau") and row.speed}
    if len(by_tau) > 1:
        papers = {tau: row.variant.paper.get("speedup", {}) for tau, row in by_tau.items()}
        sizes = dict.fromkeys(size for values in papers.values() for size in values)
        plots.tau(
            path("tau"),
            {tau: row.speed.expert_forward for tau, row in by_tau.items() if row.speed},
            {tau: row.ideal_speedup for tau, row in by_tau.items()},
            {size: {tau: values[size] for tau, values in papers.items() if size in values} for size in sizes},
        )
    return drawn


def wants(row: Row, plot: str) -> bool:
    return plot in row.variant.plots
