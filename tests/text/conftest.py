"""Token files of made-up text, and what batches of them must be."""

import json
import math
import random
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token files of three domains: 568 tokens to train on, 8 batches an epoch."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    (root / "text").mkdir()
    for domain in "abc":
        texts = (" ".join(rng.choices(["apple", "bird", "cat", "dog"], k=20)) for _ in range(12))
        (root / "text" / f"{domain}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(prepare(str(root / "text"), 290, 0.2, str(root), progress=False))


def oracle(tokens: np.ndarray, seed: int, n: int, seq_len: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch `n` from nothing but the seed and `n`, written as plainly as possible."""
    windows = len(tokens) // seq_len - 1
    epoch, i = n // (windows // batch), n % (windows // batch)
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    phase = int(rng.integers(seq_len))
    keys = [int(key) for key in rng.integers(1 << 64, size=12, dtype=np.uint64)]
    inputs, targets = [], []
    for index in range(i * batch, (i + 1) * batch):
        start = phase + permuted(index, windows, keys) * seq_len
        inputs.append([int(tokens[start + j]) for j in range(seq_len)])
        targets.append([int(tokens[start + j + 1]) for j in range(seq_len)])
    return np.array(inputs), np.array(targets)


def permuted(index: int, n: int, keys: list[int]) -> int:
    """Where one index goes in moepp.text.permutation, one number at a time."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    a = math.ceil(math.sqrt(n))
    b = math.ceil(n / a)
    left, right = index % a, index // a
    for i in range(0, 12, 2):
        left = (left + mixed((right + keys[i]) % 2**64)) % a
        right = (right + mixed((left + keys[i + 1]) % 2**64)) % b
    moved = left + a * right
    return moved if moved < n else permuted(moved, n, keys)
