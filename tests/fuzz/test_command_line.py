"""Options, recipes and matrices of any content, through `moepp.cli.main`.

What takes long is done once or not at all: the parser is built once, and of a run everything happens but the
training itself. That is test_runs.py's.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from moepp.training.lightning_cli import MoECLI
from tests.fuzz.harness import EDIT, JUNK, Edit, TreeEdit, cases, tree_edit, works_or_one_line

RECIPE = {
    "base": None,
    "seed_everything": 1,
    "model": {
        "transformer": {
            "n_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 8,
            "n_heads": 2,
            "context_length": 8,
        },
        "moe": {"n_ffn": 2, "n_zero": 1, "n_copy": 1, "n_const": 2, "tau": 0.5, "capacity_factor": None},
        "optim": {"lr": 3.0e-3, "min_lr": 3.0e-4, "warmup_steps": 2, "betas": [0.9, 0.99]},
    },
    "data": {
        "path": "text.txt",
        "vocab_size": 300,
        "seq_len": "${model.transformer.context_length}",
        "batch_size": 2,
    },
    "trainer": {"max_steps": 1, "accelerator": "cpu", "limit_val_batches": 1, "gradient_clip_val": 1.0},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory, with recipe.yaml."""
    folder = tmp_path_factory.mktemp("command_line")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        yield folder


@pytest.fixture(scope="module")
def without_training(home: Path) -> Iterator[None]:
    def forget(self: MoECLI) -> None:
        if self.verb == "fit":
            self.run_folder.forget()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoECLI, "after_instantiate_classes", forget)
        yield


# ---- options -----------------------------------------------------------------------------------------------


def keys_of(tree: Any, key: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{key}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{key}{name}.")


def known_keys() -> list[str]:
    optional = {"precision": 0, "devices": 0, "max_time": 0, "max_epochs": 0, "accumulate_grad_batches": 0}
    optional |= {"val_check_interval": 0, "log_every_n_steps": 0, "strategy": 0, "logger": 0, "profiler": 0}
    more = {"trainer": optional, "ckpt_path": 0, "config": 0, "data": {"seed": 0, "val_fraction": 0}}
    return sorted({*keys_of(RECIPE), *keys_of(more)})


KEYS = st.one_of(
    st.sampled_from(known_keys()),
    st.builds(lambda key, edit: edit(key.encode()).decode(errors="replace"), st.sampled_from(known_keys()), EDIT),
    st.text(max_size=8),
)
NASTY = [
    *(
        "",
        " ",
        "\n",
        "null",
        "true",
        "nan",
        ".nan",
        "-.inf",
        "1e400",
        "-0",
        "0x10",
        "1_000",
        "1:60",
        "2020-13-45",
        "=",
        "<<",
    ),
    *(
        "[]",
        "{}",
        "[1,",
        "{a: 1}",
        "{a: {b: c}}",
        "[[1]]",
        "- 1",
        "a: b: c",
        "!!int x",
        "!!bool x",
        "!!python/name:os.system",
    ),
    *(
        "${x}",
        "${",
        "${model.moe.tau}",
        "${model}",
        "${oc.env:NOWHERE}",
        "${oc.env:HOME}",
        "${oc.decode:'['}",
        "${a:b}",
    ),
    *(
        "*a",
        "&a [*a]",
        "&a {b: *a}",
        "--x",
        "-",
        "recipe.yaml",
        "last",
        "../..",
        "\x00",
        "\x1b[31m",
        "é😀\u2028",
        "\ud800",
    ),
    *("9" * 5000, "a" * 20_000, "[" * 3000, "{a: " * 500, "1" + "0" * 400, "1e5", "10000000000000000000", "-1"),
]
VALUES = st.sampled_from(NASTY) | JUNK.map(json.dumps) | st.text(max_size=8)
OPTION = st.builds(
    lambda form, key, value: form.replace("K", key).replace("V", value).split("|"),
    st.sampled_from(["--K=V", "--K=V", "--K=V", "--K|V", "--K", "K=V", "--K+=V", "-K"]),
    KEYS,
    VALUES,
)


@cases(100, options=st.lists(OPTION, min_size=1, max_size=2))
def test_options(home: Path, without_training: None, options: list[list[str]]) -> None:
    works_or_one_line("fit", "--config=recipe.yaml", *(word for option in options for word in option))


@cases(
    30,
    verb=st.sampled_from(["validate", "prepare", "generate", "import", "export", "ablate"]),
    options=st.lists(OPTION, max_size=2),
)
def test_options_of_other_verbs(home: Path, without_training: None, verb: str, options: list[list[str]]) -> None:
    works_or_one_line(verb, *(word for option in options for word in option))


# ---- recipes -----------------------------------------------------------------------------------------------

BASES = ["any.yaml", "recipe.yaml", "./recipe.yaml", "nowhere.yaml", ".", "", "~", "\x00", "a" * 300, "${model}"]
RECIPE_VALUES = JUNK | st.sampled_from(NASTY)


@cases(
    65, edits=st.lists(tree_edit(RECIPE_VALUES), min_size=1, max_size=3), base=st.none() | st.sampled_from(BASES)
)
def test_recipes(home: Path, without_training: None, edits: list[TreeEdit], base: str | None) -> None:
    recipe: Any = copy.deepcopy(RECIPE) | {"base": base}
    for edit in edits:
        recipe = edit(recipe)
    Path("any.yaml").write_text(yaml.safe_dump(recipe))
    works_or_one_line("fit", "--config=any.yaml")


FRAGMENTS = [
    line.encode()
    for line in ["a: &a [*a]", "&a x: *a", "? {a: b} : c", "--- 1", "!!set {a}", "2020-13-45: 1", *NASTY[:60]]
    if "\ud800" not in line
]


@cases(50, edits=st.lists(EDIT, max_size=2), line=st.none() | st.sampled_from(FRAGMENTS), at=st.integers(0, 30))
def test_recipe_bytes(home: Path, without_training: None, edits: list[Edit], line: bytes | None, at: int) -> None:
    text = yaml.safe_dump(RECIPE).encode()
    if line is not None:
        lines = text.split(b"\n")
        lines.insert(at, line)
        text = b"\n".join(lines)
    for edit in edits:
        text = edit(text)
    Path("any.yaml").write_bytes(text)
    works_or_one_line("fit", "--config=any.yaml", "--print_config")


# ---- matrices ----------------------------------------------------------------------------------------------

MATRIX = {
    "base": "recipe.yaml",
    "reference": "a",
    "seeds": 2,
    "quick": {"base": "recipe.yaml", "seeds": 1, "jobs": 1},
    "sources": {"accuracy": "of nowhere"},
    "variants": {
        "a": {"model": {"moe": {"n_zero": 0}}, "paper": {"accuracy": {"1B": 1.5}}, "plots": ["curves"]},
        "b": {"ffn_width": 2},
    },
}


@cases(
    50,
    edits=st.lists(tree_edit(), min_size=1, max_size=2),
    quick=st.booleans(),
    damage=st.none() | st.none() | EDIT,
)
def test_matrices(
    home: Path,
    without_training: None,
    monkeypatch: pytest.MonkeyPatch,
    edits: list[TreeEdit],
    quick: bool,
    damage: Any,
) -> None:
    monkeypatch.setattr("moepp.study.compare.ablate.step_seconds", lambda reference: 0.01)
    matrix: Any = MATRIX
    for edit in edits:
        matrix = edit(matrix)
    text = yaml.safe_dump(matrix).encode()
    Path("m.yaml").write_bytes(damage(text) if damage else text)
    works_or_one_line("ablate", "--matrix=m.yaml", "--dry_run", *(["--quick"] if quick else []))
