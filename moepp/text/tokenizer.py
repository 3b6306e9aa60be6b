"""Text ↔ tokens: byte-level BPE.

Byte-level means lossless: every text, whatever its script, comes back from its tokens byte for byte.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from moepp.model.errors import InputError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
FEWEST_TOKENS = 257  # of a vocabulary: the 256 bytes and END_OF_TEXT
MOST_TOKENS = 1 << 20  # asked for far more, the tokenizers library takes the process down with it


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, END_OF_TEXT and the 256 bytes among them."""
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


def load_tokenizer(tokenizer_json: str, name: str = "the tokenizer") -> Tokenizer:
    """A tokenizer that reads `<|endoftext|>` inside a text as text: only `prepare` writes the token.

    Raises:
        InputError: it is no tokenizer; calls it by `name`.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{name} cannot be read, is it damaged? ({error})") from error
    tokenizer.encode_special_tokens = True  # not kept in the JSON
    return tokenizer


def padded_vocab_size(vocab_size: int) -> int:
    """The number of rows of the embedding: a multiple of 64, which the matmul of a GPU wants."""
    return (vocab_size + 63) // 64 * 64


def bytes_per_token(tokenizer: Tokenizer, padded_size: int) -> Tensor:
    """(V,) int64, V the padded vocabulary: how many bytes of UTF-8 each token stands for; 0 for END_OF_TEXT."""
    n_bytes_V = torch.zeros(padded_size, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if index != END_OF_TEXT_ID:
            n_bytes_V[index] = len(token)  # a byte-level token is spelt with one letter for each byte
    return n_bytes_V
