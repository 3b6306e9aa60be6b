"""Text → tokenizer → token files."""

import hashlib
import multiprocessing
import re
import shutil
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import rich

from moepp.model.errors import InputError
from moepp.system import files as whole_files
from moepp.text import prepare as preparing
from moepp.text import token_files
from moepp.text.prepare import prepare
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import Vocabulary
from tests.text.conftest import make, one_line, write_text


def decode(files: TokenFiles, ids: np.ndarray) -> list[str]:
    """The documents in a stretch of tokens that ends with <|endoftext|>."""
    ends = np.flatnonzero(ids == 0)
    parts = np.split(ids, ends + 1)
    assert len(parts.pop()) == 0
    return [files.tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_every_document_comes_back_exactly_once(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    written, files = prepared
    assert files.train[:1] == files.val[0] == 0
    train = decode(files, files.train[1:])
    held_out = []
    for domain, (begin, end) in zip(files.domains, files.val_ranges, strict=True):
        held_out += [(domain, text) for text in decode(files, files.val[begin:end])]
    assert sorted(train + [text for _, text in held_out]) == sorted(text for _, text in written)
    assert set(held_out) <= set(written)  # with the right domain
    assert train == [text for _, text in written if text in set(train)]  # in the order of the stream
    ranges = files.val_ranges
    assert ranges[0][0] == 1
    assert ranges[-1][1] == len(files.val)
    assert [r[1] for r in ranges[:-1]] == [r[0] for r in ranges[1:]]


def test_holds_out_the_fraction_of_each_domain(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    written, files = prepared
    assert files.domains == ["a", "b", "single"]
    for domain, meta in files.meta["domains"].items():
        texts = [text for d, text in written if d == domain]
        size = sum(len(text.encode()) for text in texts)
        assert meta["train"]["documents"] + meta["val"]["documents"] == len(texts)
        assert meta["train"]["bytes"] + meta["val"]["bytes"] == size
        assert meta["text_sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()
        if domain == "single":
            assert meta["val"] == {"documents": 0, "bytes": 0, "tokens": 0}
        else:  # reached, and not by more than the document that reached it
            assert 0.1 * size <= meta["val"]["bytes"] < 0.1 * size + max(len(text.encode()) for text in texts)
    for part, ids in (("train", files.train[:]), ("val", files.val)):
        assert sum(meta[part]["tokens"] for meta in files.meta["domains"].values()) == len(ids) - 1


def test_at_least_one_document_on_either_side(tmp_path: Path) -> None:
    write_text(tmp_path / "text", {"a": 2, "b": 3})
    few = TokenFiles.open(make(tmp_path, val_fraction=1e-9)).meta["domains"]
    assert [few[d]["val"]["documents"] for d in "ab"] == [1, 1]
    many = TokenFiles.open(make(tmp_path, val_fraction=0.999)).meta["domains"]
    assert [many[d]["train"]["documents"] for d in "ab"] == [1, 1]


def test_meta(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    _, files = prepared
    meta = files.meta
    assert meta["vocab_size"] == files.tokenizer.get_vocab_size() <= 320
    assert meta["padded_vocab_size"] == 320
    assert (meta["dtype"], meta["eot"], files.train.dtype) == ("uint16", 0, np.uint16)
    assert meta["tokenizer_sha256"] == hashlib.sha256((files.path / "tokenizer.json").read_bytes()).hexdigest()
    for name in ("train-00000.bin", "val.bin"):
        data = (files.path / name).read_bytes()
        assert meta["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sorted(p.name for p in files.path.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train-00000.bin",
        "val.bin",
    ]


def test_tokenizer_learns_from_training_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = preparing.train_tokenizer

    def spy(texts: Iterable[str], vocab_size: int) -> Vocabulary:
        seen[:] = texts
        return train(seen, vocab_size)

    monkeypatch.setattr(preparing, "train_tokenizer", spy)
    write_text(tmp_path / "text", {"a": 50})
    files = TokenFiles.open(make(tmp_path, val_fraction=0.2))
    assert seen == decode(files, files.train[1:])
    size = sum(len(text.encode()) for text in seen)
    monkeypatch.setattr(preparing, "TOKENIZER_BYTES", size // 3)
    make(tmp_path, val_fraction=0.21)
    assert len(seen) < 14  # every fourth, from the whole text
    assert [int(text.split(".")[0].split("-")[1]) // 10 for text in seen][-1] == 4


# ---- whole or not at all ---------------------------------------------------------------------------------------


def test_same_text_same_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "text", {"a": 30, "b": 30})
    first, second = make(tmp_path), make(tmp_path, out_root=str(tmp_path / "again"))
    assert first.name == second.name
    for name in ("train-00000.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_second_call_does_nothing_and_changed_text_gets_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text", {"a": 10})
    folder = make(tmp_path)
    assert folder.name.startswith("text-v320-")
    assert len(folder.name) == len("text-v320-") + 8
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "Documents", None)
        assert make(tmp_path) == folder
    write_text(tmp_path / "text", {"a": 11})
    changed = make(tmp_path)
    assert len({folder, changed, make(tmp_path, vocab_size=300), make(tmp_path, val_fraction=0.5)}) == 4
    assert TokenFiles.open(folder).meta["domains"]["a"]["train"]["documents"] == 9
    assert TokenFiles.open(changed).meta["domains"]["a"]["train"]["documents"] == 10


@pytest.mark.parametrize("step", ["train_tokenizer", "encode", "data_hash", "lasting", "fsync_folder"])
def test_a_call_cut_off_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_text(tmp_path / "text", {"a": 10})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        where = {"fsync_folder": whole_files, "data_hash": token_files}
        patch.setattr(where.get(step, preparing), step, stop)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed: nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    left = [p.name for p in (tmp_path / "prepared").iterdir() if p.is_dir()]
    assert len(left) == 1
    assert left[0].startswith(".unfinished-")
    folder = make(tmp_path)
    assert [p for p in (tmp_path / "prepared").iterdir() if p.is_dir()] == [folder]
    TokenFiles.open(folder)


def make_and_hash(root: Path) -> str:
    return hashlib.sha256((make(root) / "train-00000.bin").read_bytes()).hexdigest()


def test_two_at_once(tmp_path: Path) -> None:
    write_text(tmp_path / "text", {"a": 400})
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(make_and_hash, [tmp_path] * 2, chunksize=1)
    assert first == second
    assert len([p for p in (tmp_path / "prepared").iterdir() if p.is_dir()]) == 1


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ({"a": 5}, {"vocab_size": 256}, ["vocab_size: must be a whole number from 257 to", "got 256"]),
        ({"a": 5}, {"vocab_size": 10**12}, ["vocab_size: must be", "to 1048576"]),  # ended the process
        ({"a": 5}, {"val_fraction": 0.0}, ["val_fraction"]),
        ({"a": 5}, {"val_fraction": 1.0}, ["val_fraction"]),
        ({"a": 1, "b": 1}, {}, ["2 document(s)", "held out"]),
        ({"a": 0, "b": 0}, {}, ["is empty"]),
        ({}, {}, ["holds no .txt"]),
    ],
)
def test_too_little_text_or_impossible_arguments(
    tmp_path: Path, text: dict[str, int], options: dict[str, float], parts: list[str]
) -> None:
    write_text(tmp_path / "text", text)
    with pytest.raises(InputError) as error:
        make(tmp_path, **options)
    one_line(error, *parts)
    root = tmp_path / "prepared"
    assert not root.exists() or not [p for p in root.iterdir() if p.is_dir()]


def test_blank_documents_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" \n" * 100)
    with pytest.raises(InputError) as error:
        prepare(str(tmp_path / "text.txt"), 300, out_root=str(tmp_path / "out"), progress=False)
    one_line(error, "text.txt is empty")


# ---- what one sees ---------------------------------------------------------------------------------------------


def test_a_line_a_phase_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "text", {"a": 5})
    make(tmp_path, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ━")[0] for line in lines] == ["reading text", "training the tokenizer", "encoding"]
    assert all(re.search(r"100% \d+\.\d MB/s 0:00:\d\d$", line) for line in lines)


@pytest.mark.parametrize("size", [1000, 50_000_000])
def test_the_rate_is_that_of_the_whole_phase(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Also where the size was a guess, and where nothing comes for a while at its end."""
    clock = [0.0]
    monkeypatch.setattr(rich.get_console(), "get_time", lambda: clock[0])
    with preparing.phase("reading", size, True) as advance:
        for _ in range(10):
            clock[0] += 0.5
            advance(5_000_000)
        clock[0] += 5
    assert re.search(r"100% 5\.0 MB/s 0:00:10$", capsys.readouterr().out.strip())


def test_a_vocabulary_that_the_text_cannot_fill_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "text", {"a": 5})
    make(tmp_path, progress=True, vocab_size=5000)
    assert "of vocab_size=5,000 the rest stands unused" in capsys.readouterr().out


def test_text_is_copied_as_it_comes(tmp_path: Path) -> None:
    """20 MB of it, of which little is in memory at a time."""
    stream = (("domain", f"{n:>2000}") for n in range(10_000))
    tracemalloc.start()
    documents = preparing.Documents.copy(stream, tmp_path / "documents", lambda n_bytes: None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert documents.bytes_N.tolist() == [2000] * 10_000
    assert most < 4e6
