"""Held-out text → windows of tokens. Text of any length streams through: a document at a time is in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moepp.model.errors import InputError
from moepp.text.batches import held_out_windows
from moepp.text.documents import Source, open_source
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import end_of_text

Windows = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class TextOptions:
    """Which text to look at.

    Args:
        path: a file, a folder, a corpus list, hf:owner/name, or a folder that `moepp prepare` made; by default
            what the checkpoint was trained on. Of that, and of prepared folders, only the held-out part is read.
        out_root: where the token files of the training text are looked for.
    """

    path: str | None = None
    out_root: str = "data/prepared"


@dataclass(frozen=True)
class HeldOut:
    """Text that the model has not seen.

    Attributes:
        name: where it comes from.
        size: about how many bytes of UTF-8 it has; None where nobody knows.
        windows: starts a stream of (domain, tokens (≤ S,) int64). Those of a domain follow one another in its
            text, and only its last may be shorter than S.
    """

    name: str
    size: int | None
    windows: Callable[[], Windows]


def open_held_out(options: TextOptions, trained: dict[str, Any], tokenizer: Tokenizer, seq_len: int) -> HeldOut:
    """Find the text, without reading it yet.

    Args:
        trained: a checkpoint's "moepp": its tokenizer, what ends a text, and the hash of the text trained on.
        seq_len: S.

    Raises:
        InputError: no such text, or token files of another tokenizer.
    """
    path = options.path
    if path is not None and Path(path, "meta.json").is_file():
        prepared = TokenFiles.open(path)
        if prepared.tokenizer_json != trained["tokenizer"]:
            raise InputError(f"{path} was made with another tokenizer than the checkpoint's: give the text itself")
        return held_out_part(prepared, seq_len)
    files = trained_on(trained["data_hash"], options.out_root)
    if files and (path is None or Path(path).resolve() == Path(files.meta["source"]["path"]).resolve()):
        return held_out_part(files, seq_len)
    if path is None:
        raise InputError(
            f"data.path: the text that the checkpoint was trained on is not in {options.out_root}; name some"
        )
    end = trained.get("end_of_text", end_of_text(tokenizer))
    return held_out_text(open_source(path), path, tokenizer, end, seq_len)


def trained_on(data_hash: str | None, out_root: str) -> TokenFiles | None:
    for meta in sorted(Path(out_root).glob("*/meta.json")):
        if data_hash and data_hash in meta.read_text(encoding="utf-8"):
            return TokenFiles.open(meta.parent)
    return None


def held_out_part(files: TokenFiles, seq_len: int) -> HeldOut:
    def windows() -> Windows:
        for start, count, domain in held_out_windows(files, seq_len):
            yield files.domains[domain], files.val[start : start + count].astype(np.int64)

    size = sum(domain["val"]["bytes"] for domain in files.meta["domains"].values())
    return HeldOut(f"the held-out part of {files.meta['source']['path']}", size, windows)


def held_out_text(source: Source, path: str, tokenizer: Tokenizer, end: int | None, seq_len: int) -> HeldOut:
    def windows() -> Windows:
        rest: dict[str, list[int]] = {}  # by domain: fewer tokens than a window
        for domain, text in source.documents():
            tokens = rest.get(domain, []) + ([] if end is None else [end])
            tokens += tokenizer.encode(text, add_special_tokens=False).ids
            whole = len(tokens) // seq_len * seq_len
            for start in range(0, whole, seq_len):
                yield domain, np.array(tokens[start : start + seq_len], np.int64)
            rest[domain] = tokens[whole:]
        for domain, tokens in rest.items():
            if tokens:
                yield domain, np.array(tokens, np.int64)

    return HeldOut(path, source.size, windows)
