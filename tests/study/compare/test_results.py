"""Curves, FLOPs and verdicts from run folders written by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.study.compare import plots
from moepp.study.compare.matrix import Matrix, Run, Variant
from moepp.study.compare.report import markdown
from moepp.study.compare.results import Results, at_equal_flops, difference, read_curve, read_results
from moepp.study.compare.tune import Search
from moepp.training.checkpoint import checkpoint_of, write_checkpoint

# D = 4, H = 8, L = 1, V = 320, S = 6, one head; F FFN experts and no others
SIZES = {"n_layers": 1, "hidden_size": 4, "intermediate_size": 8, "n_heads": 1, "context_length": 6}
VANILLA = {"n_ffn": 2, "n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}


def variant(name: str, moe: dict, flops_of: str | None = None, teacher: str | None = None) -> Variant:
    data = {"path": "x.txt", "vocab_size": 320, "seq_len": 6, "batch_size": 5, "val_part": "all"}
    trainer = {"max_steps": 4, "accumulate_grad_batches": 1, "devices": 1}
    model = {"transformer": SIZES, "moe": moe, "init_from": None, "budget": {}, "distill": {"teacher": teacher}}
    options = {"model": model, "data": data, "trainer": trainer}
    return Variant(name, lambda **last: options, flops_of=flops_of)


def write_run(run: Run, final_loss: float, ffn: float, losses: tuple[float, float]) -> Run:
    """Four steps of 30 tokens, logged at 2 and 4, validated at 2 and 4."""
    run.folder.mkdir(parents=True)
    rows = [f"2,60,{ffn},{losses[0]}", f"4,120,{ffn},{losses[1]}"]
    header = "step,train/tokens,routing/ffn_per_token,val/loss"
    (run.folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    result = {"device": "none", "precision": "32-true", "final/loss": final_loss, "final/ffn_per_token": ffn}
    result |= {"moepp": "0", "commit": "abc", "torch": "2", "python": "3", "machine": "none"}
    result |= {"final/bits_per_byte": final_loss / 2, "final/bits_per_byte/prose": final_loss / 2}
    (run.folder / "result.json").write_text(json.dumps(result))
    return run


def test_flops_by_hand(tmp_path: Path) -> None:
    """Per token: projections 4·4·4·2 = 128, attention 2·2·4·3 = 48, router 2·2·4 = 16, one FFN expert
    2·3·4·8 = 192, head 2·4·320 = 2560; three times as many in training."""
    run = write_run(Run(variant("a", VANILLA), 0, tmp_path / "a"), 5.0, 1.5, (6.0, 5.0))
    curve, flops = read_curve(run)
    per_token = 3 * (128 + 48 + 16 + 1.5 * 192 + 2560)
    assert list(curve.index) == [2, 4]
    assert list(curve.flops) == pytest.approx([60 * per_token, 120 * per_token])
    assert list(curve.tokens) == [60, 120]
    assert list(curve.loss) == [6.0, 5.0]
    assert flops == pytest.approx(120 * per_token)
    assert run.variant.tokens == 120
    assert run.variant.tokens * run.variant.training_flops_per_token(1.5) == pytest.approx(flops)
    assert run.variant.training_flops() == pytest.approx(120 * (per_token + 3 * 0.5 * 192))  # K = 2


def test_reading_text_to_set_a_budget_costs_a_forward_pass_without_the_head(tmp_path: Path) -> None:
    """As above, with a zero expert in the router; of 120 tokens trained on, the last 30 are read again."""
    held = variant("a", VANILLA | {"n_zero": 1, "ffn_budget": 1.5})
    forward = 128 + 48 + 2 * 3 * 4 + 1.5 * 192
    assert held.calibration_flops == pytest.approx(30 * forward)
    assert held.training_flops() == pytest.approx(120 * 3 * (forward + 2560) + 30 * forward)
    curve, flops = read_curve(write_run(Run(held, 0, tmp_path / "a"), 5.0, 1.5, (6.0, 5.0)))
    assert flops == pytest.approx(held.training_flops())
    assert list(curve.flops) == pytest.approx([60 * 3 * (forward + 2560), 120 * 3 * (forward + 2560)])
    assert held.training_time() == pytest.approx(4 * (1 + 30 * forward / (120 * 3 * (forward + 2560))))
    assert variant("a", VANILLA).training_time() == 4


def test_a_teacher_reads_every_token_as_well(tmp_path: Path) -> None:
    teacher = Transformer(TransformerConfig(320, **SIZES), MoEConfig(**VANILLA))
    write_checkpoint(
        tmp_path / "teacher.ckpt", checkpoint_of(teacher, tokenizer_json=None, end_of_text=None, data="text")
    )
    distilled = variant("a", VANILLA, teacher=str(tmp_path / "teacher.ckpt"))
    others = 128 + 48 + 16 + 2560  # as above
    assert distilled.training_flops_per_token(1.5) == 3 * (others + 1.5 * 192) + others + 2 * 192


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing or damaged"),
        ("", "is missing or damaged"),
        ("step,val/loss\n2,5.0\n", "has no training step"),
    ],
)
def test_a_run_without_its_metrics_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    run = write_run(Run(variant("a", VANILLA), 0, tmp_path / "a"), 5.0, 1.5, (6.0, 5.0))
    path = run.folder / "metrics.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=f"metrics.csv: {words}; remove .*/a to train it again"):
        read_curve(run)


def test_equal_flops_reads_both_curves_at_the_cheaper_ones_end(tmp_path: Path) -> None:
    dear, _ = read_curve(write_run(Run(variant("dear", VANILLA), 0, tmp_path / "d"), 5.0, 2.0, (6.0, 4.0)))
    cheap, _ = read_curve(write_run(Run(variant("cheap", VANILLA), 0, tmp_path / "c"), 5.0, 1.0, (6.5, 4.5)))
    ((budget, ours, theirs),) = at_equal_flops({0: cheap}, {0: dear}).to_numpy()
    assert budget == pytest.approx(120 * 3 * (2752 + 192))
    assert ours == pytest.approx(4.5)
    # the dear one's curve falls by 2 between 60 and 120 tokens; it has afforded 120 · 2944 / 3136
    assert theirs == pytest.approx(6.0 - 2.0 * (120 * 2944 / 3136 - 60) / 60)
    ((same_budget, *_),) = at_equal_flops({0: dear}, {0: cheap}).to_numpy()
    assert same_budget == budget
    assert at_equal_flops({0: cheap}, {1: dear}).empty


def results_of(tmp_path: Path, losses: dict[str, list[float]]) -> tuple[Results, list[Run]]:
    variants = [variant(name, VANILLA) for name in losses]
    runs = [
        write_run(Run(v, seed, tmp_path / v.name / str(seed)), loss, 2.0, (loss + 1, loss))
        for v in variants
        for seed, loss in enumerate(losses[v.name])
    ]
    return read_results(Matrix(Path("m.yaml"), variants, variants[0], {}), runs, Search([], {}), {}), runs


def test_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    results, _ = results_of(tmp_path, {"vanilla": [1.0, 2.0, 6.0], "once": [5.0]})
    loss = results.variants[["loss_mean", "loss_sd"]]
    assert list(loss.loc["vanilla"]) == [3.0, pytest.approx(math.sqrt(7))]
    assert loss.loc["once", "loss_mean"] == 5.0
    assert math.isnan(loss.loc["once", "loss_sd"])
    assert list(results.runs["final/loss"]) == [1.0, 2.0, 6.0, 5.0]


def test_the_report_takes_sides_only_where_the_interval_excludes_zero(tmp_path: Path) -> None:
    losses = {
        "vanilla": [5.0, 5.1, 5.2],
        "lower": [4.9, 5.01, 5.11],
        "higher": [5.1, 5.21, 5.31],
        "unclear": [4.0, 5.2, 5.1],
        "once": [1.0],
    }
    results, runs = results_of(tmp_path, losses)
    assert results.variants["loss_difference_verdict"].to_dict() == {
        "vanilla": "reference",
        "lower": "better",
        "higher": "worse",
        "unclear": "no difference shown",
        "once": "no interval: needs 2 seeds or more",
    }
    text = markdown(results, runs, Search([], {}), [], [], "moepp ablate")
    quality = text.split("## Quality at equal training FLOPs")[0]
    assert quality.count("better") == 1
    assert "| vanilla | 3 | 5.1000 ± 0.1000 | 2.5500 ± 0.0500 |  |  |  | reference |" in quality
    # mean −0.28/3; the differences' s.d. is 0.01/√3, so the half interval 4.302653 · 0.01/3
    assert "| lower | 3 | 5.0067 ± 0.1050 | 2.5033 ± 0.0525 | -0.0933 | [-0.1077, -0.0790] |" in quality
    assert "| once | 1 | 1.0000 | 0.5000 | -4.0000 | – | – | no interval" in quality
    assert "There are 3 comparisons" in quality
    assert "| prose |" in text
    assert "Not measured: vanilla has no finished run with a checkpoint." in text
    assert "\n\n\n" not in text
    assert "paper |" not in text


def test_the_papers_figures_have_a_column_where_a_matrix_has_some(tmp_path: Path) -> None:
    variants = [variant("vanilla", VANILLA), replace(variant("moepp", VANILLA), paper={"accuracy": {"1B": 47.2}})]
    runs = [write_run(Run(v, 0, tmp_path / v.name), 5.0, 2.0, (6.0, 5.0)) for v in variants]
    results = read_results(Matrix(Path("m.yaml"), variants, variants[0], {}), runs, Search([], {}), {})
    text = markdown(results, runs, Search([], {}), [], [], "moepp ablate")
    header, dashes, vanilla, moepp = text.partition("equal tokens\n\n")[2].splitlines()[:4]
    assert header.endswith("| verdict | paper |")
    assert (vanilla.split("|")[-2].strip(), moepp.split("|")[-2].strip()) == ("", "1B: 47.2")
    assert len({line.count("|") for line in (header, dashes, vanilla, moepp)}) == 1


def test_a_strict_comparison_is_of_the_two_that_cost_the_same(tmp_path: Path) -> None:
    variants = [
        variant("vanilla", VANILLA),
        variant("fewer", VANILLA, flops_of="cheap"),
        variant("cheap", VANILLA),
    ]
    losses = {"vanilla": [5.0, 5.2], "fewer": [5.3, 5.4], "cheap": [5.1, 5.3]}
    runs = [
        write_run(Run(v, seed, tmp_path / v.name / str(seed)), loss, 2.0, (loss + 1, loss))
        for v in variants
        for seed, loss in enumerate(losses[v.name])
    ]
    results = read_results(Matrix(Path("m.yaml"), variants, variants[0], {}), runs, Search([], {}), {})
    assert results.variants["flops_of_loss_difference"].dropna().to_dict() == {"fewer": pytest.approx(-0.15)}
    text = markdown(results, runs, Search([], {}), [], [], "moepp ablate")
    # differences −0.2 and −0.1: half the interval is 12.7062 · 0.05
    assert "| fewer |" not in text.split("## Quality at equal training FLOPs")[0]  # it saw fewer tokens
    assert "| cheap | 1.13e+06 | fewer | 1.13e+06 | -0.1500 | [-0.7853, +0.4853] |" in text
    read_off = text.split("read off the curves of the runs above")[1].split("## Cost")[0]
    assert "| cheap |" in read_off
    assert "| fewer |" not in read_off


def test_time_is_that_of_all_forward_and_backward_passes(tmp_path: Path) -> None:
    """Half the steps of twice the batch, each of which takes twice the time."""
    whole, halved = variant("a", VANILLA), variant("b", VANILLA)
    options = halved.options
    options["data"]["batch_size"] *= 2
    options["trainer"]["max_steps"] //= 2
    runs = [write_run(Run(v, 0, tmp_path / v.name), 5.0, 2.0, (6.0, 5.0)) for v in (whole, halved)]
    timed = {"a": {"speed_training": 1.0}, "b": {"speed_training": 0.5}}
    results = read_results(Matrix(Path("m.yaml"), [whole, halved], whole, {}), runs, Search([], {}), timed)
    assert list(results.variants["speed_training_time"]) == [1.0, 1.0]
    assert list(results.variants["training_tokens"]) == [120, 120]


def test_the_frontier_is_drawn_over_what_was_measured(tmp_path: Path) -> None:
    names = ["vanilla_1", "vanilla_2", "moepp_0.4"]
    variants = [replace(variant(name, VANILLA), plots=("frontier",)) for name in names]
    runs = [
        write_run(Run(v, seed, tmp_path / v.name / str(seed)), 5.0 - n + 0.1 * seed * n, 1.0 + n, (6.0, 5.0))
        for n, v in enumerate(variants)
        for seed in range(2)
    ]
    timed = {
        name: {"speed_rounds": 5, "speed_training": speed} for name, speed in zip(names, (1, 2, 4), strict=True)
    }
    matrix = Matrix(Path("m.yaml"), variants, variants[1], {})
    results = read_results(matrix, runs, Search([], {}), timed)
    assert list(results.variants["speed_training_time"]) == [1.0, 0.5, 0.25]
    figure = plots.frontier(results)
    assert figure is not None
    by_flops, _, by_time = figure.axes
    assert by_flops.get_legend_handles_labels()[1] == ["moepp", "vanilla"]
    (moepp, *_), (vanilla, *_) = by_time.containers
    assert moepp.get_xydata().tolist() == [[0.25, pytest.approx(-0.95)]]
    assert vanilla.get_xydata().tolist() == [[0.5, 0.0], [1.0, pytest.approx(0.95)]]
    assert plots.frontier(read_results(matrix, runs, Search([], {}), {})) is None


def test_what_has_no_seed_in_common_with_the_reference_is_not_at_its_loss(tmp_path: Path) -> None:
    variants = [replace(variant(name, VANILLA), plots=("frontier",)) for name in ("a", "b_1", "b_2")]
    seeds = {"a": (0, 1), "b_1": (0, 1), "b_2": (2,)}
    runs = [
        write_run(Run(v, seed, tmp_path / v.name / str(seed)), 5.0 + n, 1.0 + n, (6.0, 5.0))
        for n, v in enumerate(variants)
        for seed in seeds[v.name]
    ]
    timed = {name: {"speed_rounds": 5, "speed_training": 1.0} for name in seeds}
    results = read_results(Matrix(Path("m.yaml"), variants, variants[0], {}), runs, Search([], {}), timed)
    figure = plots.frontier(results)
    assert figure is not None
    reference, others = figure.axes[0].containers
    assert reference.lines[0].get_ydata().tolist() == [0.0]
    assert others.lines[0].get_ydata().tolist() == [1.0, pytest.approx(math.nan, nan_ok=True)]


@pytest.mark.parametrize(("values", "scale"), [((0.0, 0.1, 0.3), "linear"), ((0.01, 0.1, 0.3), "log")])
def test_a_search_is_drawn_on_a_scale_that_has_its_values(
    tmp_path: Path, values: tuple[float, ...], scale: str
) -> None:
    results, _ = results_of(tmp_path, {"vanilla": [5.0]})
    trials = pd.DataFrame({"variant": "vanilla", "model.moe.balance_weight": values, "loss": [5.0, 4.9, 5.1]})
    trials = trials.assign(chosen=[False, True, False], loss_sd=0.01)
    figure = plots.tune(replace(results, trials=trials))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    figure.canvas.draw()
    low, high = axes.get_xlim()
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{value:g}" for value in values]
    assert low <= min(values) < max(values) <= high
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [end.tolist() for end in bars[1]] == [
        [values[1], pytest.approx(4.89)],
        [values[1], pytest.approx(4.91)],
    ]


# ---- differences against values worked out by hand ---------------------------------------------------------


class Paired(NamedTuple):
    mean: float
    low: float
    high: float
    p: float
    verdict: str


def paired(variant: pd.Series, reference: pd.Series) -> Paired:
    return Paired(*difference("x", variant, reference).values())


def by_seed(losses: dict[int, float]) -> pd.Series:
    return pd.Series(losses, dtype=float)


def test_paired_interval_and_p_by_hand() -> None:
    """Differences −0.1, −0.2, −0.3: mean −0.2, s.d. 0.1, standard error 0.1/√3; t(0.975, 2) = 4.302653.

    For two degrees of freedom the two-sided p of t is 1 − |t| / √(t² + 2).
    """
    result = paired(by_seed({0: 2.9, 1: 3.3, 2: 1.7}), by_seed({0: 3.0, 1: 3.5, 2: 2.0}))
    half = 4.302653 * 0.1 / math.sqrt(3)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert result.mean == pytest.approx(-0.2)
    assert (result.low, result.high) == (
        pytest.approx(-0.2 - half, abs=1e-6),
        pytest.approx(-0.2 + half, abs=1e-6),
    )
    assert result.p == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-6)
    assert result.p == pytest.approx(0.0742, abs=1e-4)
    assert result.verdict == "no difference shown"  # the interval reaches above zero


def test_only_common_seeds_are_paired() -> None:
    result = paired(by_seed({7: 100.0, 1: 2.0, 0: 1.0}), by_seed({0: 2.0, 1: 4.0, 5: -100.0}))
    assert result.mean == -1.5
    # one degree of freedom: t(0.975, 1) = 12.7062, standard error 0.5
    assert result.high == pytest.approx(-1.5 + 12.7062 * 0.5, abs=1e-4)


@pytest.mark.parametrize(("seed", "mean"), [(3, -1.0), (4, math.nan)])
def test_no_interval_below_two_seeds(seed: int, mean: float) -> None:
    result = paired(by_seed({3: 1.0}), by_seed({seed: 2.0}))
    verdict = "no interval: needs 2 seeds or more"
    assert result == pytest.approx((mean, math.nan, math.nan, math.nan, verdict), nan_ok=True)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.3, -0.2, -0.25], "better"),
        ([0.3, 0.2, 0.25], "worse"),
        ([-0.3, 0.2, 0.25], "no difference shown"),
        ([0.0, 0.0, 0.0], "no difference shown"),
    ],
)
def test_words_need_an_interval_without_zero(differences: list[float], verdict: str) -> None:
    result = paired(pd.Series(differences), pd.Series([0.0, 0.0, 0.0]))
    assert result.verdict == verdict
    assert (result.low > 0 or result.high < 0) == (verdict in ("better", "worse"))
