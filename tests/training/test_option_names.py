import subprocess
import sys

import pytest
import torch

from moepp.cli import main
from moepp.training.lightning_cli import MoECLI, OptionsAlone, parse, resolve
from moepp.training.option_names import CLASSES, find_mistyped, names_in

HEAVY = ("torch", "lightning", "numpy")


def test_the_names_are_those_of_the_parser() -> None:
    cli: MoECLI = parse(OptionsAlone, "fit", [])
    known = {action.dest for action in cli.parser._actions}
    for section in CLASSES:
        for name in names_in(section):
            assert any(f"{dest}.".startswith(f"{section}.{name}.") for dest in known), f"{section}.{name}"
    for dest in known:
        assert find_mistyped([f"--{dest}=1"]) is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--trainer.max_step=3", "trainer.max_steps"),
        ("--model.moe.n_zeros", "model.moe.n_zero"),
        ("--data.batchsize=1", "data.batch_size"),
    ],
)
def test_a_mistyped_option_is_refused_before_anything_heavy_is_imported(typed: str, meant: str) -> None:
    code = (
        f"import sys; from moepp.cli import main; code = main(['fit', {typed!r}]);"
        f"sys.exit(code + 10 * sum(name in sys.modules for name in {HEAVY}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert f"unrecognized arguments: {typed}" in ended.stderr
    assert f"(did you mean {meant}?)" in ended.stderr


def test_what_lies_below_an_option_is_left_to_the_parser() -> None:
    assert (
        find_mistyped(["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks+=Timer", "--config=x"]) is None
    )


def test_resolving_options_seeds_nothing() -> None:
    before = torch.get_rng_state()
    assert resolve(["--seed_everything=7"])["seed_everything"] == 7
    assert torch.equal(torch.get_rng_state(), before)


def test_options_that_were_refused_leave_no_trace() -> None:
    """Where a parser is used again."""
    for wrong in (["--print_config=nonsense"], ["--print_config", "--model.moe.tau=x"]):
        assert main(["fit", *wrong]) == 2
        assert resolve(["--model.moe.tau=0.5"])["model"]["moe"]["tau"] == 0.5
    assert resolve([])["model"]["moe"]["tau"] == 0.75
