"""`python -m tests.bench`, what `make bench` calls."""

import os
import sys

from moepp.cli import one_line_errors


def main(arguments: list[str]) -> int:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `moepp` does, before torch is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of memory from before it

    def run() -> None:
        from moepp.system.lean import import_lightning

        import_lightning()
        from tests.bench import command

        command.run(arguments)

    return one_line_errors("bench", run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
