import csv
import importlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# how many of every hundred planned cases fuzz/ tries: a quarter, or with --hypothesis-profile=whole all
settings.register_profile("quick", max_examples=25)
settings.register_profile("whole", max_examples=100)
settings.load_profile("quick")

RECIPES = Path(__file__).parent.parent / "recipes"
SENTENCE = (
    "the router sends every token to two experts and some of them do nothing at all "
    "while others copy what they see or add a constant vector to it"
)
WORDS = SENTENCE.split()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":  # not in the process that hands the tests out, which needs it not
        importlib.import_module("moepp.study")  # Lightning, which must come before rich


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Tiny matrices gain nothing from a second thread; nothing depends on threads or on the tests before."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(small_text())
    return path


def small_text(seed: int = 0) -> str:
    """About 90 kB of sentences with something to learn in them."""
    rng = random.Random(seed)
    lines = []
    for _ in range(1500):
        start = rng.randrange(len(WORDS))
        lines.append(" ".join(WORDS[(start + i) % len(WORDS)] for i in range(rng.randint(4, 18))) + ".")
    return "\n\n".join(lines)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: runs/ and data/prepared/ appear here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(text: Path, recipe: str = "moepp.yaml") -> list[str]:
    """The options that shrink any recipe to seconds."""
    return [
        f"--config={RECIPES / recipe}",
        f"--data.path={text}",
        "--data.vocab_size=320",
        "--data.batch_size=4",
        "--model.transformer.n_layers=2",
        "--model.transformer.hidden_size=32",
        "--model.transformer.intermediate_size=48",
        "--model.transformer.n_heads=2",
        "--model.transformer.context_length=32",
        "--model.optim.lr=0.01",
        "--model.optim.min_lr=0.001",
        "--model.optim.warmup_steps=2",
        "--model.compile=false",
        "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=1",
    ]


def without_speed(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, but for what no two runs have in common."""
    return [{name: text for name, text in row.items() if not name.startswith("speed/")} for row in read_csv(run)]


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(found: Any, expected: Any) -> None:
    """Tensors by name, however deep: the same names, and bit for bit the same values."""
    import torch

    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a verb that must be refused; returns its one line."""
    from moepp.cli import main

    capsys.readouterr()
    before = snapshot()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    after = snapshot()
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.startswith("runs/") and name not in before]
    return lines[0]


def snapshot() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
