"""Token files: a tokenizer and the tokens of a text, in a folder.

train.bin, val.bin   token ids, uint16 or uint32: <|endoftext|>, then each document followed by <|endoftext|>
tokenizer.json       byte-level BPE, as Hugging Face's tokenizers reads it
meta.json            counts, hashes, and where each domain lies in val.bin
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tokenizers import Tokenizer

from moepp.model.errors import InputError

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of the folder; raise it when older folders can no longer be used
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MOST_TOKENS = 1 << 20  # of a vocabulary: asked for far more, the tokenizers library takes the process down with it


def padded_vocab_size(vocab_size: int) -> int:
    """The number of rows of the embedding: a multiple of 64, which the matmul of a GPU wants."""
    return (vocab_size + 63) // 64 * 64


def load_tokenizer(tokenizer_json: str, name: str = "the tokenizer") -> Tokenizer:
    """A tokenizer that reads ``<|endoftext|>`` inside a text as text: only `prepare` writes the token.

    Raises:
        InputError: it is no tokenizer; calls it by `name`.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{name} cannot be read, is it damaged? ({error})") from error
    tokenizer.encode_special_tokens = True  # not kept in the JSON
    return tokenizer


@dataclass
class TokenFiles:
    """A folder that :func:`moepp.text.prepare.prepare` made, opened for reading.

    Attributes:
        path: the folder.
        meta: ``meta.json``.
        tokenizer_json: ``tokenizer.json`` as text.
        train: (tokens,) uint16 or uint32, memory-mapped.
        val: (tokens,) the same, one domain after the other.
    """

    path: Path
    meta: dict[str, Any]
    tokenizer_json: str
    train: np.memmap
    val: np.memmap

    @classmethod
    def open(cls, path: str | Path) -> "TokenFiles":
        """Open and check a folder, without reading the tokens.

        Raises:
            InputError: not such a folder, or damaged; names the file and the way out.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            tokenizer_json = (path / "tokenizer.json").read_text(encoding="utf-8")
            if meta["format"] != FORMAT:
                raise InputError(
                    f"{path} has format {meta['format']}, not {FORMAT}: delete it and prepare the text anew"
                )
            for name, file in meta["files"].items():
                if (size := (path / name).stat().st_size) != file["bytes"]:
                    raise InputError(
                        f"{path / name} is {size} bytes, not {file['bytes']}: it was cut off or replaced; "
                        "delete the folder and prepare the text anew"
                    )
            if sha256_of(tokenizer_json) != meta["tokenizer_sha256"]:
                raise InputError(
                    f"{path}: the token files were made with another tokenizer than tokenizer.json; put the right "
                    "one back, or delete the folder and prepare the text anew"
                )
            if meta["data_hash"] != data_hash(meta):
                raise ValueError("data_hash is not that of its files")
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype is {meta['dtype']}")
            train, val = (np.memmap(path / f"{name}.bin", meta["dtype"], "r") for name in ("train", "val"))
            _check_counts(meta, len(train), len(val))
            files = cls(path, meta, tokenizer_json, train, val)
            if max(files.tokenizer.get_vocab().values(), default=0) >= meta["padded_vocab_size"]:
                raise ValueError("its tokenizer has more tokens than its vocabulary")
            return files
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read as token files ({type(error).__name__}: {error}): delete the folder and "
                "prepare the text anew"
            ) from error

    @property
    def domains(self) -> list[str]:
        """The names of the domains; elsewhere a domain is an index into this list."""
        return list(self.meta["domains"])

    @property
    def val_ranges(self) -> list[tuple[int, int]]:
        """Per domain, begin and end of its tokens in ``val``; the token before is ``<|endoftext|>``."""
        return [(d["val_range"][0], d["val_range"][1]) for d in self.meta["domains"].values()]

    @property
    def label(self) -> str:
        """Which text this is, in a few words."""
        return f"{self.path} ({len(self.train):,} training tokens, hash {self.meta['data_hash'][:8]})"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the files were made with."""
        return load_tokenizer(self.tokenizer_json, str(self.path / "tokenizer.json"))

    @cached_property
    def bytes_per_token(self) -> "torch.Tensor":
        """(padded vocabulary,) int64: how many bytes of UTF-8 each token stands for; 0 for ``<|endoftext|>``."""
        import torch

        counts = torch.zeros(self.meta["padded_vocab_size"], dtype=torch.int64)
        for token, index in self.tokenizer.get_vocab().items():
            if index != END_OF_TEXT_ID:
                counts[index] = len(token)  # a byte-level token is spelt with one letter for each byte
        return counts

    def describe(self) -> Table:
        """What is in the files: a line per domain, and the sum."""
        title = f"{self.path}: a vocabulary of {self.meta['vocab_size']:,}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("domain", no_wrap=True)
        for column in ("texts", "held out", "MB", "tokens", "held out", "B/token"):
            table.add_column(column, justify="right", no_wrap=True)

        def row(name: str, domains: list[dict[str, Any]]) -> None:
            total = {
                (part, key): sum(domain[part][key] for domain in domains)
                for part in ("train", "val")
                for key in ("documents", "bytes", "tokens")
            }
            size = total["train", "bytes"] + total["val", "bytes"]
            tokens = total["train", "tokens"] + total["val", "tokens"]
            table.add_row(
                name,
                f"{total['train', 'documents'] + total['val', 'documents']:,}",
                f"{total['val', 'documents']:,}",
                f"{size / 1e6:.2f}",
                f"{tokens:,}",
                f"{total['val', 'tokens']:,}",
                f"{size / tokens:.2f}",
            )

        for name, domain in self.meta["domains"].items():
            row(name, [domain])
        table.add_section()
        row("all", list(self.meta["domains"].values()))
        return table


def data_hash(meta: dict[str, Any]) -> str:
    """One hash for "trained on the same tokens"."""
    files = meta["files"]
    return sha256_of(meta["tokenizer_sha256"] + files["train.bin"]["sha256"] + files["val.bin"]["sha256"])


def _check_counts(meta: dict[str, Any], train: int, val: int) -> None:
    """What is counted in meta.json must add up to the tokens that there are.

    Raises:
        KeyError, TypeError, ValueError: it does not.
    """
    sizes = [meta["vocab_size"], meta["padded_vocab_size"]]
    tokens = {"train": 1, "val": 1}  # the <|endoftext|> before the first document
    for name, domain in meta["domains"].items():
        begin = tokens["val"]
        for part in ("train", "val"):
            tokens[part] += domain[part]["tokens"]
            sizes += [domain[part][key] for key in ("documents", "bytes", "tokens")]
        if domain["val_range"] != [begin, tokens["val"]]:
            raise ValueError(f"val_range of {name} is {domain['val_range']}")
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError("a count is no whole number")
    if tokens != {"train": train, "val": val} or min(train, val) < 2:
        raise ValueError(f"its domains have {tokens} tokens, its files {train} and {val}")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
