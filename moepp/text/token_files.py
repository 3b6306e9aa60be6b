"""Token files: a tokenizer and the tokens of a text, in a folder.

train-00000.bin …    token ids, uint16 or uint32: an end of text, then each document followed by one. In files of
                     equal size, read as one (moepp.text.shards); an older folder has one, train.bin
val.bin              the same of the text that is held out
tokenizer.json       as Hugging Face's tokenizers reads it
meta.json            counts, hashes, and where each domain lies in val.bin; in place of train-00000.bin the address
                     of training text that litdata streams (moepp.text.prepare_litdata)
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from moepp.model.errors import InputError
from moepp.system.files import lasting, sha256_of, sha256_of_file
from moepp.text.litdata_set import LitdataSet
from moepp.text.shards import Shards
from moepp.text.tokenizer import Vocabulary, load_tokenizer

FORMAT = 1  # of the folder; raise it when older folders can no longer be used
PARTS = ("train", "val")
COUNTS = ("documents", "bytes", "tokens")  # of each part of each domain


@dataclass
class TokenFiles:
    """A folder that `moepp.text.prepare.prepare` made, opened for reading.

    Attributes:
        path: the folder.
        meta: `meta.json`.
        tokenizer_json: `tokenizer.json` as text.
    """

    path: Path
    meta: dict[str, Any]
    tokenizer_json: str

    @classmethod
    def open(cls, path: str | Path) -> "TokenFiles":
        """Open and check a folder, without reading the tokens.

        Raises:
            InputError: not such a folder, or damaged; names the file and the way out.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            files = cls(path, meta, (path / "tokenizer.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"it has format {meta['format']}, not {FORMAT}")
            for name, file in meta["files"].items():
                if (size := (path / name).stat().st_size) != file["bytes"]:
                    raise ValueError(f"{name} is {size} bytes, not {file['bytes']}: it was cut off or replaced")
            if sha256_of(files.tokenizer_json) != meta["tokenizer_sha256"]:
                raise ValueError("made with another tokenizer than tokenizer.json: put the right one back")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read as token files ({type(error).__name__}: {error}): delete the folder and "
                "prepare the text anew"
            ) from error
        return files

    @property
    def train(self) -> Shards | LitdataSet:
        """All training tokens."""
        if "litdata" in self.meta:
            return LitdataSet(self.meta["litdata"]["path"])
        names, size = train_files(self.meta), np.dtype(self.meta["dtype"]).itemsize
        lengths = [self.meta["files"][name]["bytes"] // size for name in names]
        return Shards([self.path / name for name in names], lengths, self.meta["dtype"])

    @property
    def val(self) -> np.memmap:
        """(tokens,) of the held-out text, one domain after the other. Mapped anew at each call, as Shards are."""
        return np.memmap(self.path / "val.bin", self.meta["dtype"], "r")

    @property
    def domains(self) -> list[str]:
        """The names of the domains; elsewhere a domain is an index into this list."""
        return list(self.meta["domains"])

    @property
    def val_ranges(self) -> list[tuple[int, int]]:
        """Per domain, begin and end of its tokens in `val`; the token before is an end of text."""
        return [(d["val_range"][0], d["val_range"][1]) for d in self.meta["domains"].values()]

    @property
    def label(self) -> str:
        """Which text this is, in a few words."""
        return f"{self.path} ({len(self.train):,} training tokens, hash {self.meta['data_hash'][:8]})"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the files were made with."""
        return load_tokenizer(self.tokenizer_json, str(self.path / "tokenizer.json"))

    @property
    def end_of_text(self) -> int:
        """The token that ends each document."""
        return self.meta["eot"]

    @cached_property
    def letters_per_token(self) -> Tensor:
        """(V,) int64: letters that spell each token of the padded vocabulary; none for the end of a text."""
        letters_V = torch.zeros(self.meta["padded_vocab_size"], dtype=torch.int64)
        for token, index in self.tokenizer.get_vocab().items():
            letters_V[index] = len(token) * (index != self.end_of_text)
        return letters_V

    @cached_property
    def bytes_per_letter(self) -> Tensor:
        """(domains,) float64: bytes of held-out text for a letter of its tokens; 1 for a byte-level tokenizer."""
        letters_V = self.letters_per_token.numpy()
        letters = [np.bincount(self.val[i:j], minlength=len(letters_V)) @ letters_V for i, j in self.val_ranges]
        sizes = [domain["val"]["bytes"] for domain in self.meta["domains"].values()]
        return torch.tensor(sizes).double() / torch.tensor(np.array(letters)).clamp(min=1)

    def describe(self) -> Table:
        """What is in the files: a line per domain, and the sum."""
        title = f"{self.path}: a vocabulary of {self.meta['vocab_size']:,}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("domain", no_wrap=True)
        for column in ("texts", "held out", "MB", "tokens", "held out", "B/token"):
            table.add_column(column, justify="right", no_wrap=True)

        domains = self.meta["domains"]
        counts = np.array([[[d[part][key] for key in COUNTS] for part in PARTS] for d in domains.values()])
        for name, (train, val) in zip([*domains, "all"], [*counts, counts.sum(0)], strict=True):
            documents, size, tokens = train + val
            known = (train[1] > 0) * train[2] + val[2]  # litdata has tokens without their bytes
            shares = f"{documents:,}", f"{val[0]:,}", f"{size / 1e6:.2f}", f"{tokens:,}", f"{val[2]:,}"
            table.add_row(name, *shares, f"{size / known:.2f}")
        return table


def token_dtype(padded_vocab_size: int) -> str:
    return "uint16" if padded_vocab_size <= 1 << 16 else "uint32"


def complete(
    folder: Path, vocabulary: Vocabulary, padded: int, source: dict[str, Any], domains: dict[str, Any], **more: Any
) -> None:
    """Write tokenizer.json and meta.json beside the token files that are in `folder`.

    Args:
        padded: vocabulary size of the models, whose `token_dtype` the files have.
        source: what the text is, and a fingerprint of all that the folder was made of.
        domains: by name, counts of each part and where it lies in val.bin.
        more: further entries of meta.json.
    """
    with lasting(folder / "tokenizer.json") as file:
        file.write(vocabulary.tokenizer_json.encode())
    files = sorted(folder.glob("*.bin"))
    meta = {
        "format": FORMAT,
        "source": source,
        **more,
        "vocab_size": vocabulary.size,
        "padded_vocab_size": padded,
        "dtype": token_dtype(padded),
        "eot": vocabulary.end_of_text,
        "tokenizer_sha256": sha256_of(vocabulary.tokenizer_json),
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for file in files},
        "domains": domains,
    }
    meta["data_hash"] = data_hash(meta)
    with lasting(folder / "meta.json") as file:
        file.write((json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode())


def train_files(meta: dict[str, Any]) -> list[str]:
    return sorted(name for name in meta["files"] if name.startswith("train"))


def data_hash(meta: dict[str, Any]) -> str:
    """One hash for "trained on the same tokens"."""
    hashes = [meta["files"][name]["sha256"] for name in [*train_files(meta), "val.bin"]]
    hashes += [meta["litdata"]["index_sha256"]] if "litdata" in meta else []
    return sha256_of("".join([meta["tokenizer_sha256"], *hashes]))
