"""Text ↔ tokens: byte-level BPE, or the tokenizer of somebody else's model.

Byte-level means lossless: every text, whatever its script, comes back from its tokens byte for byte.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moepp.model.errors import InputError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
# elsewhere; where a tokenizer has several, a conversation's comes last
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
FEWEST_TOKENS = 257  # of a vocabulary: the 256 bytes and END_OF_TEXT
MOST_TOKENS = 1 << 20  # asked for far more, the tokenizers library takes the process down with it


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and which of its tokens ends a text."""

    tokenizer_json: str
    tokenizer: Tokenizer
    end_of_text: int

    @property
    def size(self) -> int:
        return vocabulary_size(self.tokenizer)

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """That of somebody else's `tokenizer.json`.

        Raises:
            InputError: no such file, no tokenizer, or nothing in it ends a text.
        """
        tokenizer_json, tokenizer = read_tokenizer(path)
        if (end := end_of_text(tokenizer, path.parent)) is None:
            raise InputError(f"tokenizer: {path}: say what ends a text, as eos_token in tokenizer_config.json")
        return cls(tokenizer_json, tokenizer, end)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """At most `vocab_size` tokens, END_OF_TEXT and the 256 bytes among them."""
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
    return Vocabulary(tokenizer.to_str(pretty=True), load_tokenizer(tokenizer.to_str()), END_OF_TEXT_ID)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The highest id and 1: somebody else's may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def read_tokenizer(path: Path) -> tuple[str, Tokenizer]:
    """Somebody else's `tokenizer.json`, as it is and read.

    Raises:
        InputError: no such file, or no tokenizer.
    """
    try:
        tokenizer_json = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer: {path} cannot be read ({error})") from error
    return tokenizer_json, load_tokenizer(tokenizer_json, f"tokenizer: {path}")


def load_tokenizer(tokenizer_json: str, name: str = "the tokenizer") -> Tokenizer:
    """A tokenizer that reads all of a text, and `<|endoftext|>` in it as text: only `prepare` writes the token.

    Raises:
        InputError: it is no tokenizer; calls it by `name`.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{name} cannot be read, is it damaged? ({error})") from error
    tokenizer.encode_special_tokens = True  # not kept in the JSON
    tokenizer.no_truncation()  # some come with the length that their model was trained at
    tokenizer.no_padding()
    return tokenizer


def padded_vocab_size(vocab_size: int) -> int:
    """The number of rows of the embedding: a multiple of 64, which the matmul of a GPU wants."""
    return (vocab_size + 63) // 64 * 64


def end_of_text(tokenizer: Tokenizer, folder: Path | None = None) -> int | None:
    """The token that ends a text: what Hugging Face's configuration in `folder` says, else one of a known name."""
    names: list[str | None] = [*ENDS_OF_TEXT]
    says = {"config.json": "eos_token_id", "tokenizer_config.json": "eos_token"}
    for path, key in [(folder / file, key) for file, key in says.items()] if folder else []:
        # it is not there, or does not say
        with suppress(OSError, ValueError, LookupError, TypeError, OverflowError):
            eos: Any = json.loads(path.read_text(encoding="utf-8"))[key]
            eos = eos["content"] if isinstance(eos, dict) else eos[0] if isinstance(eos, list) else eos
            names.insert(0, eos if isinstance(eos, str) else tokenizer.id_to_token(eos))
    ids = (tokenizer.token_to_id(name) for name in names if name)
    return next((i for i in ids if i is not None), None)
