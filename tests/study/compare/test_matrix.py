"""The shipped matrices are valid and fair; a wrong one is refused in one line."""

from pathlib import Path

import pytest
import yaml

from moepp.cli import main
from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig, count_parameters
from moepp.study.compare.matrix import Matrix, read_matrix, resolve
from moepp.system.files import differences
from moepp.training.checkpoint import checkpoint_of, write_checkpoint
from tests.conftest import RECIPES

# what MoE++ has and vanilla MoE has not
SWITCHES = {f"model.moe.{key}" for key in ("n_zero", "n_copy", "n_const", "gating_residual", "ffn_budget")}


def load(name: str, overrides: list[str] | None = None) -> Matrix:
    contents = read_matrix(RECIPES / name)
    return resolve(RECIPES / name, contents, RECIPES / contents["base"], overrides or [], Path("out"))


@pytest.fixture(scope="module")
def ablate() -> Matrix:
    return load("ablate.yaml")


def test_the_papers_matrix_is_complete(ablate: Matrix) -> None:
    variants = {variant.name: variant.moe for variant in ablate.variants}
    with_residual = [moe for moe in variants.values() if moe.gating_residual and moe.tau == 0.75]
    kinds = {(moe.n_zero, moe.n_copy, moe.n_const) for moe in with_residual}
    assert {(zero, copy, const) for zero in (0, 1) for copy in (0, 1) for const in (0, 2)} <= kinds
    full = variants["full"]
    assert {variants[v.name].tau for v in ablate.variants if "tau" in v.plots} == {0.1, 0.25, 0.5, 0.75, 1.0}
    assert {variants[v.name].n_const for v in ablate.variants if "constants" in v.plots} >= {0, 1, 2, 4}
    assert list(differences(vars(full), vars(variants["no_residual"]))) == [("gating_residual", True, False)]
    vanilla = ablate.reference
    assert vanilla.name == "vanilla"
    assert (vanilla.moe.n_zero_computation, vanilla.moe.gating_residual) == (0, False)


def test_the_dense_model_is_as_wide_as_two_active_experts(ablate: Matrix) -> None:
    dense = next(variant for variant in ablate.variants if variant.name == "dense")
    assert (dense.moe.n_ffn, dense.moe.top_k, dense.moe.n_zero_computation) == (1, 1, 0)
    assert dense.transformer.intermediate_size == 2 * ablate.reference.transformer.intermediate_size


def test_variants_differ_in_the_moe_alone_and_have_vanillas_parameters(ablate: Matrix) -> None:
    reference = ablate.reference
    total = count_parameters(reference.transformer, reference.moe).total
    for variant in ablate.variants:
        changed = {key for key, *_ in differences(reference.options, variant.options)}
        if variant.name == "dense":
            changed -= {"model.transformer.intermediate_size"}
        else:
            assert count_parameters(variant.transformer, variant.moe).total == pytest.approx(total, rel=0.01)
        assert all(key.startswith("model.moe.") for key in changed), variant.name


def test_compare_is_vanilla_against_the_recipe_with_overrides_in_both() -> None:
    matrix = load("compare.yaml", ["--trainer.max_steps=7", "--model.moe.n_ffn=4"])
    vanilla, shorter, moepp = matrix.variants
    assert (vanilla.name, shorter.name, moepp.name) == ("vanilla", "vanilla_equal_flops", "moepp")
    for variant in matrix.variants:
        assert (variant.steps, variant.moe.n_ffn) == (6 if variant is shorter else 7, 4)
        assert variant.options["data"]["vocab_size"] == 8192
    changed = {key for key, *_ in differences(vanilla.options, moepp.options)}
    assert changed == SWITCHES
    assert list(differences(vanilla.options, shorter.options)) == [("trainer.max_steps", 7, 6)]


def test_what_asks_about_one_thing_changes_one_thing() -> None:
    vanilla, even, moepp, dense = load("more_compute.yaml").variants
    assert list(differences(vanilla.options, even.options)) == [("model.moe.balance_weight", 0.003, 0.01)]
    assert list(differences(moepp.options, dense.options)) == [("model.moe.ffn_budget", 1.2, 1.9)]
    vanilla, moepp = load("more_beta.yaml").variants
    assert {key for key, *_ in differences(vanilla.options, moepp.options)} == SWITCHES
    in_float32, in_bf16 = load("precision.yaml").variants
    changed = [("trainer.precision", "32-true", "bf16-mixed")]
    assert list(differences(in_float32.options, in_bf16.options)) == changed


def test_a_scheduled_budget_costs_what_it_is_on_the_way() -> None:
    variants = {variant.name: variant for variant in load("frontier.yaml", ["--trainer.max_steps=40"]).variants}
    scheduled, held, longer = (variants[name] for name in ("schedule_0.8", "moepp_0.8", "longer_0.8"))
    # twenty steps from 1.9 on the way to 0.8, 9.5 of them on average, then twenty of 0.8
    mean = (1.9 - 1.1 * 9.5 / 20 + 0.8) / 2
    trained = 40 * 2048 * held.training_flops_per_token(mean)
    assert scheduled.training_flops() == pytest.approx(trained + held.calibration_flops)
    # as many steps as it pays for, with the text that is read again, a quarter
    costs = {steps: longer.with_options({"trainer.max_steps": steps}).training_flops() for steps in range(40, 60)}
    assert longer.steps == max(steps for steps, flops in costs.items() if flops <= scheduled.training_flops())
    per_step = 2048 * (held.training_flops_per_token(0.8) + held.calibration_flops / held.tokens)
    assert longer.steps == int(scheduled.training_flops() / per_step)


def test_the_seed_reaches_weights_and_data(tmp_path: Path) -> None:
    run = load("compare.yaml").runs(3, tmp_path)[-1]
    assert run.name == "moepp/seed2"
    assert (run.options["seed_everything"], run.options["data"]["seed"]) == (2, 2)
    fixed = load("compare.yaml", ["--data.seed=5"]).runs(2, tmp_path)[-1]
    assert (fixed.options["seed_everything"], fixed.options["data"]["seed"]) == (1, 5)


def test_a_variant_has_the_vocabulary_of_what_it_starts_from(tmp_path: Path) -> None:
    """Which need not be padded, as one of the data would be."""
    sizes = TransformerConfig(96, 1, 8, 8, 2)
    content = checkpoint_of(Transformer(sizes, MoEConfig()), tokenizer_json=None, end_of_text=None, data="text")
    write_checkpoint(tmp_path / "a.ckpt", content)
    start = [f"--model.init_from={tmp_path / 'a.ckpt'}"]
    assert load("compare.yaml", start).reference.transformer.vocab_size == 96
    assert load("compare.yaml", ["--data.vocab_size=400"]).reference.transformer.vocab_size == 448


def test_tokens_of_all_devices_are_counted() -> None:
    one, two = (load("compare.yaml", [f"--trainer.devices={n}"]).reference.tokens for n in (1, 2))
    assert two == 2 * one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": {"a": {}, "b": {"model": {"moe": {"n_zeros": 1}}}}}, "variant b: .*n_zeros[^,]*$"),
        ({"variants": {"a": {}, "b": {"model": {"moe": {"tau": -1}}}}}, "variant b: .*tau"),
        ({"variants": {"a": {}, "b": {}}}, "a and b are the same configuration"),
        ({"variants": {"a": {}, "../b": {}}}, "is no name"),
        ({"variants": {"a": {}, "": {}}}, "variant '': is no name"),
        ({"variants": {"a": {}, "b": {"plots": ["pie"]}}}, "no plot 'pie'"),
        ({"reference": "vanila"}, "reference 'vanila' is none"),
        ({"variants": {"a": {}, "b": {"trainer": None}}}, "variant b: trainer: holds no options but None"),
        ({"variants": {"a": {}, "b": {"plots": 5}}}, "variant b: plots: 5 is of the wrong type"),
        ({"variants": {"a": {}, "b": {"plots": [[]]}}}, "no plot"),
        ({"variants": {"a": {}, "b": {"flops_of": ["a"]}}}, "flops_of: .* is of the wrong type"),
        ({"variants": {"a": {}, "b": {"flops_of": "b"}}}, "flops_of: 'b' is no other variant"),
        ({"variants": {"a": {}, "b": {"flops_of": ""}}}, "flops_of: '' is no other variant"),
        ({"variants": {"a": {}, "b": {"flops_of": "c"}, "c": 3}}, "variant 'c': is no name with a mapping"),
        ({"variants": {"a": {}, "b": {"flops_of": "c"}}}, "flops_of: 'c' is no other variant"),
        ({"variants": {"a": {}, "b": {"flops_of": "a"}, "c": {"flops_of": "b"}}}, "flops_of: 'b' is no other"),
        ({"variants": {"a": {}, "b": {"ffn_width": None}}}, "variant b: ffn_width: None is of the wrong type"),
        (
            {"variants": {"a": {}, "b": {"paper": {"accuracy": 47}}}},
            "variant b: paper.accuracy: 47 is of the wrong",
        ),
        (
            {"variants": {"a": {}, "b": {"paper": {"accuracy": {"1B": "x"}}}}},
            "paper.accuracy: 'x' is of the wrong",
        ),
        ({"reference": ["a"]}, "reference: .* is of the wrong type"),
        ({"quick": 5}, "quick: 5 is of the wrong type"),
        ({"sources": "nowhere"}, "sources: 'nowhere' is of the wrong type"),
        ({1: 2, "x": 3}, "unknown key '1'"),
        ({"sedes": 3}, "unknown key 'sedes'"),
        ({"base": "nothing.yaml"}, "nothing.yaml does not exist"),
        ({"variants": {"a": {"trainer": {"default_root_dir": "x"}}}}, "trainer.default_root_dir: .* its own"),
        ({"variants": {"a": {"trainer": {"devices": [0, 1]}}}}, "trainer.devices: .* number of devices"),
        ({"variants": {"a": {"trainer": {"devices": 0}}}}, "trainer.devices: .* number of devices, got 0"),
        ({"variants": {"a": {"trainer": {"max_steps": -1}}}}, "trainer.max_steps: .* number of steps"),
    ],
)
def test_a_wrong_matrix_ends_in_one_line(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "m.yaml"
    matrix = {"base": str(RECIPES / "moepp.yaml"), "reference": "a", "variants": {"a": {}}} | change
    path.write_text(yaml.safe_dump(matrix))
    with pytest.raises(InputError, match=words) as error:
        resolve(path, read_matrix(path), path.parent / matrix["base"], [], Path("out"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--matrix=none.yaml"], "none.yaml does not exist"),
        ([], "--matrix"),
        ([f"--matrix={RECIPES / 'compare.yaml'}", "--seeds=0"], "seeds: must be from 1 to 1000, got 0"),
        ([f"--matrix={RECIPES / 'compare.yaml'}", "--seeds=1000000000"], "seeds: must be from 1 to 1000"),
        ([f"--matrix={RECIPES / 'compare.yaml'}", "--trainer.max_stepz=3"], "max_stepz"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments: list[str], words: str, workdir: Path, capsys) -> None:
    assert main(["ablate", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not list(workdir.iterdir())
