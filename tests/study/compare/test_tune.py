"""The search for each variant's own best options, on runs that are made up in a moment."""

import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from moepp.cli import main
from moepp.model import InputError
from moepp.study.compare.matrix import Matrix, Run, read_matrix, resolve
from moepp.study.compare.runs import Workers
from moepp.study.compare.tune import SEED, search
from tests.conftest import RECIPES

OPTIONS = {"model.optim.lr": [0.003, 0.006, 0.012], "model.moe.balance_weight": [0.01, 0.1, 0.3]}
SMALL = {"n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}
DENSE = SMALL | {"n_ffn": 1, "top_k": 1}
VARIANTS = {"vanilla": {"model": {"moe": SMALL}}, "moepp": {"model": {"moe": {"ffn_budget": 1.2}}}}
MATRIX = {"base": str(RECIPES / "moepp.yaml"), "reference": "vanilla", "seeds": 2, "variants": VARIANTS}

# `moepp fit`, made up: vanilla is best at lr 0.006 and β 0.1, MoE++ at 0.012 and 0.01; a β of 0.3 diverges with
# the largest lr
FIT = """
import json, math, os, sys
from pathlib import Path
import yaml
arguments = sys.argv[1:]
folder = Path(arguments[2].partition("=")[2])
options = yaml.safe_load(Path(arguments[1]).read_text())
lr, beta = options["model"]["optim"]["lr"], options["model"]["moe"]["balance_weight"]
budget, seed = options["model"]["moe"]["ffn_budget"], options["seed_everything"]
tau = options["model"]["moe"]["tau"]
best = (0.012, 0.01) if budget else (0.006, 0.1)
if lr == 0.012 and beta == 0.3 and not budget:
    sys.exit("diverged")
loss = 4 + abs(math.log(lr / best[0])) + 0.1 * abs(math.log(beta / best[1])) + 0.001 * seed + tau
ffn = budget or 2.0
steps = options["trainer"]["max_steps"]
lines = ["step,train/tokens,routing/ffn_per_token,val/loss", f"{steps},{steps * 2048},{ffn},{loss}"]
(folder / "metrics.csv").write_text("\\n".join(lines) + "\\n")
result = {"final/loss": loss, "final/ffn_per_token": ffn, "final/bits_per_byte": loss, "seconds": 2.0}
result |= dict.fromkeys(("commit", "device", "precision", "machine", "moepp", "torch", "python"), "made up")
result["commit"] = os.environ.get("MADE_BY", "abc")
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The folder in which a tuned study has run to its end, undisturbed."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", FIT])
        write_matrix()
        assert main(command(text_file)) == 0
    return folder


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the matrix alone, as the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", FIT])
    write_matrix()
    return tmp_path


@pytest.fixture
def study(there: Path, finished: Path) -> Path:
    """The same with a copy of the finished study."""
    shutil.copytree(finished / "runs", there / "runs")
    return there


def write_matrix(options: dict = OPTIONS, **more: object) -> None:
    contents = MATRIX | {"tune": {"jobs": 2, "options": options}} | more
    Path("m.yaml").write_text(yaml.safe_dump(contents, sort_keys=False))


def command(text_file: Path, *more: str) -> list[str]:
    shrunk = ["--data.vocab_size=320", "--model.transformer.context_length=32", "--data.batch_size=4"]
    return ["ablate", "--matrix=m.yaml", "--tune", f"--data.path={text_file}", *shrunk, *more]


def test_each_variant_gets_its_own_best_by_the_same_search(finished: Path) -> None:
    out = finished / "runs/m-tune"
    trials = pd.read_csv(out / "report/tune.csv")
    for _, tried in trials.groupby("variant"):  # each value of an option, beside the best of those before
        assert len(tried) == 5
        assert set(tried["model.optim.lr"]) == {0.003, 0.006, 0.012}
        assert set(tried["model.moe.balance_weight"]) == {0.01, 0.1, 0.3}
    chosen = trials[trials.chosen].set_index("variant")
    assert tuple(chosen.loc["vanilla", list(OPTIONS)]) == (0.006, 0.1)
    assert tuple(chosen.loc["moepp", list(OPTIONS)]) == (0.012, 0.01)
    assert chosen.loc["moepp", "at_the_edge"] == "model.optim.lr model.moe.balance_weight"
    assert not isinstance(chosen.loc["vanilla", "at_the_edge"], str)

    (failed,) = trials[~trials.loss.lt(1e9)].to_dict("records")  # a value that diverges is one that is not taken
    assert (failed["variant"], failed["model.optim.lr"], failed["model.moe.balance_weight"]) == (
        "vanilla",
        0.012,
        0.3,
    )

    options = {path.parent: yaml.safe_load(path.read_text()) for path in out.rglob("options.yaml")}
    of_a_try = {folder: "tune" in folder.relative_to(out).parts for folder in options}
    parts = {folder: (run["data"]["val_part"], run["seed_everything"]) for folder, run in options.items()}
    assert {part for folder, part in parts.items() if of_a_try[folder]} == {("tune", SEED)}
    assert {part for folder, part in parts.items() if not of_a_try[folder]} == {("report", 0), ("report", 1)}
    for name, lr in (("vanilla", 0.006), ("moepp", 0.012)):
        assert options[out / name / "seed1"]["model"]["optim"]["lr"] == lr

    text = (out / "report/report.md").read_text()
    assert "on the half of the held-out text that nothing was chosen by: mean" in text
    assert "In all 10 runs" in text
    assert "0:00:18 of training" in text  # nine ended
    assert "| vanilla | 0.012 | 0.3 | 400 | inf | exit code 1: diverged | nan | – |" in text
    assert "- commit: abc\n" in text
    assert (out / "report/tune.png").is_file()


def test_what_was_made_is_not_repeated_and_told_apart(
    study: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other code than what is missing; a try that failed counts as made."""
    shutil.rmtree("runs/m-tune/moepp/seed1")
    results = {path: path.stat().st_mtime_ns for path in study.rglob("result.json")}
    monkeypatch.setenv("MADE_BY", "def")
    assert main(command(text_file)) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert (
        Path("runs/m-tune/tune/vanilla/lr=0.012,balance_weight=0.3,seed=1000/output.log").read_text()
        == "diverged\n"
    )
    kept = capsys.readouterr().err
    assert kept == f"moepp ablate: {len(results)} runs are kept as commit abc made them\n"
    assert "\n- commit: abc; def made moepp/seed1\n" in Path("runs/m-tune/report/report.md").read_text()

    write_matrix(OPTIONS | {"model.optim.lr": [0.003, 0.006, 0.0012]})
    assert main(command(text_file)) == 2  # MoE++ takes another lr now than its seeds had
    error = capsys.readouterr().err
    assert "runs/m-tune/moepp/seed0 was made with model.optim.lr=0.012, not 0.006: name another --out" in error
    assert {path: path.stat().st_mtime_ns for path in results} == results


@pytest.mark.heavy
def test_a_study_stopped_within_its_search_ends_with_the_same_report(
    study: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Path("runs/m-tune/report")
    undisturbed = {path.name: path.read_bytes() for path in report.iterdir()}
    for path in (report, *Path("runs/m-tune").glob("*/seed0"), *Path("runs/m-tune/tune").glob("*/*weight=0.01,*")):
        shutil.rmtree(path)
    start, started = Workers.start, []

    def interrupted(self: Workers, run: Run, *rest: Any) -> subprocess.Popen:
        started.append(run.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return start(self, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "start", interrupted)
        assert main(command(text_file)) == 130
    names = "vanilla/lr=0.006,balance_weight=0.01,seed=1000", "moepp/lr=0.012,balance_weight=0.01,seed=1000"
    assert started == list(names)
    assert not report.exists()
    assert main(command(text_file)) == 0
    assert {path.name: path.read_bytes() for path in report.iterdir()} == undisturbed


def test_an_option_all_of_whose_tries_fail_ends_the_study(
    there: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_matrix({"model.moe.balance_weight": [0.3]})
    for _ in range(2):
        capsys.readouterr()
        assert main(command(text_file, "--model.optim.lr=0.012")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "vanilla has failed with every value of model.moe.balance_weight, the last time with exit" in error
        assert (
            "exit code 1: diverged; see runs/m-tune/tune/vanilla/balance_weight=0.3,seed=1000, and remove" in error
        )
    assert Path("runs/m-tune/tune/vanilla/balance_weight=0.3,seed=1000/output.log").read_text() == "diverged\n"


def test_a_twin_of_equal_flops_and_what_changes_nothing(there: Path, text_file: Path) -> None:
    """A smaller τ takes fewer FFN experts: the dense model that costs as much gets fewer steps than it had before
    the search. A single expert's β is not searched for."""
    variants = {"moepp": {}, "dense": {"model": {"moe": DENSE}, "flops_of": "moepp"}}
    options = {"model.moe.tau": [0.1], "model.moe.balance_weight": [0.1]}
    write_matrix(options, variants=variants, reference="moepp", seeds=1)
    assert main(command(text_file)) == 0
    folder = Path("runs/m-tune")
    trials = pd.read_csv(folder / "report/tune.csv")
    assert trials.variant.to_list() == ["moepp", "dense", "moepp"]
    table = pd.read_csv(folder / "report/results.csv").set_index("variant")
    assert table.tau.to_list() == [0.1, 0.1]
    steps = {
        path.parent.name: yaml.safe_load(path.read_text())["trainer"]["max_steps"]
        for path in (folder / "tune/dense").glob("*/options.yaml")
    }
    final = yaml.safe_load((folder / "dense/seed0/options.yaml").read_text())["trainer"]["max_steps"]
    assert final < min(steps.values())
    overrides = [*command(text_file)[3:], "--model.moe.tau=0.1"]
    matrix = resolve(Path("m.yaml"), read_matrix(Path("m.yaml")), RECIPES / "moepp.yaml", overrides, Path("out"))
    assert final == matrix.variants[1].steps
    text = (folder / "report/report.md").read_text()
    assert "β is not searched for in dense: it changes nothing where there is one expert." in text
    assert "| moepp |" in text.split("| variant | training FLOPs | against |")[1].split("## ")[0]


def test_the_quick_version_of_a_search(there: Path, text_file: Path) -> None:
    write_matrix({"model.optim.lr": [0.003]}, quick={"base": str(RECIPES / "quick.yaml"), "seeds": 1})
    assert main(command(text_file, "--quick")) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["m-tune-quick"]
    text = Path("runs/m-tune-quick/report/report.md").read_text()
    assert "# m: 2 variants, 1 seed, against vanilla" in text
    assert "In all 2 runs" in text
    options = yaml.safe_load(Path("runs/m-tune-quick/moepp/seed0/options.yaml").read_text())
    assert (options["trainer"]["max_steps"], options["data"]["val_part"]) == (120, "report")


def test_a_dry_run_counts_the_search(there: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text_file, "--dry_run")) == 0
    printed = capsys.readouterr().out
    assert "14 runs of m.yaml, 10 of them tries of 400 steps at most" in printed
    assert next(line.split()[1] for line in printed.splitlines() if "vanilla" in line) == "7"
    assert not Path("runs").exists()


def small_matrix() -> Matrix:
    return resolve(Path("m.yaml"), MATRIX, RECIPES / "moepp.yaml", [], Path("out"))


def test_options_are_searched_in_their_order(tmp_path: Path) -> None:
    """With another order the first stage has β beside the recipe's lr."""
    asked: list[list[Run]] = []
    search(small_matrix(), dict(reversed(OPTIONS.items())), 1.0, 1, tmp_path, asked.append)
    first, second = asked
    assert {run.folder.name for run in first} == {
        f"balance_weight={beta},lr=0.003,seed={SEED}" for beta in (0.01, 0.1, 0.3)
    }
    assert len({run.folder for run in first}) == 6
    assert {run.folder.name.partition("lr=")[2].partition(",")[0] for run in second} == {"0.003", "0.006", "0.012"}


def test_a_shorter_search(tmp_path: Path) -> None:
    """A quarter of the steps for a try, and all of them for what was found."""
    asked: list[list[Run]] = []
    found = search(small_matrix(), OPTIONS, 0.25, 1, tmp_path, asked.append)
    assert {run.options["trainer"]["max_steps"] for stage in asked for run in stage} == {100}
    assert {variant.steps for variant in found.tuned(small_matrix()).variants} == {400}


def test_a_try_of_several_seeds_is_judged_by_their_mean(
    there: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """β = 0.3 is best of all with one seed and worst with another; vanilla fails with one seed at its best β."""
    fit = FIT.replace("+ tau", "+ tau + {(0.3, 1000): -1, (0.3, 1001): 2}.get((beta, seed), 0)")
    fit = fit.replace("lr == 0.012 and beta == 0.3", "beta == 0.1 and seed == 1001")
    monkeypatch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", fit])
    write_matrix(tune={"jobs": 2, "options": OPTIONS, "seeds_of_a_try": 3})
    assert main(command(text_file)) == 0
    report = Path("runs/m-tune/report")
    trials = pd.read_csv(report / "tune.csv").set_index(["variant", *OPTIONS])
    assert trials.index[trials.chosen].to_list() == [("vanilla", 0.006, 0.01), ("moepp", 0.012, 0.01)]
    assert (trials.runs == 3).all()
    assert trials.loc[("vanilla", 0.006, 0.3), "loss_sd"] == pytest.approx(1.5279, rel=1e-4)
    assert trials.loc[("vanilla", 0.006, 0.1), ["loss", "seconds"]].to_list() == [math.inf, 4.0]
    text = (report / "report.md").read_text()
    assert "from 3 seeds that are not among those above" in text
    assert "In all 30 runs" in text
    assert "| vanilla | 0.006 | 0.01 | 400 | 5.9813 ± 0.0010 | chosen" in text


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"options": {"model.optim.lrs": [1.0]}}, "tune: one of model.optim.lrs is no option of a run"),
        ({"options": {"model.moe.balance_weight": [-1.0]}}, "balance_weight: must not be negative"),
        ({"options": {"model.optim.min_lr": [0.1]}}, "tune: model.optim.min_lr is None in moepp, not a number"),
        ({"options": {"model.optim.lr": 0.003}}, "tune.options: model.optim.lr: 0.003 is of the wrong type"),
        ({"options": {"model.optim.lr": []}}, "is no option with a list of different numbers"),
        ({"options": {"model.optim.lr": ["a"]}}, "is no option with a list of different numbers"),
        ({"options": {"model.optim.lr": [0.1, math.nan]}}, "is no option with a list of different numbers"),
        ({"options": {"model.optim.lr": [0.1, 0.1]}}, "is no option with a list of different numbers"),
        ({"options": {"model.optim.lr": [0.1], "model.lr": [0.1]}}, "tune.options: two end alike"),
        (
            {"option": OPTIONS},
            "tune: unknown key 'option': use base, jobs, options, part_of_steps, seeds, seeds_of_a_try",
        ),
        ({"options": OPTIONS, "part_of_steps": 0}, "tune.part_of_steps: must be above 0 and at most 1"),
        ({"options": OPTIONS, "seeds": "2"}, "tune: seeds: '2' is of the wrong type"),
        ({"options": OPTIONS, "seeds_of_a_try": 0}, "seeds_of_a_try: must be from 1 to"),
        ({}, "tune.options: None is of the wrong type"),
    ],
)
def test_a_wrong_search_ends_in_one_line(
    there: Path, text_file: Path, tune: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("m.yaml").write_text(yaml.safe_dump(MATRIX | {"tune": tune}))
    assert main(command(text_file)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_what_cannot_be_tuned_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", f"--matrix={RECIPES / 'convert.yaml'}", "--tune"]) == 2
    assert "convert.yaml says nothing of it" in capsys.readouterr().err
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(MATRIX | {"start": "vanilla.yaml", "tune": {"options": OPTIONS}}))
    with pytest.raises(InputError, match="goes on from trained models"):
        read_matrix(path)


def test_the_shipped_searches_are_the_same_for_all(tmp_path: Path) -> None:
    for name in ("compare.yaml", "ablate.yaml"):
        tune = read_matrix(RECIPES / name)["tune"]
        assert tune["options"].keys() == OPTIONS.keys()
        for values in tune["options"].values():
            assert all(a < b for a, b in pairwise(values))
