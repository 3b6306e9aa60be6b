"""The command line, before it is parsed: recipes that build on others, and `--ckpt_path last`."""

from itertools import pairwise
from pathlib import Path

from moepp.model import InputError
from moepp.system.files import read_yaml
from moepp.training.checkpoint import newest_checkpoint
from moepp.training.run_folder import newest_config


def expand_last(arguments: list[str], recipe: str) -> list[str]:
    """`--ckpt_path last` is the newest checkpoint under runs/<recipe>/.

    The run goes on in its folder and with its own options, whatever the recipe says by now; what else is on the
    command line wins.
    """
    if "--ckpt_path=last" not in arguments and ("--ckpt_path", "last") not in pairwise(arguments):
        return arguments
    checkpoint = newest_checkpoint(recipe)
    run_dir = checkpoint.parent.parent
    if (config := newest_config(run_dir)) is not None:
        recipes = [i for i, argument in enumerate(arguments) if argument == "--config"]
        others = [a for i, a in enumerate(arguments) if i not in recipes and i - 1 not in recipes]
        arguments = ["--config", str(config), *others]
    return [*arguments, f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={run_dir}"]


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
        if not isinstance(recipe, dict) or recipe.get("base") is None:
            break
        base = (chain[0].parent / str(recipe["base"]).replace("\0", "")).resolve()
        if base in chain:
            raise InputError(f"{chain[0]}: its bases go round in a circle")
        chain.insert(0, base)
    return chain
