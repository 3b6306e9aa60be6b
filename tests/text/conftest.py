"""Token files of made-up text."""

import json
import random
from pathlib import Path

import pytest

from moepp.model.errors import InputError
from moepp.text.prepare import prepare
from moepp.text.token_files import TokenFiles

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "12", "apples", "été", "😀", "<|endoftext|>", "\t\n"]


def write_text(folder: Path, documents: dict[str, int], seed: int = 0) -> list[tuple[str, str]]:
    """A folder with a .jsonl per domain of so many documents; what is in it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for domain in sorted(documents):
        texts = [f"{domain}-{i}. " + " ".join(rng.choices(WORDS, k=40)) for i in range(documents[domain])]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        written += [(domain, text) for text in texts]
    return written


def make(root: Path, **options: object) -> Path:
    options = {"vocab_size": 320, "out_root": str(root / "prepared"), "progress": False} | options
    return prepare(str(root / "text"), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[str, str]], TokenFiles]:
    root = tmp_path_factory.mktemp("prepared")
    written = write_text(root / "text", {"b": 60, "a": 40, "single": 1})
    return written, TokenFiles.open(make(root, val_fraction=0.1))


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
