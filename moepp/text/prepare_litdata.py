"""A litdata data set → token files whose training text stays where it is.

`litdata:ROOT` names a folder or bucket with two data sets of token ids, ROOT/train and ROOT/val, both written by
`litdata.optimize` with a TokensLoader. Their tokenizer is ROOT/tokenizer.json, or `data.tokenizer`. The held-out
text is copied: it is small, and every validation reads all of it.

Token ids are checked against the tokenizer in all of the held-out text, and in the first, the middle and the last
chunk of the training text, which is never read as a whole.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from moepp.model.errors import InputError
from moepp.system.files import lasting, sha256_of, whole_or_nothing
from moepp.text.litdata_set import LitdataSet
from moepp.text.token_files import FORMAT, complete, token_dtype
from moepp.text.tokenizer import Vocabulary, padded_vocab_size

PREFIX = "litdata:"  # of a data set of token ids


def prepare_litdata(path: str, out_root: str, tokenizer: str | None) -> Path:
    """Make token files with a copy of the held-out text and the address of the training text.

    Args:
        path: `litdata:ROOT`.
        out_root: where the folder goes.
        tokenizer: a `tokenizer.json`, instead of ROOT/tokenizer.json.

    Raises:
        InputError: no such data sets, or token ids that the tokenizer does not have.
    """
    root = path.removeprefix(PREFIX).rstrip("/")
    root = str(Path(root).resolve()) if Path(root).is_dir() else root  # else a bucket
    local = Path(root, "tokenizer.json")
    if tokenizer is None and not local.is_file():
        raise InputError(f"{path}: there is no {local}; name the tokenizer of its tokens with data.tokenizer")
    vocabulary = Vocabulary.read(local if tokenizer is None else Path(tokenizer))
    train, val = LitdataSet(f"{root}/train"), LitdataSet(f"{root}/val")
    index = train.chunks.index_json
    made_with = [FORMAT, root, index, val.chunks.index_json, vocabulary.tokenizer_json, vocabulary.end_of_text]
    fingerprint = sha256_of(json.dumps(made_with))
    folder = Path(out_root) / f"{Path(root).name}-v{vocabulary.size}-{fingerprint[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if folder.is_dir():
            return folder
        tokens = np.concatenate([val.chunks[c] for c in range(len(val.chunks.tokens_C))]).astype(np.int64)
        check(tokens, val.path, vocabulary)
        last = len(train.chunks.tokens_C) - 1
        for chunk in sorted({0, last // 2, last}):
            check(train.chunks[chunk], train.path, vocabulary)
        end = vocabulary.end_of_text  # is to stand before the first document and after the last
        tokens = np.pad(tokens, (int(tokens[0] != end), int(tokens[-1] != end)), constant_values=end)
        with whole_or_nothing(folder) as unfinished:
            padded = padded_vocab_size(vocabulary.size)
            with lasting(unfinished / "val.bin") as file:
                file.write(tokens.astype(token_dtype(padded)).tobytes())
            source = {"path": path, "fingerprint": fingerprint}
            streamed = {"path": train.path, "index_sha256": sha256_of(index)}
            domains = {Path(root).name: domain(tokens, vocabulary, len(train))}
            complete(unfinished, vocabulary, padded, source, domains, litdata=streamed)
    return folder


def check(tokens: np.ndarray, name: str, vocabulary: Vocabulary) -> None:
    if not tokens.size:
        raise InputError(f"litdata: {name} is empty")
    if tokens.min() < 0 or tokens.max() >= vocabulary.size:
        raise InputError(
            f"litdata: {name} has a token {tokens.max()}, but the tokenizer ends with {vocabulary.size - 1}: "
            "name the one that the data set was made with, as data.tokenizer"
        )


def domain(tokens: np.ndarray, vocabulary: Vocabulary, train: int) -> dict[str, Any]:
    """What meta.json says of the text. Documents and bytes of the training text are not known, and 0."""
    ends = np.flatnonzero(tokens == vocabulary.end_of_text)
    texts = [tokens[i + 1 : j].tolist() for i, j in pairwise(ends)]
    decoded = vocabulary.tokenizer.decode_batch(texts, skip_special_tokens=False)
    val = {"documents": len(texts), "bytes": sum(len(t.encode()) for t in decoded), "tokens": len(tokens) - 1}
    return {
        "train": {"documents": 0, "bytes": 0, "tokens": train},
        "val": val,
        "val_range": [1, len(tokens)],
    }
