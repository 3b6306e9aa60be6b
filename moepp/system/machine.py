"""What a run came from: kept in its result and in its checkpoints."""

import os
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moepp import __version__


@cache
def provenance() -> dict[str, str]:
    """Versions, the source's commit, and the machine."""
    return {
        "moepp": __version__,
        "commit": commit(),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The source's, and whether it had been changed since; "unknown" where it is no clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", ":/moepp", ":/recipes"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with changes" if changes else "")


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new
