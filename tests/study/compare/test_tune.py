"""The search for each variant's own best options, on runs that are made up in a moment."""

import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from moepp.cli import main
from moepp.model import InputError
from moepp.study.compare.matrix import Matrix, Run, read_matrix, resolve
from moepp.study.compare.tune import SEED, search
from tests.conftest import RECIPES

OPTIONS = {"model.optim.lr": [0.003, 0.006, 0.012], "model.moe.balance_weight": [0.01, 0.1, 0.3]}
SMALL = {"n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}
VARIANTS = {"vanilla": {"model": {"moe": SMALL}}, "moepp": {"model": {"moe": {"ffn_budget": 1.2}}}}
MATRIX = {"base": str(RECIPES / "moepp.yaml"), "reference": "vanilla", "seeds": 2, "variants": VARIANTS}

# `moepp fit`, made up: vanilla is best at lr 0.006 and β 0.1, MoE++ at 0.012 and 0.01; a β of 0.3 diverges with
# the largest lr
FIT = """
import json, math, sys
from pathlib import Path
import yaml
arguments = sys.argv[1:]
folder = Path(arguments[2].partition("=")[2])
options = yaml.safe_load(Path(arguments[1]).read_text())
lr, beta = options["model"]["optim"]["lr"], options["model"]["moe"]["balance_weight"]
budget, seed = options["model"]["moe"]["ffn_budget"], options["seed_everything"]
best = (0.012, 0.01) if budget else (0.006, 0.1)
if lr == 0.012 and beta == 0.3 and not budget:
    sys.exit("diverged")
loss = 4 + abs(math.log(lr / best[0])) + 0.1 * abs(math.log(beta / best[1])) + 0.001 * seed
ffn = budget or 2.0
steps = options["trainer"]["max_steps"]
lines = ["step,train/tokens,routing/ffn_per_token,val/loss", f"{steps},{steps * 2048},{ffn},{loss}"]
(folder / "metrics.csv").write_text("\\n".join(lines) + "\\n")
result = {"final/loss": loss, "final/ffn_per_token": ffn, "final/bits_per_byte": loss, "seconds": 2.0}
result |= dict.fromkeys(("commit", "device", "precision", "machine", "moepp", "torch", "python"), "made up")
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def there(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", FIT])
    contents = MATRIX | {"tune": {"jobs": 2, "options": OPTIONS}}
    Path("m.yaml").write_text(yaml.safe_dump(contents, sort_keys=False))
    return tmp_path


def command(text_file: Path, *more: str) -> list[str]:
    shrunk = ["--data.vocab_size=320", "--model.transformer.context_length=32", "--data.batch_size=4"]
    return ["ablate", "--matrix=m.yaml", "--tune", f"--data.path={text_file}", *shrunk, *more]


def test_each_variant_gets_its_own_best_by_the_same_search(there: Path, text_file: Path) -> None:
    assert main(command(text_file)) == 0
    out = Path("runs/m-tune")
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
    parts = {folder: (run["data"]["val_part"], run["seed_everything"]) for folder, run in options.items()}
    assert {part for folder, part in parts.items() if "tune" in folder.parts[2]} == {("tune", SEED)}
    assert {part for folder, part in parts.items() if "tune" not in folder.parts[2]} == {
        ("report", 0),
        ("report", 1),
    }
    for name, lr in (("vanilla", 0.006), ("moepp", 0.012)):
        assert options[out / name / "seed1"]["model"]["optim"]["lr"] == lr

    text = (out / "report/report.md").read_text()
    assert "In all 10 runs" in text
    assert "0:00:18 of training" in text  # nine ended
    assert (out / "report/tune.png").is_file()


def test_a_finished_search_is_not_repeated_and_a_longer_one_goes_on(there: Path, text_file: Path, capsys) -> None:
    assert main(command(text_file)) == 0
    results = {path: path.stat().st_mtime_ns for path in there.rglob("result.json")}
    assert main(command(text_file)) == 0
    assert {path: path.stat().st_mtime_ns for path in there.rglob("result.json")} == results
    contents = yaml.safe_load(Path("m.yaml").read_text())
    contents["tune"]["options"]["model.optim.lr"] = [0.003, 0.006, 0.0012]
    Path("m.yaml").write_text(yaml.safe_dump(contents, sort_keys=False))
    capsys.readouterr()
    assert main(command(text_file)) == 2  # MoE++ takes another lr now than its seeds had
    error = capsys.readouterr().err
    assert "runs/m-tune/moepp/seed0 was made with model.optim.lr=0.012, not 0.006: name another --out" in error
    assert {path: path.stat().st_mtime_ns for path in results} == results


def test_a_dry_run_counts_the_search(there: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text_file, "--dry_run")) == 0
    printed = capsys.readouterr().out
    assert "14 runs of m.yaml" in printed
    assert next(line.split()[1] for line in printed.splitlines() if "vanilla" in line) == "7"
    assert not Path("runs").exists()


def small_matrix() -> Matrix:
    return resolve(Path("m.yaml"), MATRIX, RECIPES / "moepp.yaml", [], Path("out"))


def test_options_are_searched_in_their_order(tmp_path: Path) -> None:
    """With another order the first stage has β beside the recipe's lr."""
    asked: list[list[Run]] = []
    search(small_matrix(), dict(reversed(OPTIONS.items())), tmp_path, asked.append)
    first, second = asked
    assert {run.folder.name for run in first} == {f"balance_weight={beta},lr=0.003" for beta in (0.01, 0.1, 0.3)}
    assert len({run.folder for run in first}) == 6
    assert {run.folder.name.partition("lr=")[2] for run in second} == {"0.003", "0.006", "0.012"}


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"options": {"model.optim.lrs": [1.0]}}, "tune: one of model.optim.lrs is no option of a run"),
        ({"options": {"model.moe.balance_weight": [-1.0]}}, "balance_weight: must not be negative"),
        ({"options": {"model.optim.min_lr": [0.1]}}, "tune: model.optim.min_lr is None in moepp, not a number"),
        ({"options": {"model.optim.lr": 0.003}}, "tune.options: model.optim.lr: 0.003 is of the wrong type"),
        ({"options": {"model.optim.lr": []}}, "is no option with a list of numbers"),
        ({"options": {"model.optim.lr": ["a"]}}, "is no option with a list of numbers"),
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
