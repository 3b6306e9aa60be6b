"""Token files → batches.

The order of training batches needs no state: batch n is a function of the seed and n alone. So it is the same for
every model that is compared, for any number of workers, and after a resume, where n is the number of batches that
the restored trainer has already seen. An epoch is shuffled by a computed permutation (moepp.text.permutation), so
that a trillion tokens take no memory.

A batch is a dict of `inputs` (B, S) int64, `targets` (B, S) int64, -100 where there is none, and `domain` (B,)
int64, an index into the token files' domains (-1 in training, where a window may cross domains).
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from moepp.model.errors import InputError
from moepp.text.litdata_set import GroupedOrder
from moepp.text.permutation import Permutation
from moepp.text.token_files import TokenFiles

IGNORE = -100  # a target that is none: what torch's cross-entropy ignores

Batch = dict[str, torch.Tensor]
Part = Literal["all", "tune", "report"]  # of the held-out text: a half to choose options by, the other to report


class TrainOrder:
    """Which sequences make up batch n.

    The tokens are cut into windows of S + 1 tokens, S apart, so that an epoch has each token as a target once, but
    for the rest that fills no window or no batch. Each epoch cuts at another place and shuffles anew.

    Args:
        n_tokens: in the token file.
        seq_len: S.
        batch_size: sequences in a batch, over all devices.
        seed: of the shuffling.
        computed: False for the order of runs from before it was computed, which takes 8 bytes a window.
    """

    def __init__(self, n_tokens: int, seq_len: int, batch_size: int, seed: int, computed: bool = True) -> None:
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.computed = computed
        # The cut needs up to S - 1 tokens before the first window. A text of a single window has no such room.
        self.windows = max(1, (n_tokens - seq_len) // seq_len)
        self.phases = min(seq_len, n_tokens - self.windows * seq_len)
        self.batches = self.windows // batch_size  # in an epoch
        self.epoch = -1  # whose cut and shuffling are at hand
        self.phase = 0
        self.shuffled: Callable[[np.ndarray], np.ndarray]

    def __call__(self, n: int) -> list[int]:
        """The first token of each sequence of batch n; counted through all epochs."""
        epoch, batch = divmod(n, self.batches)
        if epoch != self.epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self.epoch, self.phase = epoch, int(rng.integers(self.phases))
            windows = self.windows
            self.shuffled = Permutation(windows, rng) if self.computed else rng.permutation(windows).__getitem__
        windows_B = self.shuffled(np.arange(batch * self.batch_size, (batch + 1) * self.batch_size))
        return (self.phase + self.seq_len * windows_B).tolist()


class TrainBatches(Dataset[Batch]):
    """One device's share of batch n, for any n."""

    def __init__(
        self, files: TokenFiles, order: TrainOrder | GroupedOrder, rank: int = 0, world_size: int = 1
    ) -> None:
        self.files = files
        self.order = order
        share = order.batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.order.batches

    def __getitem__(self, n: int) -> Batch:
        starts = self.order(n)[self.share]
        windows = self.files.train.windows(starts, self.order.seq_len + 1)
        return {
            "inputs": torch.from_numpy(windows[:, :-1].copy()),
            "targets": torch.from_numpy(windows[:, 1:].copy()),
            "domain": torch.full((len(starts),), -1),
        }


class EpochSampler(Sampler[int]):
    """The numbers of so many batches, from where the run stands; it is asked anew for every epoch."""

    def __init__(self, length: int, batches_seen: Callable[[], int]) -> None:
        self.length = length
        self.batches_seen = batches_seen

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.batches_seen()
        return iter(range(first, first + self.length))


def held_out_windows(files: TokenFiles, seq_len: int, part: Part = "all") -> np.ndarray:
    """Windows that have each held-out token as a target once: (W, 3) int64, first token, targets (≤ S), domain."""
    return np.array(
        [
            (start, min(seq_len, end - 1 - start), domain)
            for domain, (begin, end) in enumerate(part_of(files, part))
            for start in range(begin - 1, end - 1, seq_len)  # begin - 1 is an end of text, or of the other half
        ],
        np.int64,
    )


def part_of(files: TokenFiles, part: Part) -> list[tuple[int, int]]:
    """Per domain, begin and end of its tokens in `files.val`. Halves meet where a document ends, if it is not the
    only one.

    Raises:
        InputError: what is held out of a domain cannot be cut in two.
    """
    if part == "all":
        return files.val_ranges
    halves = []
    for domain, (begin, end) in zip(files.domains, files.val_ranges, strict=True):
        if end - begin == 1:
            raise InputError(
                f"data.val_part: of {domain} a single token is held out, which makes no two halves: raise "
                "data.val_fraction, or leave that domain out"
            )
        ends = begin + 1 + np.flatnonzero(files.val[begin : end - 1] == files.end_of_text)
        middle = (begin + end) // 2
        cut = int(ends[np.abs(ends - middle).argmin()]) if len(ends) else middle
        halves.append((begin, cut) if part == "tune" else (cut, end))
    return halves


class HeldOutBatches(Dataset[Batch]):
    """Windows of the held-out text, shuffled over all domains once and for all, so many at a time.

    Of D devices each takes every D-th window. So that all batches have one size, for which a model may have been
    compiled, the last may have empty windows: domain 0 and no target at all.
    """

    def __init__(
        self,
        files: TokenFiles,
        seq_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        part: Part = "all",
    ) -> None:
        self.files = files
        self.seq_len = seq_len
        self.batch_size = batch_size
        windows = held_out_windows(files, seq_len, part)
        shuffled = np.random.Generator(np.random.Philox(key=0)).permutation(windows)
        empty = np.zeros((-len(shuffled) % (batch_size * world_size), 3), np.int64)
        self.windows = np.concatenate([shuffled, empty])[rank::world_size]

    def __len__(self) -> int:
        return len(self.windows) // self.batch_size

    def __getitem__(self, n: int) -> Batch:
        windows = self.windows[n * self.batch_size :][: self.batch_size]
        tokens = self.files.val
        inputs_BS = np.full((len(windows), self.seq_len), self.files.end_of_text, np.int64)
        targets_BS = np.full((len(windows), self.seq_len), IGNORE, np.int64)
        for row, (start, count, _) in enumerate(windows):
            inputs_BS[row, :count] = tokens[start : start + count]
            targets_BS[row, :count] = tokens[start + 1 : start + count + 1]
        return {
            "inputs": torch.from_numpy(inputs_BS),
            "targets": torch.from_numpy(targets_BS),
            "domain": torch.from_numpy(windows[:, 2].copy()),
        }
