"""A source of text → a stream of documents.

Nothing here holds more than a piece of a file at a time, so that files larger than memory stream through.
"""

import gzip
import io
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moepp.model.errors import InputError
from moepp.system.hub import go_offline_without_a_network
from moepp.text.corpus_list import read_list

Document = tuple[str, str]  # domain, text

PIECE = 65_536  # characters: a text file longer than this counts as several documents
TEXT_FILE = re.compile(r"\.(txt|md|jsonl)(\.gz|\.zst)?\Z", re.IGNORECASE)  # how its name ends
HALF_PAIR = re.compile("[\ud800-\udfff]")  # no character; in a name it stands for a byte that was none
TEXT_FILES = ".txt, .md, .jsonl (with .gz or .zst, if you like)"


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        name: short, for the name of the folder with the token files.
        fingerprint: JSON-able; costs no reading, and changes when the text may have changed.
        size: bytes that there will be, about; None where nobody knows.
        documents: starts a new stream of (domain, text); no text is empty, lines end in `\\n`.
    """

    name: str
    fingerprint: dict[str, Any]
    size: int | None
    documents: Callable[[], Iterator[Document]]


def open_source(path: str) -> Source:
    """Look at what `path` names, without reading the text yet.

    Args:
        path: a corpus list (`.yaml`), a file (`.txt`, `.md`, `.jsonl`, also `.gz` or `.zst`), a folder of such
            files, or `hf:owner/name` (`hf:owner/name:configuration`; a folder of Parquet files is `hf:folder`).

    Raises:
        InputError: nothing there, or nothing that can be read as text.
    """
    ways = "give a file, a folder, a corpus list (.yaml) or hf:owner/name"
    root = Path(path)
    if path.startswith("hf:"):
        return open_hub(path)
    if not path:
        raise InputError(f"data.path is empty: {ways}")
    if not root.exists():
        raise InputError(f"{path} does not exist: {ways}")
    if root.is_dir():
        return open_folder(root)
    if root.suffix in (".yaml", ".yml"):
        return open_list(root)
    if is_text_file(root):
        return open_files(stem(root), [(stem(root), root)])
    raise InputError(f"{path} is none of {TEXT_FILES} or .yaml")


def open_list(path: Path) -> Source:
    domains = read_list(path)
    fingerprint = {
        "list": path.read_text(encoding="utf-8"),
        "readers": path.with_name("readers.py").read_text(encoding="utf-8"),
    }
    if any(domain.wheel is None for domain in domains):  # its text is that of the Python that runs
        fingerprint["python"] = platform.python_version()

    def documents() -> Iterator[Document]:
        for domain in domains:
            for text in cleaned(domain.documents()):
                yield domain.name, text

    return Source(path.stem, fingerprint, None, documents)


def open_hub(path: str) -> Source:
    import datasets  # few have it

    dataset, _, configuration = path.removeprefix("hf:").partition(":")
    name = dataset.rstrip("/").rsplit("/", 1)[-1]
    files = [state_of(file) for file in sorted(Path(dataset).rglob("*")) if file.is_file()]  # of a local folder

    def documents() -> Iterator[Document]:
        go_offline_without_a_network()
        try:
            rows = datasets.load_dataset(dataset, configuration or None, split="train", streaming=True)
            for text in cleaned(text_of(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)):
                yield name, text
        except InputError:
            raise
        except Exception as error:  # whatever the library, the network or the data set comes up with
            reason = " ".join(str(error).split())
            raise InputError(
                f"cannot read {path}: {reason} (without a network give a file or a folder of text)"
            ) from error

    return Source(name, {"hub": path, "files": files} if files else {"hub": path}, None, documents)


def open_folder(root: Path) -> Source:
    """A sub-folder is a domain. Files that lie loose are one domain together, or, if they look like one file a
    domain (few, and each large enough to hold documents out of it), a domain each."""
    files = text_files(root)
    name = root.resolve().name
    loose = [file for file in files if file.parent == root]
    one_each = len(loose) <= 16 and all(is_jsonl(file) or file.stat().st_size >= 4 * PIECE for file in loose)

    def domain(file: Path) -> str:
        if file.parent != root:
            return file.relative_to(root).parts[0]
        return stem(file) if one_each else name

    return open_files(name, [(domain(file), file) for file in files])


def open_files(name: str, files: list[tuple[str, Path]]) -> Source:
    states = [state_of(file) for _, file in files]
    size = sum(size for _, size, _ in states)
    # a short text alone must still be cut, or nothing of it could be held out for validation
    piece = PIECE if len(files) > 1 else min(PIECE, max(1024, size // 50))

    def documents() -> Iterator[Document]:
        for domain, file in files:
            for text in read_file(file, piece):
                yield domain, text

    found = [[domain, *state] for (domain, _), state in zip(files, states, strict=True)]
    return Source(name, {"files": found}, size, documents)


def state_of(file: Path) -> list[Any]:
    """Path, bytes, and time of the last change: what is asked instead of reading a file."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def text_files(root: Path) -> list[Path]:
    """Those in a folder and below, without hidden ones."""
    files = [
        file
        for file in sorted(root.rglob("*"))
        if is_text_file(file) and not any(p.startswith(".") for p in file.relative_to(root).parts)
    ]
    if not files:
        raise InputError(f"{root} holds no {TEXT_FILES}; of Parquet files it is hf:{root}")
    if odd := [file for file in files if HALF_PAIR.search(str(file))]:
        raise InputError(f"{str(odd[0])!r} is a name that is not UTF-8: rename it")
    return files


# ---- one file ----------------------------------------------------------------------------------------------


def is_text_file(file: Path) -> bool:
    return TEXT_FILE.search(file.name) is not None and file.is_file()


def is_jsonl(file: Path) -> bool:
    return re.search(r"\.jsonl(\.gz|\.zst)?\Z", file.name, re.IGNORECASE) is not None


def stem(file: Path) -> str:
    return TEXT_FILE.sub("", file.name)


def read_file(file: Path, piece: int = PIECE) -> Iterator[str]:
    """The documents of one file: the lines of a `.jsonl`, else pieces of up to about `piece` characters.

    Raises:
        InputError: names the file, and the line or what is near the bytes that are wrong.
    """
    try:
        with open_text(file) as text:
            yield from cleaned(json_lines(text, file) if is_jsonl(file) else pieces(text, piece))
    except (InputError, ModuleNotFoundError):
        raise
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 20) : error.start + 20]
        raise InputError(f"{file} is not UTF-8 near {near!r}: convert it, as with iconv -t UTF-8") from None
    except Exception as error:  # each way to unpack has its own
        raise InputError(f"{file} is damaged, cut off or not yours to read ({error}): get it again") from error


def open_text(file: Path) -> TextIO:
    """A file, unpacked by the last part of its name, with `\\n` as the only line end."""
    stream: Any = gzip.GzipFile(file) if file.suffix.lower() == ".gz" else file.open("rb")
    if file.suffix.lower() == ".zst":
        import zstandard  # few have such files

        unpack = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        stream = unpack.stream_reader(stream, read_across_frames=True)  # zstandard.open stops after the first
    return io.TextIOWrapper(stream, encoding="utf-8")


def pieces(text: TextIO, size: int) -> Iterator[str]:
    """Cut a text into pieces of size/2 to size characters: after a blank line, else a line, else anywhere."""
    rest = text.read(size + 1)
    while len(rest) > size:
        after = (found + len(mark) for mark in ("\n\n", "\n") if (found := rest.rfind(mark, size // 2, size)) >= 0)
        end = next(after, size)
        yield rest[:end]
        rest = rest[end:] + text.read(end)
    yield rest


def json_lines(text: TextIO, file: Path) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            why = str(error).splitlines()[0]
            raise InputError(f"{where} is no JSON ({why}): each line must be one object") from None
        yield text_of(row, where)


def text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no "text": each document must be an object like {{"text": "..."}}')
    if HALF_PAIR.search(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no character: remove it")
    return text


def cleaned(texts: Iterable[str]) -> Iterator[str]:
    """Without byte order marks and texts in which nothing can be seen; lines end in `\\n`."""
    for text in texts:
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            yield text
