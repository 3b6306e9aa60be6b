"""Files that are whole at every moment, also after a power cut; YAML that a person wrote, and where two differ."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from moepp.model.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in place of `path`. Whoever looks, at any moment, finds the old content or the new one (but
    for a moment of `put_in_place`, where a folder was)."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with lasting(beside) as file:  # before the rename: otherwise a power cut could leave the new name empty
            yield file
        put_in_place(path, beside)
    except BaseException as error:
        beside.unlink(missing_ok=True)  # on a full disk the room is needed
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failing write does not know its file
        raise
    fsync_folder(path.parent)


def put_in_place(path: Path, beside: Path) -> None:
    """Give `beside` the place of `path`, which there may be. Where one is a folder two renames do it."""
    if not (path.is_dir() or beside.is_dir()):
        beside.replace(path)
        return
    old = path.with_name(path.name + ".old.tmp")
    remove(old)  # a kill has left it
    if path.exists():
        path.rename(old)
    beside.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """A file or a folder; there may be none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lasting(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, whose content is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is in it. The caller holds the lock of the folder above."""
    for left_over in folder.parent.glob(".unfinished-*"):  # whoever made it is dead
        shutil.rmtree(left_over)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    unfinished.mkdir()
    try:
        yield unfinished
        fsync_folder(unfinished)
        unfinished.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader takes the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((name for name, times in names.items() if times > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What the file holds.

    Raises:
        InputError: it is not YAML, has a key twice, or holds itself (`a: &a [*a]`); names the file.
    """
    try:
        return without_circles(yaml.load(path.read_text(encoding="utf-8"), OnceLoader))
    except OSError:
        raise
    except Exception as error:  # YAMLError, and what int(), date() and the stack have to say to a wrong value
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


def without_circles(content: Any) -> Any:
    """What YAML holds, as it is. A ValueError if it holds itself, which others would follow without end."""
    json.dumps(content, default=str, skipkeys=True)
    return content


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two nested mappings differ, but for what `old` does not know: an option
    that came later."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old):
            yield from differences(old[name], new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new
