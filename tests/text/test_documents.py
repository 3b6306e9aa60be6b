"""Sources → documents."""

import gzip
import hashlib
import io
import json
import sys
import time
import types
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp.cli import main
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


@given(st.text(st.sampled_from("ab\n "), max_size=300), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_pieces_lose_nothing_and_are_not_too_long(text: str, size: int) -> None:
    pieces = list(reading.pieces(io.StringIO(text), size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    assert all(len(piece) >= size // 2 for piece in pieces[:-1])


def test_cut_prefers_blank_line_then_line_then_anywhere() -> None:
    for text, cut in (
        ("aaaa\nbb\n\ncc\ndddd", ["aaaa\nbb\n\n", "cc\ndddd"]),
        ("aaaa\nbb\nccdddd", ["aaaa\nbb\n", "ccdddd"]),
        ("aaaabbccdddd", ["aaaabbccdd", "dd"]),
    ):
        assert list(reading.pieces(io.StringIO(text), 10)) == cut


def test_characters_and_line_ends_survive_wherever_a_block_ends(tmp_path: Path) -> None:
    text = "aé😀\r\nbb\rcc\n" * 5000  # 15 bytes: blocks of a power of two end everywhere in it
    file = tmp_path / "t.txt"
    file.write_bytes(text.encode())
    assert "".join(t for _, t in documents(file)) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.txt.gz"])
@pytest.mark.parametrize("lines", [1, 1000])
def test_invalid_utf8_names_file_and_place(tmp_path: Path, name: str, lines: int) -> None:
    first = '{"text": "é"}\n'.encode() * lines
    data = first + b"caf\xe9 au lait"
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError) as error:
        documents(file)
    one_line(error, f"{file} is not UTF-8 near b'", "caf\\xe9 au lait", "iconv")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    text = "\n".join(hashlib.sha256(i.to_bytes(2)).hexdigest() for i in range(5000))
    data = json.dumps({"text": text}).encode()  # more than a block of 128 kB
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    file = tmp_path / f"t.jsonl{suffix}"
    # a .zst ends without a word wherever it was cut off, but then the object in it does, too
    for wrong, said in ((packed[:-20], "damaged" if suffix == ".gz" else "no JSON"), (b"not packed", "damaged")):
        file.write_bytes(wrong)
        with pytest.raises(InputError) as error:
            documents(file)
        one_line(error, str(file), said)


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
    monkeypatch.setattr(reading, "open_text", lambda *_: pytest.fail("read"))
    first = open_source(str(file)).fingerprint
    assert open_source(str(file)).fingerprint == first
    file.write_text("xy")
    assert open_source(str(file)).fingerprint != first


@pytest.mark.parametrize("changed", ["list.yaml", "readers.py"])
def test_fingerprint_of_a_list_changes_with_the_list_and_with_its_readers(tmp_path: Path, changed: str) -> None:
    (tmp_path / "list.yaml").write_text("a: {reader: talk}\n")
    (tmp_path / "readers.py").write_text("def talk():\n    yield 'one'\n")
    first = open_source(str(tmp_path / "list.yaml")).fingerprint
    assert open_source(str(tmp_path / "list.yaml")).fingerprint == first
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    assert open_source(str(tmp_path / "list.yaml")).fingerprint != first


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda root: root / "missing.txt", ["does not exist"]),
        (lambda root: root, ["holds no .txt, .md, .jsonl"]),
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

    monkeypatch.setattr("moepp.text.documents.go_offline_without_a_network", lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert documents("hf:some/stories") == [("stories", "one"), ("stories", "two\n")]
    documents("hf:some/stories:tiny")
    assert calls == [
        (("some/stories", None), {"split": "train", "streaming": True}),
        (("some/stories", "tiny"), {"split": "train", "streaming": True}),
    ]


def test_a_folder_of_parquet_is_a_data_set_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "stories"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(folder / "a.parquet")
    with pytest.raises(InputError) as error:
        documents(folder)
    one_line(error, f"of Parquet files it is hf:{folder}")
    source = open_source(f"hf:{folder}/")
    assert list(source.documents()) == [("stories", "one"), ("stories", "two")]
    datasets.Dataset.from_dict({"text": ["three"]}).to_parquet(folder / "b.parquet")
    assert open_source(f"hf:{folder}/").fingerprint != source.fingerprint


def test_hub_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("moepp.text.documents.go_offline_without_a_network", lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as error:
        documents("hf:some/stories")
    one_line(error, "cannot read hf:some/stories: no route")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what importing it then raises is ImportError
    assert main(["prepare", "hf:some/stories"]) == 2
    assert "needs datasets: pip install datasets" in capsys.readouterr().err


def test_without_a_network_a_data_set_of_the_hub_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # the command has to find out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        documents("hf:some/stories")
    one_line(error, "cannot read hf:some/stories: Couldn't reach 'some/stories' on the Hub", "without a network")
    assert time.monotonic() - start < 10  # it would try five times
