"""Tags of words are carried to tokens."""

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from moepp.study.figures.parts_of_speech import (
    CLASSES,
    NONE,
    PartsOfSpeech,
    read_lexicon,
    token_texts,
)

LEXICON = "; a comment\nthe DT\nrouter NN\nsends VBZ\ncopy VB\ntwo CD\nCopy NNP\n"


def test_tags_of_words_are_carried_to_tokens() -> None:
    words = ["", "the", " router", " sends", " cop", "y", " copy", ",", " 12", " two", "\n", " Copy", "'t", " don"]
    words += [" \ufffd", " unheard"]
    classes = PartsOfSpeech(words, read_lexicon(LEXICON.splitlines()))

    def tagged(*texts: str) -> list[str]:
        found = classes(np.array([words.index(text) for text in texts]))
        return ["none" if c == NONE else CLASSES[c] for c in found]

    assert tagged("", "the", " router", " sends", " two", " copy", ",", " 12", "\n", "the") == (
        ["none", "other", "noun", "verb", "number", "verb", "punctuation", "number", "white space", "none"]
    )
    assert tagged("", " cop", "y", " Copy", " unheard", ",") == (
        ["none", "word fragment", "word fragment", "noun", "noun", "punctuation"]
    )
    assert tagged("", " don", "'t", ",", " \ufffd", "y", ",") == (
        ["none", "word fragment", "word fragment", "punctuation", "word fragment", "word fragment", "punctuation"]
    )
    # a window's edge may have cut the word
    assert tagged("y", " router", " cop") == ["none", "noun", "none"]
    assert tagged("y", "y", ",", " cop", "y") == ["none", "none", "punctuation", "none", "none"]


def test_spaces_of_sentencepiece_tokens() -> None:
    tokenizer = Tokenizer(WordLevel({"▁the": 0, "re": 1, "▁": 2}, unk_token="re"))
    tokenizer.decoder = Metaspace()
    assert token_texts(tokenizer, 4) == [" the", "re", " ", ""]
