"""The rooms of the package: imports run one way, and no file is too long to read in one sitting."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moepp"
BELOW = {  # what a folder may import of the package, beside itself
    "model": set(),
    "hf": {"model"},
    "system": {"model"},
    "text": {"model", "system"},
    "training": {"model", "system", "text"},
    "study": {"model", "system", "text", "training"},
}
NEIGHBOURS = {  # what a room of the study may not import of its neighbours
    "compare": {"figures", "eval", "tasks"},
    "figures": {"compare", "eval"},
    "eval": {"compare"},
    "tasks": {"compare", "figures", "eval"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Absolute names of what the file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = ["moepp", *file.relative_to(PACKAGE).parts[: -node.level]] if node.level else []
            module = [*folder, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    folder, *deeper = file.relative_to(PACKAGE).parts
    if folder not in BELOW:
        return
    for name in imported(file):
        package, _, rest = name.partition(".")
        if package == "moepp" and rest != "__version__":
            assert rest.split(".")[0] in BELOW[folder] | {folder}, name
        if folder == "hf" or (folder == "text" and file.name != "data_module.py"):
            assert package != "lightning"
        if folder != "hf":
            assert package != "transformers"
        if folder == "study" and name.startswith("moepp.study.") and deeper[0] in NEIGHBOURS:
            assert name.split(".")[2] not in NEIGHBOURS[deeper[0]]
        if folder != "study" or deeper[0] not in ("eval", "tasks"):
            assert package != "lm_eval"


def test_every_folder_has_its_place() -> None:
    assert {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE} == BELOW.keys()


def test_no_file_is_longer_than_350_lines() -> None:
    one_file = {"modeling_moepp.py": 370}  # it goes into folders by itself
    lengths = {file.name: len(file.read_text().splitlines()) for file in FILES}
    assert {name: n for name, n in lengths.items() if n > one_file.get(name, 350)} == {}
