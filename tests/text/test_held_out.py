"""Held-out text → windows, of token files and of any text."""

import json
from pathlib import Path

import numpy as np
import pytest

from moepp.model.errors import InputError
from moepp.text.held_out import HeldOut, TextOptions, open_held_out
from moepp.text.token_files import TokenFiles
from tests.text.conftest import one_line

S = 16


def opened(files: TokenFiles, path: str | None = None) -> HeldOut:
    trained = {"tokenizer": files.tokenizer_json, "data_hash": files.meta["data_hash"]}
    return open_held_out(TextOptions(path, str(files.path.parent)), trained, files.tokenizer, S)


def joined(text: HeldOut) -> dict[str, list[int]]:
    """The tokens of each domain; only the last window of one may be short."""
    windows: dict[str, list[np.ndarray]] = {}
    for domain, tokens in text.windows():
        assert tokens.dtype == np.int64
        windows.setdefault(domain, []).append(tokens)
    assert all(len(tokens) == S for of_domain in windows.values() for tokens in of_domain[:-1])
    return {domain: np.concatenate(of_domain).tolist() for domain, of_domain in windows.items()}


def test_of_prepared_text_the_held_out_part(folder: str) -> None:
    """By default that of the text trained on; the same by its name, or that of its token files."""
    files = TokenFiles.open(folder)
    tokens = {
        domain: files.val[begin - 1 : end - 1].tolist()  # the last has nothing to predict
        for domain, (begin, end) in zip(files.domains, files.val_ranges, strict=True)
    }
    for path in (None, files.meta["source"]["path"], folder):
        text = opened(files, path)
        assert joined(text) == joined(text) == tokens
        assert text.size == sum(domain["val"]["bytes"] for domain in files.meta["domains"].values())
        assert text.name.startswith("the held-out part of")


def test_of_other_text_all_of_it(folder: str, tmp_path: Path) -> None:
    files = TokenFiles.open(folder)
    texts = {"x": ["apple bird " * 9, "cat"], "y": ["dog dog"]}
    for name, documents in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    tokens = {
        name: [i for text in documents for i in (0, *files.tokenizer.encode(text).ids)]
        for name, documents in texts.items()
    }
    assert joined(opened(files, str(tmp_path))) == tokens
    for name in texts:
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "both" / f"{name}.jsonl")
    assert joined(opened(files, str(tmp_path))) == {"both": tokens["x"] + tokens["y"]}


def test_token_files_of_another_tokenizer_and_text_that_is_gone(folder: str, tmp_path: Path) -> None:
    files = TokenFiles.open(folder)
    trained = {"tokenizer": files.tokenizer_json + " ", "data_hash": "0" * 64}
    for path, message in ((folder, "another tokenizer"), (None, f"is not in {tmp_path}")):
        with pytest.raises(InputError) as error:
            open_held_out(TextOptions(path, str(tmp_path)), trained, files.tokenizer, S)
        one_line(error, message)
