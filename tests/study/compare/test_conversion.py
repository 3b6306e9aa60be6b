"""A tiny study whose runs go on from a model that is trained first."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from moepp.cli import main
from moepp.model.conversion import SILENT
from moepp.model.router import routers
from moepp.study.compare.matrix import Matrix, read_matrix, resolve
from moepp.training.checkpoint import load
from tests.conftest import RECIPES, tiny

ADDED = {"model": {"moe": {"n_zero": 2, "gating_residual": True, "balance_groups": True, "score_bias": True}}}
MATRIX = {
    "base": str(RECIPES / "vanilla.yaml"),
    "start": str(RECIPES / "vanilla.yaml"),
    "reference": "vanilla",
    "seeds": 1,
    "variants": {
        "vanilla": {"plots": ["compute"]},
        "converted": ADDED | {"noise": 0.5, "plots": ["compute"]},
        "distilled": {"model": ADDED["model"] | {"distill": {"teacher": "start"}}, "plots": ["compute"]},
    },
}


@pytest.mark.heavy
def test_every_variant_goes_on_from_the_trained_model(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepp.study.compare.speed.SECONDS", 0.0)
    (workdir / "m.yaml").write_text(yaml.safe_dump(MATRIX))
    options = [option for option in tiny(text_file) if not option.startswith("--config")]
    command = ["ablate", "--matrix=m.yaml", "--jobs=2", "--trainer.max_steps=8", *options]
    assert main(command) == 0
    trained = load("runs/m/start/seed0/checkpoints/step-00000008.ckpt").model
    silent = load("runs/m/start/seed0/converted.ckpt").model
    tokens = torch.arange(30).view(1, 30)
    torch.testing.assert_close(silent(tokens).logits, trained(tokens).logits)
    assert routers(silent)[0].bias == SILENT
    chosen = yaml.safe_load(Path("runs/m/distilled/seed0/options.yaml").read_text())["model"]
    assert chosen["init_from"] == "runs/m/start/seed0/distilled.ckpt"
    assert chosen["distill"]["teacher"] == "runs/m/start/seed0/checkpoints/step-00000008.ckpt"
    with Path("runs/m/report/results.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(rows["vanilla"]["ffn_experts_per_token"]) == 2 > float(rows["converted"]["ffn_experts_per_token"])
    assert all(float(row["largest_rise"]) < 1 for row in rows.values())
    report = Path("runs/m/report/report.md").read_text()
    assert "## From a trained model" in report
    assert Path("runs/m/report/compute.png").is_file()


def test_the_shipped_matrix_compares_what_it_says() -> None:
    def matrix(**changes: str) -> Matrix:
        contents = read_matrix(RECIPES / "convert.yaml") | changes
        return resolve(RECIPES / "convert.yaml", contents, RECIPES / contents["base"], [], Path("out"))

    quick = read_matrix(RECIPES / "convert.yaml")["quick"]
    for shipped in (matrix(), matrix(start=quick["start"], base=quick["base"])):
        start, variants = shipped.start, {variant.name: variant for variant in shipped.variants}
        assert start is not None
        assert {variant.tokens for variant in variants.values()} == {variants["vanilla"].tokens}
        assert start.variant.moe == variants["vanilla"].moe
        assert variants["converted"].moe == variants["drawn_rows"].moe == variants["distilled"].moe
        assert variants["vanilla"].options["model"]["init_from"] == str(start.checkpoint(0))
        assert variants["converted"].moe.expected_ffn_per_token == pytest.approx(4 / 3)
        assert variants["drawn_rows"].options["model"]["convert"]["start"] == 0
        flops = {name: variant.training_flops_per_token(1.0) for name, variant in variants.items()}
        forward = start.variant.training_flops_per_token(2.0) / 3
        assert flops["distilled"] == pytest.approx(flops["converted"] + forward)
