"""Sources → documents."""

import gzip
import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp.model.errors import InputError
from moepp.text import documents as reading
from moepp.text.documents import open_source
from tests.text.conftest import one_line


def documents(path: Path | str) -> list[tuple[str, str]]:
    return list(open_source(str(path)).documents())


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_a_document_a_line(tmp_path: Path, suffix: str) -> None:
    texts = ["one\r\ntwo", "", "  \n", "drei ü 😀", "\ufefffour"]
    data = ("\n".join(json.dumps({"text": t, "other": 1}) for t in texts) + "\n\n").encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    file = tmp_path / f"my.jsonl{suffix}"
    file.write_bytes(pack(data[:40]) + pack(data[40:]))  # two gzip members, two zstd frames: both are legal
    assert documents(file) == [("my", "one\ntwo"), ("my", "drei ü 😀"), ("my", "four")]
    assert open_source(str(file)).name == "my"


def test_text_file_is_normalised_and_cut_into_documents_that_add_up(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i} " + "word " * (i % 40) + "\r\n\r\n" for i in range(8000)]
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(paragraphs).encode())
    texts = [text for _, text in documents(file)]
    assert "".join(texts) == "".join(paragraphs).replace("\r\n", "\n")
    # a lone file is cut into about 50 or more, none longer than 64 k, all but the last at least half as long
    limit = min(reading.PIECE, file.stat().st_size // 50)
    assert 50 <= len(texts) <= 101
    assert max(map(len, texts)) <= limit
    assert all(len(text) >= limit // 2 and text.endswith("\n\n") for text in texts[:-1])


@given(st.lists(st.text(st.sampled_from("ab\n "), max_size=60)), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_pieces_lose_nothing_and_are_not_too_long(texts: list[str], size: int) -> None:
    pieces = list(reading.pieces(texts, size))
    assert "".join(pieces) == "".join(texts)
    assert all(len(piece) <= size for piece in pieces)
    assert all(len(piece) >= size // 2 for piece in pieces[:-1])


def test_cut_prefers_blank_line_then_line_then_anywhere() -> None:
    assert list(reading.pieces(["aaaa\nbb\n\ncc\ndddd"], 10)) == ["aaaa\nbb\n\n", "cc\ndddd"]
    assert list(reading.pieces(["aaaa\nbb\nccdddd"], 10)) == ["aaaa\nbb\n", "ccdddd"]
    assert list(reading.pieces(["aaaabbccdddd"], 10)) == ["aaaabbccdd", "dd"]


def test_a_character_and_a_line_end_cut_by_a_block_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 3)
    text = "aé😀\r\nbb\rcc\n" * 5
    file = tmp_path / "t.txt"
    file.write_bytes(text.encode())
    assert "".join(t for _, t in documents(file)) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.txt.gz"])
@pytest.mark.parametrize("block", [4, 19, 1 << 17])  # 19: the wrong byte is the last of a block
def test_invalid_utf8_names_file_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    first = '{"text": "é"}\n'.encode()  # 15 bytes
    data = first + b"caf\xe9 au lait"
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError) as error:
        documents(file)
    one_line(error, f"{file} is not UTF-8 at byte 18", "iconv")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    data = b"".join(hashlib.sha256(bytes([i])).hexdigest().encode() + b"\n" for i in range(256))
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    file = tmp_path / f"t.txt{suffix}"
    for wrong in (packed[:-20], b"nothing packed at all"):
        file.write_bytes(wrong)
        with pytest.raises(InputError) as error:
            documents(file)
        one_line(error, str(file), "damaged")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"no json", ["line 2 is no JSON"]),
        (b'{"txt": "x"}', ['line 2 has no "text"']),
        (b'{"text": 3}', ['line 2 has no "text"']),
        (b'["text"]', ['line 2 has no "text"']),
        (b'{"text": "\\ud83d"}', ["line 2", "surrogate"]),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: bytes, parts: list[str]) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        documents(file)
    one_line(error, str(file), *parts)


# ---- folders ---------------------------------------------------------------------------------------------------


def test_sub_folders_are_domains(tmp_path: Path) -> None:
    for name in ("law/a.txt", "law/deep/b.md", "art/c.txt", "loose.txt", ".git/d.txt", "art/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(documents(tmp_path)) == [
        ("art", "art/c.txt"),
        ("law", "law/a.txt"),
        ("law", "law/deep/b.md"),
        (tmp_path.name, "loose.txt"),
    ]


def test_few_large_loose_files_are_domains_and_many_or_small_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "poems.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "novel.txt").write_text("y" * 4 * reading.PIECE)
    assert {domain for domain, _ in documents(tmp_path)} == {"poems", "novel"}
    (tmp_path / "note.txt").write_text("z")
    assert {domain for domain, _ in documents(tmp_path)} == {tmp_path.name}
    (tmp_path / "note.txt").unlink()
    for i in range(15):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "x"}\n')
    assert {domain for domain, _ in documents(tmp_path)} == {tmp_path.name}


def test_fingerprint_changes_with_the_text_and_costs_no_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.txt"
    file.write_text("x")
    monkeypatch.setattr(reading, "blocks", lambda *_: pytest.fail("read"))
    first = open_source(str(file)).fingerprint
    assert open_source(str(file)).fingerprint == first
    file.write_text("xy")
    assert open_source(str(file)).fingerprint != first


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda root: root / "missing.txt", ["does not exist"]),
        (lambda root: root, ["holds no .txt, .md, .jsonl"]),
        (lambda root: touch(root / "empty.txt"), ["empty.txt is empty"]),
        (lambda root: touch(root / "empty.txt").parent, ["is empty"]),
        (lambda root: touch(root / "text.pdf"), ["none of .txt"]),
        (lambda root: touch(root / "list.yaml"), ["lists no domains"]),
    ],
)
def test_nothing_to_read(tmp_path: Path, make, parts: list[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as error:
        documents(make(tmp_path))
    one_line(error, *parts)


def touch(file: Path) -> Path:
    file.touch()
    return file


# ---- the Hub ---------------------------------------------------------------------------------------------------


def test_hub_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "one"}, {"text": " "}, {"text": "two\r\n"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert documents("hf:some/stories") == [("stories", "one"), ("stories", "two\n")]
    documents("hf:some/stories:tiny")
    assert calls == [
        (("some/stories", None), {"split": "train", "streaming": True}),
        (("some/stories", "tiny"), {"split": "train", "streaming": True}),
    ]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as error:
        documents("hf:some/stories")
    one_line(error, "cannot read hf:some/stories: no route")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what importing it then raises is ImportError
    with pytest.raises(InputError) as error:
        open_source("hf:some/stories")
    one_line(error, "pip install datasets")
