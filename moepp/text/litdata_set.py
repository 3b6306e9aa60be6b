"""Token ids that a litdata data set streams, from a folder or a bucket, as training text.

litdata keeps them in chunks, which are fetched whole. An order over all windows would want another chunk for each,
so chunks are shuffled, and windows within GROUP chunks at a time. Windows are as litdata's TokensLoader cuts them:
S + 1 tokens of one chunk, the next S + 1, and so on, the same in every epoch.

litdata's own reader drops a chunk as soon as another is read from and its cache is full. Read in our order it
waits for ever, or for a file that is gone. So litdata finds and fetches; what is dropped is decided here.
"""

import json
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np

from moepp.model.errors import InputError
from moepp.text.permutation import Permutation

GROUP = 8  # chunks that are shuffled together
KEPT = 2 * GROUP  # chunks of a bucket that a process leaves on the disk: 1 GB, if one has 64 MB


class LitdataSet:
    """A data set of token ids that `litdata.optimize` wrote with a TokensLoader. Picklable: it is a name.

    Args:
        path: what litdata calls the input directory: a folder, or `s3://…`, `gs://…` and so on.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def chunks(self) -> "Chunks":
        return opened(self.path, os.getpid())  # a connection does not survive a fork

    def __len__(self) -> int:
        return int(self.chunks.tokens_C.sum())

    def windows(self, windows: list[int], length: int) -> np.ndarray:
        """(B, length) int64: the windows of so many tokens with these numbers, counted through all chunks."""
        windows_C, windows_B = self.chunks.tokens_C // length, np.array(windows)
        ends_C = np.cumsum(windows_C)
        chunk_B = np.searchsorted(ends_C, windows_B, "right")
        tokens_BL = np.empty((len(windows), length), np.int64)
        for chunk in np.unique(chunk_B).tolist():
            rows = np.flatnonzero(chunk_B == chunk)
            tokens_WL = self.chunks[chunk][: windows_C[chunk] * length].reshape(-1, length)
            tokens_BL[rows] = tokens_WL[windows_B[rows] - ends_C[chunk]]  # from the end, backwards
        return tokens_BL


class Chunks:
    """Maps the chunks of a data set, fetches those of a bucket before, and drops them after a while.

    Raises:
        InputError: no such data set.
    """

    def __init__(self, path: str) -> None:
        import litdata  # few have it
        from litdata.constants import _NUMPY_DTYPES_MAPPING, _TORCH_DTYPES_MAPPING
        from litdata.streaming.downloader import get_downloader

        try:
            place = litdata.StreamingDataset(path, item_loader=litdata.TokensLoader(block_size=1)).input_dir
            self.folder = Path(place.path)  # with the index of the bucket by now, and its chunks later
            self.index_json = (self.folder / "index.json").read_text(encoding="utf-8")
            index = json.loads(self.index_json)
            if index["config"]["compression"]:
                raise ValueError("it is compressed: write it without compression")
            self.chunks = index["chunks"]
            self.tokens_C = np.array([chunk["dim"] for chunk in self.chunks], np.int64)
            kind, _, number = index["config"]["data_format"][0].partition(":")
            dtypes = {"no_header_tensor": _TORCH_DTYPES_MAPPING, "no_header_numpy": _NUMPY_DTYPES_MAPPING}[kind]
            self.dtype = np.dtype(str(dtypes[int(number)]).removeprefix("torch."))
            self.fetch = None
            if place.url:
                self.fetch = get_downloader(place.url, place.path, self.chunks).download_chunk_from_index
        except Exception as error:  # whatever litdata, a bucket or the network come up with
            why = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"litdata: {path} cannot be opened as a data set of token ids, which litdata.optimize writes "
                f"with a TokensLoader ({why})"
            ) from error
        self.last_used: dict[int, Path] = {}  # in that order

    def __getitem__(self, chunk: int) -> np.ndarray:
        """(tokens,) of one chunk."""
        path = self.folder / self.chunks[chunk]["filename"]
        header = 4 * (2 + self.chunks[chunk]["chunk_size"])  # how many items, and where each begins and ends
        while True:
            if self.fetch and not path.exists():
                self.fetch(chunk)
            try:
                tokens = np.memmap(path, self.dtype, "r", header, (int(self.tokens_C[chunk]),))
                break
            except FileNotFoundError:
                if not self.fetch:
                    raise
                time.sleep(0.02)  # another process is fetching it, or has just dropped it
        if self.fetch:
            self.last_used.pop(chunk, None)
            self.last_used[chunk] = path
            for old in [*self.last_used][:-KEPT]:
                self.last_used.pop(old).unlink(missing_ok=True)  # whoever has it mapped keeps it
        return tokens


@lru_cache(maxsize=4)
def opened(path: str, process: int) -> Chunks:
    return Chunks(path)


class GroupedOrder:
    """Which windows make up batch n: a function of the seed and n, as `moepp.text.batches.TrainOrder` is.

    An epoch has each window once, but for the rest that fills no batch. A permutation of the chunks is cut into
    groups of GROUP, and the windows of a group are permuted.

    Args:
        windows_C: in each chunk.
        seq_len: S.
        batch_size: windows in a batch, over all devices.
        seed: of the shuffling.
    """

    def __init__(self, windows_C: np.ndarray, seq_len: int, batch_size: int, seed: int) -> None:
        self.windows_C = windows_C
        self.first_C = np.cumsum(windows_C) - windows_C
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.batches = int(windows_C.sum()) // batch_size  # in an epoch

    def __call__(self, n: int) -> list[int]:
        """The windows of batch n; counted through all epochs."""
        epoch, batch = divmod(n, self.batches)
        chunks_C = Permutation(len(self.windows_C), self.draws(epoch, 0))(np.arange(len(self.windows_C)))
        begins = np.arange(0, len(chunks_C), GROUP)
        ends_G = np.cumsum(np.add.reduceat(self.windows_C[chunks_C], begins))
        places_B = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        group_B = np.searchsorted(ends_G, places_B, "right")
        return np.concatenate(
            [
                self.shuffled(chunks_C[begins[g] :][:GROUP], places_B[group_B == g] - ends_G[g], epoch, g)
                for g in np.unique(group_B).tolist()
            ]
        ).tolist()

    def shuffled(self, chunks: np.ndarray, places: np.ndarray, epoch: int, group: int) -> np.ndarray:
        """The windows of a group at these places of its order, counted from its end backwards as -1, -2, …"""
        ends = np.cumsum(self.windows_C[chunks])
        moved = Permutation(int(ends[-1]), self.draws(epoch, group + 1))(places + ends[-1])
        chunk = np.searchsorted(ends, moved, "right")
        return self.first_C[chunks[chunk]] + moved - (ends - self.windows_C[chunks])[chunk]

    def draws(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(counter=[0, 0, 0, stream], key=[self.seed, epoch]))
