"""The command line: recipes that build on others, `--ckpt_path last`, and errors of one line."""

import argparse
import re
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any, NoReturn, Union, get_args

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from moepp.model import InputError
from moepp.system.files import OnceLoader, read_yaml, without_circles
from moepp.training.checkpoint import newest_checkpoint
from moepp.training.option_names import SECTIONS, did_you_mean
from moepp.training.run_folder import newest_config

# jsonargparse's, of an option that may be of several types: all of them, and what each says to the value
NONE_FITS = re.compile(
    r"(?:- )?Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)"
)
# among these, what is wrong with a class that is named by its path, such as a callback
OF_A_CLASS = re.compile(
    r"^(Parser key \"[\w.]+\": ).* - (?:Problem with given class_path '[\w.]+': )?"
    r"((?:the following arguments are required:|No module named|module '[\w.]+' has no|Parser key) .*?)"
    r" (?:- |Given)"
)
NO_OPTIONS = "holds no options but {}: leave it out, or say what in it is to change"


def expand_last(arguments: list[str], recipe: str) -> list[str]:
    """`--ckpt_path last` is the newest checkpoint under runs/<recipe>/.

    The run goes on in its folder and with its own options, whatever the recipe says by now; what else is on the
    command line wins.
    """
    if value_of("--ckpt_path", arguments) != "last":
        return arguments
    checkpoint = newest_checkpoint(recipe)
    run_dir = checkpoint.parent.parent
    if (config := newest_config(run_dir)) is not None:
        recipes = [i for i, argument in enumerate(arguments) if argument == "--config"]
        others = [a for i, a in enumerate(arguments) if i not in recipes and i - 1 not in recipes]
        arguments = ["--config", str(config), *others]
    return [*arguments, f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={run_dir}"]


def value_of(flag: str, arguments: list[str]) -> str | None:
    """Of `flag value` or `flag=value`, None where neither is there."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next((value for word, value in pairwise(words) if word == flag), None)


def expand_bases(arguments: list[str]) -> list[str]:
    """`--config X`, where X says `base: Y`, becomes `--config Y --config X`: a recipe may be a few lines."""
    expanded: list[str] = []
    words = iter(arguments)
    for argument in words:
        name, _, value = argument.partition("=")
        if name in ("-c", "--config") and (recipe := value or next(words, None)) is not None:
            for path in with_bases(Path(recipe)):
                expanded += ["--config", str(path)]
        else:
            expanded.append(argument)
    return expanded


def with_bases(path: Path) -> list[Path]:
    """The recipe's chain of bases, the first base first."""
    chain = [path.resolve()]
    while chain[0].is_file():  # a missing file is the parser's to report
        recipe = read_yaml(chain[0])
        if not isinstance(recipe, dict):
            raise InputError(f"{chain[0]}: is no recipe: it holds no options")
        if "variants" in recipe:
            raise InputError(f"{chain[0]}: is a matrix of variants: moepp ablate --matrix {path} trains them")
        for name in SECTIONS:
            if name in recipe and not isinstance(recipe[name], dict | str):  # a name is another file's
                raise InputError(f"{name}: {NO_OPTIONS.format(recipe[name])}, in {chain[0]}")
        if recipe.get("base") is None:
            break
        base = (chain[0].parent / str(recipe["base"]).replace("\0", "")).resolve()
        if base in chain:
            raise InputError(f"{chain[0]}: its bases go round in a circle")
        chain.insert(0, base)
    return chain


def naming_recipe(line: str, arguments: list[str]) -> str:
    """An error's line about an option, with the recipe that has the option, or the value that the line is of."""
    found = re.search(r"""^(\w+\.[\w.]+): |(no option) '([\w.]+)|Parser key "([\w.]+)""", line)
    if found is None:
        return line
    names = (found[1] or found[3] or found[4]).split(".")
    recipes = [value for flag, value in pairwise(arguments) if flag == "--config" and Path(value).is_file()]
    for path in reversed(recipes):
        recipe = read_yaml(Path(path))
        for value in (*values_at(recipe, names), *values_at(recipe, ["model", *names])):  # `moe.n_ffn: …`
            if found[2] or re.search(rf"(?<![\w.-]){re.escape(str(value))}(?![\w.])", line):
                return f"{line}, in {path}"
    return line


def values_at(recipe: Any, names: list[str]) -> list[Any]:
    """What is at names[0].names[1]. …, if anything."""
    try:
        return [reduce(getitem, names, recipe)]
    except (KeyError, TypeError):
        return []


def load_value(text: str) -> Any:
    """An option's value, which may hold itself: `&a {b: *a}`, or a key twice."""
    value = yaml_load(text)
    if isinstance(value, dict | list):
        yaml.load(text, OnceLoader)
    try:
        return without_circles(value)
    except ValueError as error:
        raise RecursionError from error


yaml_load = get_loader("yaml")
set_loader("omegaconf+", load_value, (yaml.YAMLError,))


def ints_before_floats(hints: dict[str, Any]) -> None:
    """In each Union. A parser that tries float first reads limit_val_batches=1, one batch, as 1.0, all of them.

    typing takes Union[int, float] for Union[float, int] if it has that in its cache, so that it is left to chance
    which of them Lightning's options are.
    """
    for name, hint in hints.items():
        if {int, float} <= set(get_args(hint)):
            hints[name] = Union[int, hint]  # noqa: UP007


ints_before_floats(Trainer.__init__.__annotations__)


class OwnOptions(argparse.ArgumentParser):
    """A verb's own options, beside which it takes those of `moepp fit`. An error is one line (InputError)."""

    def parse_own(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Its own, and the others. Next to none of these are without a section: what resembles ours is a slip."""
        own, others = self.parse_known_args(arguments)
        for option in others:
            name = option.removeprefix("--").partition("=")[0]
            question = did_you_mean(name, list(vars(own)))
            if question and option.startswith("--") and "." not in name:
                self.error(f"unrecognized arguments: {option}{question}")
        return own, others

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class OneLineParser(LightningArgumentParser):
    """Reports an error as one line (InputError), where argparse prints its usage as well."""

    def __init__(self, *args: Any, description: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, description=description or "", **kwargs)  # Lightning's names its own tool

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except RecursionError as error:
            raise InputError("an option's value is nested too deep, or holds itself") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = re.sub(r"^Call to compute_fn of link .* failed: ", "", " ".join(str(message).split()))
        line = re.sub(
            r"^Parser key \"config\": (File does not exist: .*)",
            r"config: \1 (recipes/ has those that come)",
            line,
        )
        if in_class := OF_A_CLASS.match(line):
            line = "".join(in_class.groups())
        line = NONE_FITS.sub(r"must be one of \1; got \2", line)
        line = re.sub(r"Expected a (.*)\. Got value: (.*)", r"must be \1; got \2", line)
        line = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", line)
        line = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", line).replace("NoneType", "null")
        line = re.sub(r"Group ['\"]([\w.]+)['\"] does not accept option ['\"]", r"no option '\1.", line)
        if unknown := re.search(r"(?:unrecognized arguments: --|no option ')([\w.]+)", line, re.I):
            line += did_you_mean(unknown[1], [action.dest for action in self._actions])
        raise InputError(line)
