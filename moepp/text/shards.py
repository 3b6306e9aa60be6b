"""A long row of token ids as files of a fixed size, train-00000.bin and on, that are read as one."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moepp.system.files import lasting

SHARD_TOKENS = 1 << 30  # in each file but the last: 2 or 4 GB


class Shards:
    """Token ids of several files, one after the other. Nothing is held: a file is mapped where it is read.

    A map that is kept counts every page it has touched as memory of ours, and would travel to a worker as a copy
    of all tokens instead of a name. To map a file takes some 0.1 ms.

    Args:
        paths: of the files, in order.
        lengths: tokens in each.
        dtype: uint16 or uint32.
    """

    def __init__(self, paths: list[Path], lengths: list[int], dtype: str) -> None:
        self.paths = paths
        self.dtype = np.dtype(dtype)
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """A copy of a stretch, wherever the files meet in it."""
        begin, end, _ = part.indices(len(self))
        touched = np.flatnonzero((self.begins < end) & (self.ends > begin)).tolist()
        pieces = [self.mapped(i)[max(0, begin - self.begins[i]) : end - self.begins[i]] for i in touched]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def windows(self, starts: list[int], length: int) -> np.ndarray:
        """(B, length) int64: so many tokens from each start on."""
        starts_B, windows_BL = np.array(starts), np.empty((len(starts), length), np.int64)
        shard_B = np.searchsorted(self.ends, starts_B, "right")
        across_B = starts_B + length > self.ends[shard_B]
        for i in np.unique(shard_B[~across_B]).tolist():
            rows = np.flatnonzero((shard_B == i) & ~across_B)
            windows_BL[rows] = sliding_window_view(self.mapped(i), length)[starts_B[rows] - self.begins[i]]
        for row in np.flatnonzero(across_B):
            windows_BL[row] = self[starts[row] : starts[row] + length]
        return windows_BL

    def mapped(self, i: int) -> np.memmap:
        return np.memmap(self.paths[i], self.dtype, "r")


def shard_names() -> Iterator[str]:
    return (f"train-{i:05}.bin" for i in count())


def write_shards(paths: Iterator[Path], pieces: Iterable[np.ndarray]) -> None:
    """Write the tokens of all pieces, SHARD_TOKENS into each path but the last."""
    room = 0
    with ExitStack() as stack:
        for piece in pieces:
            while len(piece):
                if room == 0:
                    stack.close()  # the file before is on the disk
                    file, room = stack.enter_context(lasting(next(paths))), SHARD_TOKENS
                file.write(piece[:room].tobytes())
                piece, room = piece[room:], room - len(piece[:room])
