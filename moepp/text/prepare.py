"""Documents → tokenizer → token files.

Whole documents are held out for validation, so many of each domain, and the tokenizer does not see them either.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from moepp.model.config import require
from moepp.model.errors import InputError
from moepp.system.files import lasting, sha256_of, whole_or_nothing
from moepp.text.documents import Document, open_source
from moepp.text.prepare_litdata import PREFIX, prepare_litdata
from moepp.text.shards import shard_names, write_shards
from moepp.text.token_files import FORMAT, complete, token_dtype
from moepp.text.tokenizer import FEWEST_TOKENS, MOST_TOKENS, Vocabulary, padded_vocab_size, train_tokenizer

TOKENIZER_BYTES = 128_000_000  # the tokenizer learns from at most so much text, drawn evenly from all of it
BATCH_BYTES = 1 << 21  # text encoded at a time: enough to keep all cores busy, little enough to hold


def prepare(
    path: str,
    vocab_size: int | None = None,
    val_fraction: float = 0.02,
    out_root: str = "data/prepared",
    progress: bool = True,
    tokenizer: str | None = None,
) -> Path:
    """Make token files out of text, unless they are there already.

    The folder appears whole or not at all. Its name holds a fingerprint of the source and the arguments, so that
    text that has changed gets a folder of its own.

    Args:
        path: see `moepp.text.documents.open_source`, or `litdata:…` (`moepp.text.prepare_litdata`).
        vocab_size: at most so many tokens, with `<|endoftext|>` and the 256 bytes among them; by default 8192, or
            as many as `tokenizer` has.
        val_fraction: hold out documents until they are this fraction of the bytes of each domain.
        out_root: where the folder goes.
        progress: show a bar a phase.
        tokenizer: somebody else's `tokenizer.json`, instead of one that is trained on the text.

    Returns:
        the folder, for `moepp.text.token_files.TokenFiles.open`.

    Raises:
        InputError: text or a tokenizer that cannot be read, or too little text, or too small a `vocab_size`.
    """
    if path.startswith(PREFIX):
        return prepare_litdata(path, out_root, tokenizer)
    given = Vocabulary.read(Path(tokenizer)) if tokenizer is not None else None
    if vocab_size is None:
        vocab_size = given.size if given else 8192
    check_options(vocab_size, val_fraction, least=given.size if given else FEWEST_TOKENS)
    vocab_size = given.size if given else vocab_size
    source = open_source(path)
    made_with = [given.tokenizer_json, given.end_of_text] if given else [vocab_size, TOKENIZER_BYTES]
    fingerprint = sha256_of(json.dumps([FORMAT, made_with, val_fraction, source.fingerprint], sort_keys=True))
    root = Path(out_root)
    folder = root / f"{source.name}-v{vocab_size}-{fingerprint[:8]}"
    if folder.is_dir():
        return folder

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        with whole_or_nothing(folder) as unfinished:
            with phase("reading text", source.size, progress) as advance:
                documents = Documents.copy(source.documents(), unfinished / "documents", advance)
            if not documents.domains:
                raise InputError(f"{path} is empty: give it some text")
            parts = split(documents, val_fraction)
            if not len(parts["val"]):
                raise InputError(
                    f"{path} has {len(parts['train'])} document(s), no two in one domain, so none can be held out "
                    "for validation: give two documents of a domain, or a longer text"
                )
            about = {"path": path, "fingerprint": fingerprint, "val_fraction": val_fraction}
            vocabulary = given or learn(documents, parts["train"], vocab_size, progress)
            write_token_files(unfinished, documents, parts, vocabulary, vocab_size, about, progress)
            documents.path.unlink()
    return folder


def check_options(vocab_size: int, val_fraction: float, part: str = "", least: int = FEWEST_TOKENS) -> None:
    """Refuse what no tokenizer, or no division of a text, can be made with; `part` is where a recipe has it."""
    check_range(f"{part}vocab_size", vocab_size, least, MOST_TOKENS)
    require(0 < val_fraction < 1, f"{part}val_fraction", val_fraction, "must lie between 0 and 1")


def check_range(name: str, value: int, least: int, most: int) -> None:
    # what ${…} in a recipe stands for has not been through the parser
    whole = type(value) is int and least <= value <= most
    require(whole, name, value, f"must be a whole number from {least} to {most}")


@dataclass
class Documents:
    """All N documents of a source, one after the other in a file; in memory only where each lies.

    The text is read three times (to count, to train the tokenizer, to encode). Copied once, it cannot change in
    between, is not downloaded again, and any document can be read at any time.
    """

    path: Path
    domains: list[str]  # names, in order of appearance
    sha256: list[str]  # of the text of each domain
    domain_N: np.ndarray  # int32: index into domains
    bytes_N: np.ndarray  # int64: UTF-8

    @classmethod
    def copy(cls, stream: Iterable[Document], path: Path, advance: Callable[[int], None]) -> "Documents":
        hashes: dict[str, Any] = {}
        indices: dict[str, int] = {}
        domain, length = array("i"), array("q")
        with path.open("wb") as file:
            for name, text in stream:
                encoded = text.encode()
                file.write(encoded)
                hashes.setdefault(name, hashlib.sha256()).update(encoded)
                domain.append(indices.setdefault(name, len(indices)))
                length.append(len(encoded))
                advance(len(encoded))
        sha256 = [h.hexdigest() for h in hashes.values()]
        return cls(path, list(hashes), sha256, np.array(domain, np.int32), np.array(length, np.int64))

    @cached_property
    def end_N(self) -> np.ndarray:
        return np.cumsum(self.bytes_N)

    def texts(self, indices: np.ndarray, advance: Callable[[int], None]) -> Iterator[str]:
        """The documents with these indices, in this order; `advance` is told the bytes of each."""
        with self.path.open("rb") as file:
            for index in indices:
                size = int(self.bytes_N[index])
                file.seek(int(self.end_N[index]) - size)
                yield file.read(size).decode()
                advance(size)


def split(documents: Documents, val_fraction: float) -> dict[str, np.ndarray]:
    """Indices of the documents to train on, and of those held out: of each domain at least one, and never all."""
    held_out = []
    for d in range(len(documents.domains)):
        rng = np.random.Generator(np.random.Philox(key=d))
        mine = rng.permutation(np.flatnonzero(documents.domain_N == d))
        size = documents.bytes_N[mine]
        enough = 1 + np.searchsorted(np.cumsum(size), val_fraction * size.sum())
        held_out.append(np.sort(mine[: min(int(enough), len(mine) - 1)]))
    val = np.concatenate(held_out)
    return {"train": np.setdiff1d(np.arange(len(documents.domain_N)), val), "val": val}


def learn(documents: Documents, train: np.ndarray, vocab_size: int, progress: bool) -> Vocabulary:
    """Train a tokenizer on the documents with these indices."""
    sample = train[:: -(-int(documents.bytes_N[train].sum()) // TOKENIZER_BYTES)]
    with phase("training the tokenizer", int(documents.bytes_N[sample].sum()), progress) as advance:
        vocabulary = train_tokenizer(documents.texts(sample, advance), vocab_size)
    if progress and 2 * vocabulary.size < vocab_size:
        print(f"the text gives {vocabulary.size:,} tokens; of vocab_size={vocab_size:,} the rest stands unused")
    return vocabulary


def write_token_files(
    folder: Path,
    documents: Documents,
    parts: dict[str, np.ndarray],
    vocabulary: Vocabulary,
    vocab_size: int,
    about: dict[str, Any],
    progress: bool,
) -> None:
    """What moepp.text.token_files describes."""
    padded = padded_vocab_size(vocab_size)
    dtype = token_dtype(padded)
    tokens_N = np.zeros_like(documents.bytes_N)
    with phase("encoding", int(documents.bytes_N.sum()), progress) as advance:
        write_shards(
            (folder / name for name in shard_names()),
            encode(vocabulary, documents, parts["train"], dtype, tokens_N, advance),
        )
        with lasting(folder / "val.bin") as file:
            for ids in encode(vocabulary, documents, parts["val"], dtype, tokens_N, advance):
                file.write(ids.tobytes())

    domains: dict[str, Any] = {}
    end = 1  # 0 is the end of text before the first document
    for d, name in enumerate(documents.domains):
        domains[name] = {"text_sha256": documents.sha256[d]}
        for part, indices in parts.items():
            mine = indices[documents.domain_N[indices] == d]
            size, tokens = int(documents.bytes_N[mine].sum()), int(tokens_N[mine].sum())
            domains[name][part] = {"documents": len(mine), "bytes": size, "tokens": tokens}
        begin, end = end, end + domains[name]["val"]["tokens"]
        domains[name]["val_range"] = [begin, end]
    complete(folder, vocabulary, padded, about, domains)


def encode(
    vocabulary: Vocabulary,
    documents: Documents,
    indices: np.ndarray,
    dtype: str,
    tokens_N: np.ndarray,
    advance: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """The tokens of these documents, one document after the other; notes how many each has, its end of text
    included, in `tokens_N`."""
    yield np.array([vocabulary.end_of_text], dtype)  # for the very first token to follow
    batch_of = np.cumsum(documents.bytes_N[indices]) // BATCH_BYTES
    for batch in np.split(indices, np.flatnonzero(np.diff(batch_of)) + 1):
        texts = list(documents.texts(batch, advance))
        try:
            encodings = vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # on all cores
        except Exception as error:  # a word without a token; tokenizers raises Exception itself
            raise InputError(f"tokenizer: cannot encode the text ({error})") from error
        for index, encoding in zip(batch, encodings, strict=True):
            ids = np.array([*encoding.ids, vocabulary.end_of_text], dtype)
            tokens_N[index] = len(ids)
            yield ids


class Rate(ProgressColumn):
    """Megabytes a second since the phase began."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / 1e6 / max(task.elapsed or 0, 0.001):.1f} MB/s")


@contextmanager
def phase(what: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Show how far one phase is, in bytes of text: a bar; where there is no terminal, once it is over."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Rate(), TimeElapsedColumn()
    with Progress(*columns, disable=not show) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, advance=done)
        done = bars.tasks[task].completed + 1  # another total than before, so that rich takes the time once more
        bars.update(task, total=done, completed=done)  # sizes of packed files are guesses
