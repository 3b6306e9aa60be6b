"""Which source a result came from."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The source's, and whether it had been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", ":/moepp", ":/recipes"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with changes" if changes else "")
