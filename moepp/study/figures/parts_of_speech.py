"""Tokens → verb, noun, other, word fragment, punctuation, number (figure 5 of the paper).

Words are tagged whole. A token that covers a full word carries the word's tag; the tokens of a split word are
fragments.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from tokenizers import Tokenizer

from moepp.model import InputError
from moepp.text.corpus_list import Wheel

CLASSES = ("verb", "noun", "other", "word fragment", "punctuation", "number", "white space")
NONE = -1  # the end of a text, or a word that the edge of a window cuts

Tagger = Callable[[Sequence[str]], list[str]]  # words as they follow one another → verb, noun, number or other

LEXICON = Wheel(  # Brill's lexicon: a word and its most frequent Penn tag on each line
    "textblob==0.20.1",
    Path("data/cache/textblob-0.20.1-py3-none-any.whl"),
    "f957699169a3e7b9a03a504883111b7b6973679496b9af959db2f74ee2449977",
)
PENN = {"VB": "verb", "MD": "verb", "NN": "noun", "CD": "number"}  # by the tag's first two letters
UNIVERSAL = {"VERB": "verb", "AUX": "verb", "NOUN": "noun", "PROPN": "noun", "NUM": "number"}
LETTER = r"(?:[^\W\d_]|\ufffd)"  # U+FFFD is what part of a letter's UTF-8 decodes to


class PartsOfSpeech:
    """The class of every token of a window.

    Args:
        texts_V: each token's text; "" for tokens that stand for none.
        tag: tags words.
    """

    def __init__(self, texts_V: Sequence[str], tag: Tagger) -> None:
        self.texts_V, self.tag = texts_V, tag
        # letters on both sides of a seam make one word, also with an apostrophe between ("don" + "'t")
        self.continues_V = np.array([bool(re.match(f"['’]?{LETTER}", text)) for text in texts_V])
        self.ends_open_V = np.array([bool(re.search(f"{LETTER}$", text)) for text in texts_V])
        self.content_V = [content(text) for text in texts_V]

    def __call__(self, tokens_S: np.ndarray) -> np.ndarray:
        """(S,) token ids → (S,) indices into CLASSES, or NONE."""
        joined = self.ends_open_V[tokens_S[:-1]] & self.continues_V[tokens_S[1:]]
        first = np.flatnonzero(np.r_[True, ~joined])  # of each piece: a whole word, or a token that is no word
        sizes = np.diff(np.r_[first, len(tokens_S)])
        texts = [self.texts_V[token] for token in tokens_S]
        pieces = ["".join(texts[i : i + size]).strip() for i, size in zip(first, sizes, strict=True)]
        tags = iter(self.tag([piece for piece in pieces if piece]))
        classes = [next(tags) if piece else "" for piece in pieces]
        for i, size in enumerate(sizes):
            if (found := self.content_V[tokens_S[first[i]]]) != "word":
                classes[i] = found
            elif i in (0, len(pieces) - 1):
                classes[i] = ""
            elif size > 1:
                classes[i] = "word fragment"
        return np.repeat([CLASSES.index(name) if name else NONE for name in classes], sizes)


def content(text: str) -> str:
    """A token's class as far as its letters tell, `word` where words must be tagged, or "" for none."""
    if re.search(LETTER, text):
        return "word"
    if not text.strip():
        return "white space" if text else ""
    return "number" if re.search(r"\d", text) else "punctuation"


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """(V,) the text of each token; "" for special tokens and for rows that pad the embedding."""
    n_tokens = min(vocab_size, tokenizer.get_vocab_size())
    texts = tokenizer.decode_batch([[i] for i in range(n_tokens)], skip_special_tokens=True)
    for i in range(n_tokens):  # SentencePiece spells a space as a low line, and decoders drop the first one
        if (tokenizer.id_to_token(i) or "").startswith("\u2581"):
            texts[i] = " " + texts[i].lstrip(" \u2581")
    return texts + [""] * (vocab_size - n_tokens)


# ---- taggers -----------------------------------------------------------------------------------------------


def open_tagger(name: str) -> Tagger:
    """`lexicon`, or `spacy:MODEL`.

    Raises:
        InputError: no such tagger, or it cannot be fetched or is not installed.
    """
    if name == "lexicon":
        LEXICON.fetch()
        with ZipFile(LEXICON.path).open("textblob/en/en-lexicon.txt") as lines:
            return lexicon_tagger(line.decode() for line in lines)
    if name.startswith("spacy:"):
        return spacy_tagger(name.removeprefix("spacy:"))
    raise InputError(f"tagger: must be lexicon or spacy:MODEL, not {name!r}")


def lexicon_tagger(lines: Iterable[str]) -> Tagger:
    """Looks each word up, then in lower case; a word that is not there is a noun. `;` begins a comment."""
    entries = (line.split() for line in lines if not line.startswith(";"))
    lexicon = {entry[0]: PENN.get(entry[1][:2], "other") for entry in entries if len(entry) == 2}

    def tag(words: Sequence[str]) -> list[str]:
        return [lexicon.get(word) or lexicon.get(word.lower(), "noun") for word in words]

    return tag


def spacy_tagger(model: str) -> Tagger:
    try:
        import spacy
        from spacy.tokens import Doc

        nlp = spacy.load(model)
    except ImportError:
        raise InputError("tagger: needs spaCy: pip install spacy") from None
    except OSError:
        raise InputError(f"tagger: spaCy has no model {model}: python -m spacy download {model}") from None

    def tag(words: Sequence[str]) -> list[str]:
        return [UNIVERSAL.get(token.pos_, "other") for token in nlp(Doc(nlp.vocab, words=list(words)))]

    return tag
