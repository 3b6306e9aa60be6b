"""Text → tokenizer → token files (moepp.text.token_files).

Byte-level means lossless: every text, whatever its script, comes back from its tokens byte for byte. Whole
documents are held out for validation, so many of each domain, and the tokenizer does not see them either.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moepp.model.errors import InputError
from moepp.system.files import fsync_folder
from moepp.text.documents import Document, open_source
from moepp.text.token_files import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    FORMAT,
    MOST_TOKENS,
    data_hash,
    load_tokenizer,
    padded_vocab_size,
    sha256_of,
)

TOKENIZER_BYTES = 256_000_000  # the tokenizer learns from at most so much text, drawn evenly from all of it
BATCH_BYTES = 1 << 21  # text encoded at a time: enough to keep all cores busy, little enough to hold


def prepare(
    path: str,
    vocab_size: int = 8192,
    val_fraction: float = 0.02,
    out_root: str = "data/prepared",
    progress: bool = True,
) -> Path:
    """Make token files out of text, unless they are there already.

    The folder appears whole or not at all. Its name holds a fingerprint of the source and the arguments, so that
    text that has changed gets a folder of its own.

    Args:
        path: see :func:`moepp.text.documents.open_source`.
        vocab_size: at most so many tokens, with ``<|endoftext|>`` and the 256 bytes among them.
        val_fraction: hold out documents until they are this fraction of the bytes of each domain.
        out_root: where the folder goes.
        progress: show bars, or a line a phase where the output is no terminal.

    Returns:
        the folder, for :meth:`moepp.text.token_files.TokenFiles.open`.

    Raises:
        InputError: text that cannot be read, or too little of it.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), not {vocab_size}")
    if vocab_size > MOST_TOKENS:
        raise InputError(f"vocab_size must be at most {MOST_TOKENS}, not {vocab_size}")
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
    source = open_source(path)
    recipe = [FORMAT, vocab_size, val_fraction, source.fingerprint]
    fingerprint = sha256_of(json.dumps(recipe, sort_keys=True))
    root = Path(out_root)
    folder = root / f"{source.name}-v{vocab_size}-{fingerprint[:8]}"
    if folder.is_dir():
        return folder

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        for left_over in root.glob(".unfinished-*"):  # whoever made it is dead: the lock is ours
            shutil.rmtree(left_over)
        unfinished = root / f".unfinished-{folder.name}"
        unfinished.mkdir()
        try:
            with _phase(f"downloading {len(source.wheels)} packages", len(source.wheels), progress) as advance:
                for wheel in source.wheels:
                    wheel.fetch()
                    advance(1)
            with _phase("reading text", source.size, progress) as advance:
                documents = _Documents.write(unfinished / "documents", source.documents(), advance)
            if not documents.domains:
                raise InputError(f"{path} holds no text: every document is empty")
            held_out = _hold_out(documents, val_fraction)
            if not held_out.any():
                raise InputError(
                    f"{path} has {len(held_out)} document(s), no two in one domain, so none can be held out for "
                    "validation: give more text, or put it into one folder"
                )
            about = {
                "path": path,
                "fingerprint": fingerprint,
                "val_fraction": val_fraction,
                "wheels": {wheel.package: wheel.sha256 for wheel in source.wheels},
            }
            _write_tokens(unfinished, documents, held_out, vocab_size, about, progress)
            documents.delete()
            fsync_folder(unfinished)
            unfinished.rename(folder)
            fsync_folder(root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_tokens(
    folder: Path,
    documents: "_Documents",
    held_out: np.ndarray,
    vocab_size: int,
    about: dict[str, Any],
    progress: bool,
) -> None:
    train = np.flatnonzero(~held_out)
    val = np.flatnonzero(held_out)
    val = val[np.argsort(documents.domain[val], kind="stable")]

    every = -(-int(documents.bytes[train].sum()) // TOKENIZER_BYTES)
    with _phase("training the tokenizer", int(documents.bytes[train[::every]].sum()), progress) as advance:
        tokenizer = _train_tokenizer(documents.texts(train[::every], advance), vocab_size)
    tokenizer_json = tokenizer.to_str(pretty=True)
    _write(folder / "tokenizer.json", tokenizer_json.encode())

    learnt = tokenizer.get_vocab_size()
    if progress and 2 * learnt < vocab_size:
        print(f"the text gives {learnt:,} tokens; of vocab_size={vocab_size:,} the rest will stand unused")

    padded = padded_vocab_size(vocab_size)
    dtype = "uint16" if padded <= 1 << 16 else "uint32"
    with _phase("encoding", int(documents.bytes.sum()), progress) as advance:
        parts = {
            name: _encode(folder / f"{name}.bin", tokenizer, documents, indices, dtype, advance)
            for name, indices in (("train", train), ("val", val))
        }

    domains: dict[str, Any] = {}
    val_end = 1  # 0 is the <|endoftext|> before the first document
    for d, name in enumerate(documents.domains):
        domains[name] = {"text_sha256": documents.sha256[d]}
        for part, indices in (("train", train), ("val", val)):
            mine = indices[documents.domain[indices] == d]
            tokens = parts[part].tokens[d]
            counts = {"documents": len(mine), "bytes": int(documents.bytes[mine].sum()), "tokens": tokens}
            domains[name][part] = counts
        val_begin, val_end = val_end, val_end + parts["val"].tokens[d]
        domains[name]["val_range"] = [val_begin, val_end]

    meta = {
        "format": FORMAT,
        "source": about,
        "vocab_size": learnt,
        "padded_vocab_size": padded,
        "dtype": dtype,
        "eot": END_OF_TEXT_ID,
        "tokenizer_sha256": sha256_of(tokenizer_json),
        "files": {f"{n}.bin": {"bytes": part.bytes, "sha256": part.sha256} for n, part in parts.items()},
        "domains": domains,
    }
    meta["data_hash"] = data_hash(meta)
    _write(folder / "meta.json", (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode())


# ---- documents ---------------------------------------------------------------------------------------------


@dataclass
class _Documents:
    """All documents of a source, one after the other in a file; in memory only where each lies.

    The text is read three times (to count, to train the tokenizer, to encode). Copied once, it cannot change in
    between, is not downloaded again, and any document can be read at any time.
    """

    path: Path
    domains: list[str]  # names, in order of appearance
    sha256: list[str]  # of the text of each domain
    domain: np.ndarray  # (documents,) int32: index into domains
    bytes: np.ndarray  # (documents,) int64: UTF-8

    @classmethod
    def write(cls, path: Path, stream: Iterable[Document], advance: Callable[[int], None]) -> "_Documents":
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
        return cls(path, list(indices), sha256, np.array(domain, np.int32), np.array(length, np.int64))

    def texts(self, indices: np.ndarray, advance: Callable[[int], None]) -> Iterator[str]:
        """The documents with these indices, in this order; ``advance`` is told the bytes of each."""
        end = np.cumsum(self.bytes)
        with self.path.open("rb") as file:
            for index in indices:
                size = int(self.bytes[index])
                file.seek(int(end[index]) - size)
                yield file.read(size).decode()
                advance(size)

    def delete(self) -> None:
        self.path.unlink()


def _hold_out(documents: _Documents, fraction: float) -> np.ndarray:
    """(documents,) bool: which to validate on. Of each domain at least one, and never all of them."""
    held_out = np.zeros(len(documents.domain), bool)
    for d in range(len(documents.domains)):
        rng = np.random.Generator(np.random.Philox(key=d))
        mine = rng.permutation(np.flatnonzero(documents.domain == d))
        size = documents.bytes[mine]
        wanted = 1 + np.searchsorted(np.cumsum(size), fraction * size.sum())
        held_out[mine[: min(int(wanted), len(mine) - 1)]] = True
    return held_out


# ---- tokenizer and tokens ------------------------------------------------------------------------------------


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],  # gets id 0
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return load_tokenizer(tokenizer.to_str())


@dataclass
class _Part:
    """What was written into one .bin."""

    tokens: list[int]  # per domain, each document's <|endoftext|> included
    bytes: int
    sha256: str


def _encode(
    path: Path,
    tokenizer: Tokenizer,
    documents: _Documents,
    indices: np.ndarray,
    dtype: str,
    advance: Callable[[int], None],
) -> _Part:
    tokens = [0] * len(documents.domains)
    sha256 = hashlib.sha256()
    which = iter(indices)
    with path.open("wb") as file:

        def write(ids: Sequence[int]) -> None:
            data = np.asarray(ids, dtype).tobytes()
            file.write(data)
            sha256.update(data)

        write([END_OF_TEXT_ID])  # so that the first token of the first document has something to follow, too
        for batch in _batches(documents.texts(indices, advance)):
            for encoding in tokenizer.encode_batch_fast(batch):  # on all cores
                ids = encoding.ids
                write([*ids, END_OF_TEXT_ID])
                tokens[documents.domain[next(which)]] += len(ids) + 1
        file.flush()
        os.fsync(file.fileno())
        return _Part(tokens, file.tell(), sha256.hexdigest())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- small things ------------------------------------------------------------------------------------------


@contextmanager
def _phase(what: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Show how far one phase is (in the unit of ``total``): a bar on a terminal, else a line."""
    if not show or total == 0:
        yield lambda _: None
    elif sys.stdout.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        with Progress(*columns) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, advance=done)
            bars.update(task, total=1, completed=1)  # sizes of packed files are guesses
    else:
        start = time.monotonic()
        print(what, end=" ... ", flush=True)
        try:
            yield lambda _: None
        except BaseException:
            print("failed", flush=True)
            raise
        print(f"{time.monotonic() - start:.1f} s", flush=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
