"""Text ↔ tokens, without loss."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import load_tokenizer, padded_vocab_size
from tests.text.conftest import make, write_text


# Cs: half surrogate pairs, which no file of UTF-8 can hold
@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_tokenizer_is_lossless(prepared: tuple[list[tuple[str, str]], TokenFiles], text: str) -> None:
    _, files = prepared
    ids = files.tokenizer.encode(text).ids
    assert files.tokenizer.decode(ids) == text
    assert files.letters_per_token[ids].sum() == len(text.encode())


def test_end_of_text_inside_a_text_is_text(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    written, files = prepared
    assert sum("<|endoftext|>" in text for _, text in written) > 50
    assert (files.train[:] == 0).sum() + (files.val == 0).sum() == len(written) + 2
    text = " a<|endoftext|>b\u200d\ufeff\x00\r\n\u2028"
    ids = load_tokenizer(files.tokenizer_json).encode(text).ids
    assert 0 not in ids
    assert files.tokenizer.decode(ids) == text
    assert files.tokenizer.token_to_id("<|endoftext|>") == 0


def test_padding_of_the_vocabulary_and_dtype(tmp_path: Path) -> None:
    sizes = {257: 320, 320: 320, 321: 384, 8192: 8192, 65536: 65536, 65537: 65600}
    assert {size: padded_vocab_size(size) for size in sizes} == sizes
    write_text(tmp_path / "text", {"a": 4})
    files = TokenFiles.open(make(tmp_path, vocab_size=65537))
    assert (files.train.dtype, files.meta["padded_vocab_size"]) == (np.uint32, 65600)


def test_letters_of_a_byte_level_tokenizer_are_bytes(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    _, files = prepared
    counts = files.letters_per_token
    assert files.bytes_per_letter.tolist() == [1.0, 1.0, 0.0]  # nothing of the third domain is held out
    assert counts.dtype == torch.int64
    assert counts.shape == (320,)
    assert counts[0] == 0
    assert counts[files.meta["vocab_size"] :].sum() == 0
    assert (counts[1 : files.meta["vocab_size"]] >= 1).all()
    for part, ids in (("train", files.train[:]), ("val", files.val)):  # adds up to the bytes of the documents
        size = sum(meta[part]["bytes"] for meta in files.meta["domains"].values())
        assert counts[torch.from_numpy(ids.astype(np.int64))].sum() == size
