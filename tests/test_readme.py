"""README's commands and code, and what the Makefile makes of its variables."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import moepp
from moepp.cli import VERBS, main
from moepp.training.lightning_cli import resolve
from tests.conftest import RECIPES

ROOT = RECIPES.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
LINES = {
    line.partition(" #")[0].strip()
    for language, block in BLOCKS
    for line in block.replace("\\\n", "").splitlines()
    if language == "bash"
}
COMMANDS = sorted(line for line in LINES if line.startswith("make "))
IN_WORDS = {inline.replace("…", "x.ckpt") for inline in re.findall(r"`(moepp \w+ [^`]*--[^`]+)`", README)}
VERB_COMMANDS = sorted({line for line in LINES if line.startswith("moepp ")} | IN_WORDS)


def moepp_arguments(make: str) -> list[str]:
    """Those of the `moepp` that `make …` would start; nothing of a target that starts something else."""
    outer = {
        "MAKEFLAGS",
        "MAKEOVERRIDES",
        "MFLAGS",
        "ARGS",
        "CKPT",
        "DATA",
        "PROMPT",
        "RECIPE",
        "TASKS",
    }  # make test's
    env = {name: value for name, value in os.environ.items() if name not in outer}
    dry = subprocess.run([*shlex.split(make), "-n"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    starts = [line for line in dry.stdout.splitlines() if line.startswith(".venv/bin/moepp")]
    return shlex.split(starts[-1])[1:] if starts else []


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ("train", "fit --config recipes/moepp.yaml"),
        (
            "train RECIPE=recipes/vanilla.yaml DATA='my text.txt' ARGS='--trainer.max_steps=2 --data.seed=1'",
            "fit --config recipes/vanilla.yaml --trainer.max_steps=2 --data.seed=1 --data.path='my text.txt'",
        ),
        ("compare DATA=my.txt ARGS=--quick", "ablate --matrix recipes/compare.yaml --quick --data.path=my.txt"),
        ("ablate RECIPE=recipes/gpu.yaml", "ablate --matrix recipes/ablate.yaml --base=recipes/gpu.yaml"),
        ("frontier ARGS=--quick", "ablate --matrix recipes/frontier.yaml --quick"),
        ("data DATA=my.txt", "prepare my.txt"),
        ("data", "prepare data/corpus.yaml"),
        ("resume", "fit --config recipes/moepp.yaml --ckpt_path last"),
        ("figures CKPT=a.ckpt DATA=sciq", "figures --ckpt=a.ckpt --data.path=sciq"),
        ("eval TASKS=sciq,piqa CKPT=a.ckpt", "eval --tasks=sciq,piqa --ckpt=a.ckpt"),
        ("generate PROMPT='The Lord said'", "generate --prompt=$PROMPT"),
    ],
)
def test_what_make_starts(make: str, arguments: str) -> None:
    assert moepp_arguments(f"make {make}") == shlex.split(arguments)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make bench")])
def test_a_command_of_the_readme_is_one(command: str) -> None:
    """`make bench` starts make anew, which `-n` does not keep from running. Options of training are real ones."""
    verb, *options = moepp_arguments(command) or ["help"]
    assert verb in {"help", *VERBS}
    if verb == "fit" and "--ckpt_path" not in options:
        path = options.index("--config") + 1
        resolve([*options[:path], str(ROOT / options[path]), *options[path + 1 :]])


@pytest.mark.parametrize("command", VERB_COMMANDS)
def test_a_verb_of_the_readme_lacks_nothing_but_its_files(
    command: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "recipes").symlink_to(RECIPES)
    try:
        code = main(shlex.split(command)[1:])
    except SystemExit as end:  # how --print_config ends
        code = end.code
    lacks = re.search("does not exist|has no config.json|has no checkpoint", capsys.readouterr().err)
    assert code == 0 or lacks


def test_the_code_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for language, block in BLOCKS if language == "python" and "load_released" in block)
    released = Path(__file__).parent / "model/reference/released_linear_gate"
    names = {"x": torch.randn(2, 5, 768), "cross_entropy": torch.zeros(())}
    exec(code.replace("path/to/released/folder", str(released)), names)
    assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]
    assert {"MoELayer", "load_released"} <= set(moepp.__all__)


def test_a_budget_is_held_in_a_loop_as_in_the_readme() -> None:
    import moepp.model

    (code,) = (block for language, block in BLOCKS if language == "python" and "observe" in block)
    batches = [(torch.randint(8192, (4, 32)), None) for _ in range(22)]
    names = vars(moepp.model) | {"torch": torch, "batches": batches, "update": lambda output, targets: None}
    exec(code, names)
    with torch.no_grad():
        routings = [routing for inputs, _ in batches for routing in names["model"](inputs).routings]
    spent = torch.cat([routing.computed().sum(1).float() for routing in routings]).mean().item()
    assert spent == pytest.approx(1.2, rel=0.01)


def test_the_package_has_the_names_of_the_method() -> None:
    import moepp.model

    for name in moepp.__all__:
        assert getattr(moepp, name) is getattr(moepp.model, name)
