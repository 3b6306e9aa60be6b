"""A mistyped option is known by the sources alone: Lightning, which knows it too, takes seconds to import."""

import ast
import difflib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CLASSES = {  # what the options of a section are the fields or arguments of
    "trainer": ("lightning/pytorch/trainer/trainer.py", "Trainer"),
    "model": ("moepp/training/module.py", "LitMoE"),
    "model.transformer": ("moepp/model/config.py", "TransformerConfig"),
    "model.moe": ("moepp/model/config.py", "MoEConfig"),
    "model.optim": ("moepp/training/optimizer.py", "OptimConfig"),
    "model.parallel": ("moepp/model/sharding.py", "ParallelConfig"),
    "model.budget": ("moepp/training/start.py", "BudgetConfig"),
    "model.convert": ("moepp/training/start.py", "ConvertConfig"),
    "model.distill": ("moepp/training/start.py", "DistillConfig"),
    "data": ("moepp/text/data_module.py", "TokenDataModule"),
    "checkpoints": ("moepp/training/saving.py", "Checkpoints"),
}


def find_mistyped(arguments: list[str]) -> str | None:
    """One line on the first argument, such as `--trainer.max_step=3`, that no option of `moepp fit` is called."""
    for argument in arguments:
        section, _, name = argument.partition("=")[0].removeprefix("--").rpartition(".")
        if not argument.startswith("--") or section not in CLASSES:
            continue
        if (name := name.rstrip("+")) not in names_in(section):
            return f"unrecognized arguments: {argument}" + did_you_mean(name, names_in(section), f"{section}.")
    return None


def did_you_mean(name: str, known: list[str], section: str = "") -> str:
    """A question to end a message with, empty where nothing known resembles `name`."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {section}{close[0]}?)" if close else ""


@cache
def names_in(section: str) -> list[str]:
    file, class_name = CLASSES[section]
    package: Any = find_spec(file.partition("/")[0])
    tree = ast.parse(Path(package.origin).parents[1].joinpath(file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
    return [
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
