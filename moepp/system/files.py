"""Files that are whole at every moment, also after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in place of `path`. Whoever looks, at any moment, finds the old content or the new one."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: otherwise a power cut could leave the new name empty
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)  # on a full disk the room is needed
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failing write does not know its file
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
