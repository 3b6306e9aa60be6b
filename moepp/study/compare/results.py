"""What a study found, in two frames: a row per finished run, and a row per variant with all that is said of it.

The report, its CSVs and its plots show these numbers and compute none.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from moepp.model import InputError, TransformerConfig, count_parameters
from moepp.study.compare.matrix import Matrix, Run, Start, Variant
from moepp.study.compare.tune import Search
from moepp.training.metrics import BITS, FFN, FFN_PER_TOKEN, FINAL, LOSS, STEP, TOKENS, VAL

PAIRED = ("", "_low", "_high", "_p", "_verdict")  # of a difference's columns, what stands after `_difference`
REFERENCE = "reference"  # its own verdict
Curves = dict[int, pd.DataFrame]  # of a variant's runs by seed, see `read_curve`


@dataclass(frozen=True)
class Results:
    """Of a study.

    Args:
        curves: by variant, of its finished runs.
        runs: by (variant, seed): all of result.json, and `training_flops`.
        variants: by name, of those with a finished run, in the matrix's order. The columns that begin with `speed`
            are timings, and stand empty or are missing where there are none; all others are the same on every
            repetition.
        trials: a row for each of the search, if there was one: its variant, values, `loss` on the text chosen by,
            the mean of so many `runs`, their `training_flops` and `seconds` in all, or a `failure`; whether its
            variant took them (`chosen`), and which of these are the least or the most that was tried
            (`at_the_edge`).
    """

    matrix: Matrix
    curves: dict[str, Curves]
    runs: pd.DataFrame
    variants: pd.DataFrame
    trials: pd.DataFrame

    def shown_in(self, plot: str) -> pd.DataFrame:
        """The variants that belong in a plot."""
        names = [variant.name for variant in self.matrix.variants if plot in variant.plots]
        return self.variants[self.variants.index.isin(names)]


def read_results(matrix: Matrix, runs: list[Run], search: Search, speeds: dict[str, dict[str, float]]) -> Results:
    """What the finished ones of `runs` left in their folders, compared; with what was timed, by variant."""
    finished = [run for variant in matrix.variants for run in runs if run.variant is variant and run.finished]
    curves: dict[str, Curves] = {variant.name: {} for variant in matrix.variants}
    rows = []
    for run in finished:
        curves[run.variant.name][run.seed], flops = read_curve(run)
        rows.append({"training_flops": flops, **run.result})
    keys = [(run.variant.name, run.seed) for run in finished]
    by_run = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(keys, names=["variant", "seed"]))
    rows = [
        compare(variant, matrix.reference, by_run, curves, speeds.get(variant.name, {}))
        | ({} if matrix.start is None else {"largest_rise": largest_rise(matrix.start, curves[variant.name])})
        for variant in matrix.variants
        if curves[variant.name]
    ]
    by_variant = pd.DataFrame(rows, index=by_run.index.unique("variant"))
    return Results(matrix, curves, by_run, by_variant, read_trials(search))


def read_trials(search: Search) -> pd.DataFrame:
    """See `Results.trials`."""
    rows = []
    for trial in search.trials:
        name = trial.variant.name
        row = {"variant": name, **trial.values, "loss": trial.loss, "chosen": trial is search.best[name]}
        row |= {"steps": trial.steps, "runs": trial.seeds, "failure": trial.failed.failure if trial.failed else ""}
        tried = [other.values for other in search.trials if other.variant is trial.variant]
        for option, value in trial.values.items() if row["chosen"] else ():
            of_option = {values[option] for values in tried}
            if len(of_option) > 1 and value in (min(of_option), max(of_option)):
                row["at_the_edge"] = f"{row.get('at_the_edge', '')} {option}".strip()
        losses = pd.Series([run.result[FINAL + LOSS] for run in trial.finished], dtype=float)
        costs = [(read_curve(run)[1], run.result["seconds"]) for run in trial.finished]
        flops_and_seconds = pd.DataFrame(costs, columns=["training_flops", "seconds"]).sum(min_count=1)
        rows.append(row | {"loss_sd": losses.std(), **flops_and_seconds})
    return pd.DataFrame(rows)


def read_curve(run: Run) -> tuple[pd.DataFrame, float]:
    """Validation `loss` by step, with `tokens` and `flops` (as measured) of training by then; the FLOPs in all,
    calibration's too.

    Raises:
        InputError: metrics.csv cannot be read or holds no training step.
    """
    path = run.folder / "metrics.csv"
    try:
        log = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is missing or damaged; remove {run.folder} to train it again") from error
    log = log.reindex(columns=[STEP, TOKENS, FFN_PER_TOKEN, VAL + LOSS])
    trained, validated = log.dropna(subset=TOKENS), log.dropna(subset=VAL + LOSS)
    if trained.empty:
        raise InputError(f"{path}: has no training step; remove {run.folder} to train it again")
    per_token = run.variant.training_flops_per_token(trained[FFN_PER_TOKEN])
    flops = (np.diff(trained[TOKENS], prepend=0) * per_token).cumsum()
    at, steps = validated[STEP], [0, *trained[STEP]]
    columns = {
        "tokens": np.interp(at, steps, [0, *trained[TOKENS]]),
        "flops": np.interp(at, steps, [0, *flops]),
        "loss": validated[VAL + LOSS].to_numpy(),
    }
    in_all = float(flops.iloc[-1]) + run.variant.calibration_flops
    return pd.DataFrame(columns, index=pd.Index(at, name="step")), in_all


def compare(
    variant: Variant, reference: Variant, runs: pd.DataFrame, curves: dict[str, Curves], speed: dict[str, float]
) -> dict[str, Any]:
    """A variant's row, with `speed` as it was timed."""
    names = runs.index.get_level_values("variant")
    sides = variant.name, reference.name, variant.flops_of
    ours, theirs, as_dear = (runs[names == name].droplevel("variant") for name in sides)
    if variant is reference:
        theirs = theirs[:0]  # nothing to compare it with
    equal = at_equal_flops(curves[variant.name], curves[reference.name] if len(theirs) else {})
    parameters = count_parameters(variant.transformer, variant.moe)
    ffn, ffn_expected = ours[FINAL + FFN].mean(), variant.moe.expected_ffn_per_token
    ideal_flops = ffn_flops(reference.transformer, reference.moe.expected_ffn_per_token)
    row = {
        "seeds": len(ours),
        "parameters": parameters.total,
        "active_parameters_per_token": round(parameters.active(ffn)),
        "ffn_experts_per_token": ffn,
        "ffn_experts_per_token_expected": ffn_expected,
        "ffn_flops_per_token": ffn_flops(variant.transformer, ffn),
        "training_tokens": variant.tokens,
        "training_flops": ours["training_flops"].mean(),
        **difference(LOSS, ours[FINAL + LOSS], theirs[FINAL + LOSS]),
        **equal.mean(),
        **difference("equal_flops_loss", equal["equal_flops_loss"], equal["equal_flops_reference_loss"]),
        "flops_of": variant.flops_of or "",
        **difference("flops_of_loss", as_dear[FINAL + LOSS], ours[FINAL + LOSS]),  # its loss minus this one's
        "speedup_ideal": ideal_flops / ffn_flops(variant.transformer, ffn_expected),
        "speed_rounds": 0,
        **speed,
        "tau": variant.moe.balance_tau,
        "n_const": variant.moe.n_const,
    }
    for name, values in ours.filter(regex=f"^{FINAL}({LOSS}|{BITS})").items():
        metric = str(name).removeprefix(FINAL)
        row |= {f"{metric}_mean": values.mean(), f"{metric}_sd": values.std()}  # s.d. of a sample: NaN below two
    for quantity, figures in variant.paper.items():
        row |= {f"paper_{quantity}/{size}": figure for size, figure in figures.items()}
    if speed:
        row["speed_training_time"] = variant.training_time() / reference.training_time() / speed["speed_training"]
    if variant is reference:
        row["loss_difference_verdict"] = row["equal_flops_loss_difference_verdict"] = REFERENCE
    return row


def largest_rise(start: Start, curves: Curves) -> float:
    """The most that any run's validation loss was above what it started from, over its whole way."""
    return max(curve.loss.max() - read_curve(start.run(seed))[0].loss.iloc[-1] for seed, curve in curves.items())


def at_equal_flops(ours: Curves, theirs: Curves) -> pd.DataFrame:
    """By seed: the most FLOPs that both curves reached, and the loss of each there.

    Between two validations a loss is on the straight line; before the first one nothing is known.
    """
    columns = ["equal_flops", "equal_flops_loss", "equal_flops_reference_loss"]
    found = {}
    for seed in ours.keys() & theirs.keys():
        pair = ours[seed], theirs[seed]
        flops = np.min([curve.flops.max() for curve in pair])  # NaN, which is not above anything, of an empty one
        if flops >= np.max([curve.flops.min() for curve in pair]):
            found[seed] = [flops, *(np.interp(flops, curve.flops, curve.loss) for curve in pair)]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns, dtype=float)


def ffn_flops(transformer: TransformerConfig, ffn_per_token: float) -> float:
    """Of the FFN experts, per token, forward."""
    return transformer.n_layers * ffn_per_token * 6 * transformer.hidden_size * transformer.intermediate_size


def difference(name: str, ours: pd.Series, theirs: pd.Series) -> dict[str, Any]:
    """Ours minus theirs, of something of which less is better, in the columns that PAIRED ends.

    Paired by seed, the index of both: a seed gives both variants the same data in the same order and the same
    initial weights; one that only one of them has is left out. The interval bounds the mean at 95 % confidence
    (t-distribution), p is of the paired t-test, two-sided; they are NaN below two seeds. The verdict takes sides
    only where the interval excludes zero.
    """
    ours, theirs = ours.align(theirs, join="inner")
    low, high, p, verdict = math.nan, math.nan, math.nan, "no interval: needs 2 seeds or more"
    if len(ours) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns where all differences are the same
            test = stats.ttest_rel(ours, theirs)
            (low, high), p = test.confidence_interval(0.95), test.pvalue
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    found = (ours - theirs).mean(), low, high, p, verdict
    return dict(zip((f"{name}_difference{part}" for part in PAIRED), found, strict=True))
