import torch

from moepp.cli import main
from moepp.training.lightning_cli import MoECLI, OptionsAlone, parse, resolve
from moepp.training.option_names import SECTIONS


def test_the_sections_are_those_of_the_parser() -> None:
    cli: MoECLI = parse(OptionsAlone, "fit", [])
    with_options = {action.dest.rpartition(".")[0] for action in cli.parser._actions}
    ours = {section for section in with_options if section.startswith(("model", "data", "checkpoints"))}
    assert ours | {"trainer"} == set(SECTIONS)


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
