"""Every recipe is valid, has the parameters that its comment promises, and takes two steps when shrunk."""

from pathlib import Path

import pytest
import torch
import yaml

from moepp.cli import main
from moepp.model import MoEConfig, Transformer, TransformerConfig, count_parameters
from moepp.training.arguments import with_bases
from moepp.training.checkpoint import read_checkpoint, step_path
from tests.conftest import RECIPES, assert_same, tiny

MATRICES = {
    "compare.yaml",
    "ablate.yaml",
    "convert.yaml",
    "frontier.yaml",
    "more_beta.yaml",
    "more_compute.yaml",
    "precision.yaml",
}  # of recipes; tests/study has their tests
NAMES = sorted({str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")} - MATRICES)


OF_0_6B = (  # parameters, worked out by hand
    2 * 65536 * 768  # embedding and head
    + 12 * 4 * 768 * 768  # attention
    + 12 * 8 * 3 * 768 * 2048  # FFN experts
    + 12 * 12 * 768  # routers
    + 11 * 12 * 12  # gating residuals
    + 12 * 2 * 3 * 768  # constant experts
    + 25 * 768  # norms
)


def resolve(name: str) -> tuple[TransformerConfig, MoEConfig]:
    """The model of a recipe, its bases merged by hand."""
    merged: dict[str, dict] = {"transformer": {}, "moe": {}}
    vocab_size = 8192
    for path in with_bases(RECIPES / name):
        recipe = yaml.safe_load(path.read_text())
        for part, values in merged.items():
            values.update(recipe.get("model", {}).get(part, {}))
        vocab_size = recipe.get("data", {}).get("vocab_size", vocab_size)
    return TransformerConfig(vocab_size=vocab_size, **merged["transformer"]), MoEConfig(**merged["moe"])


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_the_meta_device_with_the_counted_parameters(name: str) -> None:
    transformer, moe = resolve(name)
    with torch.device("meta"):
        model = Transformer(transformer, moe)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(transformer, moe).total


@pytest.mark.parametrize("name", NAMES)
def test_takes_two_steps_when_shrunk_and_resumes(name: str, text_file: Path, workdir: Path) -> None:
    """From the checkpoint of the first step the second is the same again, bit for bit (of four: how a run goes on
    is tested elsewhere)."""
    options = [*tiny(text_file, name), "--trainer.max_steps=2", "--checkpoints.every_n_steps=1"]
    assert main(["fit", *options]) == 0
    whole, resumed = (workdir / "runs" / Path(name).stem / n for n in ("1", "2"))
    assert (whole / "result.json").is_file()
    if name not in ("moepp.yaml", "vanilla.yaml", "ablations/no_const.yaml", "gpu.yaml"):
        return
    assert main(["fit", *options, f"--ckpt_path={step_path(whole, 1)}"]) == 0
    assert_same(*(read_checkpoint(step_path(run, 2))["state_dict"] for run in (resumed, whole)))


@pytest.mark.parametrize(
    ("name", "total", "shape"),
    [
        ("sizes/0.6b.yaml", OF_0_6B, (12, 768, 2048, 12, 64, 8, 1, 1, 2)),
        ("sizes/1b.yaml", 1_035_207_728, (12, 768, 2048, 12, 64, 16, 1, 1, 2)),
        ("sizes/2b.yaml", 1_941_485_504, (12, 768, 2048, 12, 64, 32, 1, 1, 6)),
        ("sizes/7b.yaml", 7_676_619_248, (24, 1536, 4096, 16, 96, 16, 1, 1, 2)),
    ],
)
def test_sizes_are_the_papers(name: str, total: int, shape: tuple[int, ...]) -> None:
    """Table 1 of the paper."""
    t, m = resolve(name)
    actual = (t.n_layers, t.hidden_size, t.intermediate_size, t.n_heads, t.head_dim)
    assert (*actual, m.n_ffn, m.n_zero, m.n_copy, m.n_const) == shape
    assert (t.vocab_size, t.context_length, m.top_k, m.tau, m.capacity_factor) == (65536, 2048, 2, 0.75, 1.1)
    assert count_parameters(t, m).total == total


def test_the_recipe_for_a_gpu_has_the_parameters_that_it_says() -> None:
    transformer, moe = resolve("gpu.yaml")
    parameters = count_parameters(transformer, moe)
    assert (round(parameters.total / 1e9, 2), round(parameters.active(moe.expected_ffn_per_token) / 1e9, 2)) == (
        0.95,
        0.13,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if "ablations" in name or name == "vanilla.yaml"])
def test_ablations_change_only_what_they_name(name: str) -> None:
    (transformer, moe), (base_transformer, base_moe) = resolve(name), resolve("moepp.yaml")
    assert transformer == base_transformer
    changed = {key for key in vars(moe) if getattr(moe, key) != getattr(base_moe, key)}
    stem = Path(name).stem
    kinds = {"n_zero", "n_copy", "n_const"}
    if stem == "vanilla":
        assert changed == kinds | {"gating_residual"}
    elif stem == "no_residual":
        assert changed == {"gating_residual"}
    else:
        which, kind = stem.split("_")
        assert changed == ({f"n_{kind}"} if which == "no" else kinds - {f"n_{kind}"})
