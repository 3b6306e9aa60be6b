"""A source of text → a stream of documents.

Nothing here holds more than a piece of a file at a time, so that files larger than memory stream through.
"""

import codecs
import gzip
import io
import json
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from moepp.model.errors import InputError
from moepp.text import corpus_list as wheels

Document = tuple[str, str]  # domain, text

PIECE = 65_536  # characters: a text file longer than this counts as several documents
BLOCK = 1 << 17  # bytes read at a time
SUFFIXES = (".txt", ".md", ".jsonl")
ZIPPED = ("", ".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        name: short, for the name of the folder with the token files.
        fingerprint: JSON-able; costs no reading, and changes when the text may have changed.
        size: bytes that there will be, about; None where nobody knows.
        wheels: what must be fetched before ``documents`` is called.
        documents: starts a new stream of (domain, text); no text is empty, lines end in ``\\n``.
    """

    name: str
    fingerprint: dict[str, Any]
    size: int | None
    wheels: list[wheels.Wheel]
    documents: Callable[[], Iterator[Document]]


def open_source(path: str) -> Source:
    """Look at what ``path`` names, without reading the text yet.

    Args:
        path: a corpus list (``.yaml``), a file (``.txt``, ``.md``, ``.jsonl``, also ``.gz`` or ``.zst``), a folder
            of such files, or ``hf:owner/name`` (``hf:owner/name:configuration``).

    Raises:
        InputError: nothing there, or nothing that can be read as text.
    """
    if path.startswith("hf:"):
        return _open_hub(path)
    if not path:
        raise InputError("data.path is empty: give a file, a folder, a corpus list (.yaml) or hf:owner/name")
    root = Path(path)
    if not root.exists():
        raise InputError(f"{path} does not exist: give a file, a folder, a corpus list (.yaml) or hf:owner/name")
    if root.is_dir():
        return _open_folder(root)
    if root.suffix in (".yaml", ".yml"):
        return _open_list(root)
    if _kind(root) is None:
        raise InputError(f"{path} is none of {', '.join(SUFFIXES)} (with .gz or .zst, if you like) or .yaml")
    return _open_files(root, _stem(root), [(_stem(root), root)])


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair stands for a byte that was none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_list(path: Path) -> Source:
    domains = wheels.read_list(path)
    fingerprint = {"list": path.read_text(encoding="utf-8")}
    if any(domain.reader == "stdlib" for domain in domains):
        fingerprint["python"] = platform.python_version()

    def documents() -> Iterator[Document]:
        for domain in domains:
            for text in domain.documents():
                if text := _clean(text):
                    yield domain.name, text

    return Source(path.stem, fingerprint, None, [d.wheel for d in domains if d.wheel is not None], documents)


def _open_folder(root: Path) -> Source:
    """A sub-folder is a domain. Files that lie loose are one domain together, or, if they look like one file a
    domain (few, and each large enough to hold documents out of it), a domain each."""
    files = _files(root)
    name = root.resolve().name
    loose = [file for file in files if file.parent == root]
    one_each = len(loose) <= 16 and all(_kind(f) == ".jsonl" or f.stat().st_size >= 4 * PIECE for f in loose)

    def domain(file: Path) -> str:
        if file.parent != root:
            return file.relative_to(root).parts[0]
        return _stem(file) if one_each else name

    return _open_files(root, name, [(domain(file), file) for file in files])


def open_labelled(path: str, labels: str) -> Source:
    """A folder whose files have the domains that a label file gives them, wherever they lie.

    Args:
        path: the folder.
        labels: a text file with a line for each file: its path within the folder, a tab, its domain.

    Raises:
        InputError: no such folder or label file, or the two do not match; names the line or the file.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{path} is no folder: labels ({labels}) belong to the files of a folder")
    if not Path(labels).is_file():
        raise InputError(f"data.labels: {labels} does not exist")
    files = [file for file in _files(root) if file.resolve() != Path(labels).resolve()]
    domains: dict[Path, str] = {}
    try:
        lines = Path(labels).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _not_utf8(Path(labels), error.start) from None
    for number, line in enumerate(lines, 1):
        name, _, domain = (part.strip() for part in line.partition("\t"))
        if line.strip() and not domain:
            raise InputError(f"{labels}, line {number}: must be a file, a tab and its domain, not {line!r}")
        if line.strip() and root / name not in files:
            raise InputError(f"{labels}, line {number}: {root} has no text file {name}")
        if line.strip():
            domains[root / name] = domain
    if missing := [file for file in files if file not in domains]:
        raise InputError(f"{labels} has no line for {missing[0].relative_to(root)}, one of {len(missing)} files")
    return _open_files(root, root.resolve().name, [(domains[file], file) for file in files])


def _files(root: Path) -> list[Path]:
    """The text files in a folder and below, without hidden ones."""
    files = [
        file
        for file in sorted(root.rglob("*"))
        if _kind(file) and file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)
    ]
    if not files:
        raise InputError(f"{root} holds no {', '.join(SUFFIXES)} file (with .gz or .zst, if you like)")
    if odd := [file for file in files if not is_text(str(file))]:
        raise InputError(f"{str(odd[0])!r} is a name that is not UTF-8: rename it")
    return files


def _open_files(root: Path, name: str, files: list[tuple[str, Path]]) -> Source:
    stats = [file.stat() for _, file in files]
    if not any(stat.st_size for stat in stats):
        raise InputError(f"{root} is empty: give it some text")
    piece = PIECE
    if len(files) == 1:  # a short text alone must still be cut, or nothing of it could be held out for validation
        piece = min(PIECE, max(1024, stats[0].st_size // 50))

    def documents() -> Iterator[Document]:
        for domain, file in files:
            for text in _read_file(file, piece):
                yield domain, text

    found = [
        [domain, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
        for (domain, file), stat in zip(files, stats, strict=True)
    ]
    return Source(name, {"files": found}, sum(stat.st_size for stat in stats), [], documents)


def _open_hub(path: str) -> Source:
    dataset, _, configuration = path.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path} needs the library datasets: pip install datasets") from None
    name = dataset.rsplit("/", 1)[-1]

    def documents() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(dataset, configuration or None, split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                if text := _clean(_text_of(row, f"{path}, row {number}")):
                    yield name, text
        except InputError:
            raise
        except Exception as error:  # whatever the library, the network or the data set comes up with
            raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error

    return Source(name, {"hub": path}, None, [], documents)


# ---- one file ----------------------------------------------------------------------------------------------


def _kind(file: Path) -> str | None:
    """``.txt``, ``.md``, ``.jsonl``, or None for a file that is none of them."""
    name = file.name.lower()
    return next((kind for kind in SUFFIXES for zipped in ZIPPED if name.endswith(kind + zipped)), None)


def _stem(file: Path) -> str:
    return file.name[: file.name.lower().rindex(_kind(file) or "")]


def _read_file(file: Path, piece: int = PIECE) -> Iterator[str]:
    """The documents of one file: the lines of a ``.jsonl``, else pieces of up to about ``piece`` characters.

    Raises:
        InputError: names the file, and the byte (of the unpacked text) or the line that is wrong.
    """
    try:
        texts = _json_lines(file) if _kind(file) == ".jsonl" else _pieces(_characters(file), piece)
        for text in texts:
            if text := _clean(text):
                yield text
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{file} is damaged, cut off or not yours to read ({error}): get it again") from error


def _blocks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked by the last part of its name."""
    with file.open("rb") as raw:
        if file.suffix.lower() == ".zst":
            yield from _unpack_zst(raw)
        else:
            stream = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
            while block := stream.read(BLOCK):
                yield block


def _unpack_zst(raw: io.BufferedReader) -> Iterator[bytes]:
    """As ``zstandard.open``, which however takes a file that was cut off for a whole one."""
    import zstandard  # few have such files

    frame = None
    while block := raw.read(BLOCK):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                unpacked = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise OSError(error) from error
            if unpacked:
                yield unpacked
            block = frame.unused_data
            if frame.eof:  # another frame may follow
                frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")


def _characters(file: Path) -> Iterator[str]:
    """The text of a file, a block at a time, with ``\\n`` as the only line end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    for block in chain(_blocks(file), [b""]):
        held_back = len(decoder.getstate()[0])  # the beginning of a character that the last block cut in two
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, position - held_back + error.start) from None
        position += len(block)
        yield lines.decode(text, final=not block)


def _pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """Cut a stream into pieces of size/2 to size characters: after a blank line, else a line, else anywhere."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > size:
            end = start + size
            for mark in ("\n\n", "\n"):
                if (found := rest.rfind(mark, start + size // 2, end)) >= 0:
                    end = found + len(mark)
                    break
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def _json_lines(file: Path) -> Iterator[str]:
    position = 0
    for number, line in enumerate(_lines(file), 1):
        where = f"{file}, line {number}"
        try:
            text = line.decode()
            if text.strip():
                yield _text_of(json.loads(text.removeprefix("\ufeff")), where)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, position + error.start) from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where} is no JSON ({str(error).splitlines()[0]}): each line must be one object"
            ) from None
        position += len(line) + 1


def _lines(file: Path) -> Iterator[bytes]:
    rest = b""
    for block in _blocks(file):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no "text": each document must be an object like {{"text": "..."}}')
    if not is_text(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no character: remove it")
    return text


def _clean(text: str) -> str:
    """Without byte order mark, lines ending in ``\\n``; "" where nothing can be seen."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.strip() else ""


def _not_utf8(file: Path, position: int) -> InputError:
    return InputError(f"{file} is not UTF-8 at byte {position}: convert it, for example with iconv -t UTF-8")
