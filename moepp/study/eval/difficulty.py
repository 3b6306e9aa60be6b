"""The second half of the paper's fourth finding: do easier tasks take more zero experts?"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from moepp.study.figures.findings import Bootstrap, Estimate, Finding
from moepp.study.figures.picture import Drawn, Picture, picture, whiskers
from moepp.study.figures.routing_stats import Sums
from moepp.study.style import KIND_COLOURS

FEWEST_TASKS = 4  # Fisher's interval divides by their number less 3
SCORES = {"accuracy": ("acc", "exact_match"), "bits per byte": ("bits_per_byte",)}  # by lm-eval's names


def score_of(metrics: dict[str, Any], score: str) -> float:
    """Of a task's results, NaN where it has none of the kind."""
    found = {key.partition(",")[0]: value for key, value in reversed(metrics.items())}  # of two filters the first
    return next((float(found[name]) for name in SCORES[score] if name in found), np.nan)


def difficulty(
    results: dict[str, dict[str, Any]], measured: Bootstrap
) -> tuple[list[Finding], list[Picture], dict[str, str]]:
    """The finding by each score that a task has. Nothing of a model without zero experts.

    Args:
        results: of lm-eval, by task.

    Returns:
        findings, their pictures, and what was not drawn, and why.
    """
    found: list[Finding] = []
    pictures: list[Picture] = []
    missing: dict[str, str] = {}
    if "zero" not in measured.counts.kinds:
        return found, pictures, missing
    shares_D = measured.estimate(zero_share)
    for score, sign in (("accuracy", 1), ("bits per byte", -1)):
        score_D = np.array([score_of(results[task], score) for task in measured.counts.domains])
        has_D = ~np.isnan(score_D)
        tasks = [task for task, has in zip(measured.counts.domains, has_D, strict=True) if has]
        if not tasks:
            continue
        correlation = correlate(sign * score_D[has_D], shares_D.value[has_D])
        what = "accuracy" if sign > 0 else "fewer bits per byte"
        measure = (
            f"correlation of {what} with the share of choices that go to zero experts, over {len(tasks)} tasks"
        )
        found.append(Finding(4, f"… more so in easier tasks ({what})", measure, correlation))
        if len(tasks) < FEWEST_TASKS:
            has = "task has" if len(tasks) == 1 else "tasks have"
            why = f"{len(tasks)} {has} {score}, and a correlation over tasks needs {FEWEST_TASKS}"
            missing[f"finding4_{score.replace(' ', '_')}"] = why
        else:
            pictures.append(scatter(score, tasks, score_D[has_D], shares_D[has_D], correlation))
    return found, pictures, missing


def zero_share(sums: Sums) -> np.ndarray:
    """(D,) share of choices that go to zero experts, mean over layers."""
    return sums.kind_shares().mean(-2)[..., list(sums.kinds).index("zero")]


def correlate(x_D: np.ndarray, y_D: np.ndarray) -> Estimate:
    """Spearman's rank correlation; NaN of too few tasks, or where one of the two is constant.

    The interval is Fisher's with the variance of ranks, 1.06 / (n - 3) (Fieller and others, 1957). Of a perfect
    order, in which few tasks can be by chance, it would be a point: that counts as one exchange short of it.
    """
    n = len(x_D)
    if n < FEWEST_TASKS or np.ptp(x_D) == 0 or np.ptp(y_D) == 0:
        return Estimate(*np.full(3, np.nan))
    value = spearmanr(x_D, y_D).statistic
    most = 1 - 12 / (n * (n**2 - 1))
    z, half = np.arctanh(np.clip(value, -most, most)), 1.96 * np.sqrt(1.06 / (n - 3))
    return Estimate(value, np.tanh(z - half), np.tanh(z + half))


def scatter(score: str, tasks: list[str], score_D: np.ndarray, shares_D: Estimate, found: Estimate) -> Picture:
    """A point for each task, with the interval of its share over its documents."""

    def draw(_: Bootstrap) -> Drawn:
        table = pd.DataFrame({"task": tasks, score.replace(" ", "_"): score_D, **shares_D.columns("zero_share")})
        sentence = f"Over {len(tasks)} tasks {score} and the share of zero experts correlate by {found}."
        figure, axes = plt.subplots(figsize=(6.4, 4))
        whiskers(axes, score_D, shares_D, fmt="o", color=KIND_COLOURS["zero"], ecolor="#777777", mec="black")
        for task, x, y in zip(tasks, score_D, shares_D.value, strict=True):
            axes.annotate(task, (x, y), (5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=score, ylabel="share of choices that go to zero experts")
        axes.margins(x=0.15)
        return table, sentence, figure

    draw.__name__ = f"finding4_{score.replace(' ', '_')}"
    return picture(f"Finding 4: zero experts against {score}, task by task")(draw)
