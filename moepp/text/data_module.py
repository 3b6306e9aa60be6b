"""Token files → batches.

The order of training batches needs no state: batch ``n`` is a function of the seed and ``n`` alone. So it is the
same for every model that is compared, for any number of workers, and after a resume, where ``n`` is the number of
batches that the restored trainer has already seen.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moepp.model.errors import InputError
from moepp.text.prepare import prepare
from moepp.text.token_files import END_OF_TEXT_ID, MOST_TOKENS, TokenFiles, padded_vocab_size

IGNORE = -100  # a target that is none: what torch's cross-entropy ignores

Batch = dict[str, torch.Tensor]


class TokenDataModule(L.LightningDataModule):
    """Batches of tokens, made from text at the first use.

    A batch is a dict of ``inputs`` (B, S) int64, ``targets`` (B, S) int64, -100 where there is none, and
    ``domain`` (B,) int64, an index into ``files.domains`` (-1 in training, where a window may cross domains).

    Args:
        path: what to train on: a corpus list (.yaml), a file (.txt, .md, .jsonl, also .gz or .zst), a folder of
            such files, hf:owner/name, or a folder that `moepp prepare` made.
        vocab_size: tokens in the vocabulary; the model's is this, rounded up to a multiple of 64.
        seq_len: tokens in a sequence.
        batch_size: sequences per device in one forward pass.
        seed: decides the order of the training sequences.
        val_fraction: part of each domain that is held out for validation, in whole documents.
        num_workers: processes that load batches; reading token files is so cheap that 0 is fine.
        out_root: where token files are kept.
        allow_other_text: continue a checkpoint that was trained on another text (made with the same tokenizer).
    """

    def __init__(
        self,
        path: str = "data/corpus.yaml",
        vocab_size: int = 8192,
        seq_len: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        val_fraction: float = 0.02,
        num_workers: int = 0,
        out_root: str = "data/prepared",
        allow_other_text: bool = False,
    ) -> None:
        super().__init__()
        ranges = {
            "vocab_size": (vocab_size, 257, MOST_TOKENS),
            "seq_len": (seq_len, 1, 2**31),
            "batch_size": (batch_size, 1, 2**31),
            "seed": (seed, 0, 2**63 - 1),
            "num_workers": (num_workers, 0, 1024),  # each is a process
        }
        for name, (value, least, most) in ranges.items():
            if type(value) is not int:  # what ${…} in a recipe stands for has not been through the parser
                raise InputError(f"data.{name} must be a whole number, not {value!r}")
            if value < least:
                raise InputError(f"data.{name} must be at least {least}, not {value}")
            if value > most:
                raise InputError(f"data.{name} must be at most {most}, not {value}")
        if not 0 < val_fraction < 1:
            raise InputError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        self.path = path
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.out_root = out_root
        self.allow_other_text = allow_other_text
        self.files: TokenFiles  # from setup() on

    def prepare_data(self) -> None:
        """Make the token files, in one process of each machine."""
        self._folder(progress=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the token files.

        Raises:
            InputError: they are damaged, of another vocabulary, or hold less than one batch.
        """
        files = TokenFiles.open(self._folder(progress=False))
        if files.meta["padded_vocab_size"] != padded_vocab_size(self.vocab_size):
            raise InputError(
                f"{files.path} was made for a vocabulary of {files.meta['padded_vocab_size']}, not of "
                f"{padded_vocab_size(self.vocab_size)}: set data.vocab_size={files.meta['padded_vocab_size']}"
            )
        self.files = files
        tokens, windows = len(files.train), (len(files.train) - 1) // self.seq_len
        if windows == 0:
            raise InputError(
                f"{self.path} has {tokens} training tokens, fewer than one sequence of {self.seq_len} + 1: "
                "give more text or lower data.seq_len"
            )
        if self._order().batches == 0:
            raise InputError(
                f"{self.path} has {tokens} training tokens, too few for one batch of {self.batch_size} x "
                f"{self._world_size} sequences of {self.seq_len}: give more text or lower data.batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """One epoch of training batches, from where the trainer stands."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        return _ResumableLoader(
            _TrainWindows(self.files.train, self.seq_len),
            batch_sampler=_TrainBatches(
                self._order(), self._rank, self.batch_size, self._batches_seen, accumulate
            ),
            **self._loader_options(),
        )

    def val_dataloader(self) -> DataLoader:
        """Each validation token as a target exactly once; any number of first batches is a fair sample."""
        windows = _ValWindows(self.files, self.seq_len, self._rank, self._world_size)
        return DataLoader(windows, batch_size=self.batch_size, **self._loader_options())

    def test_dataloader(self) -> DataLoader:
        """The validation batches: there is no third part of the text."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Refuse a token that the embedding has no row for: a GPU would only say that some assertion failed.

        Raises:
            InputError: the token files are damaged.
        """
        largest = int(max(batch["inputs"].max(), batch["targets"].max()))
        if largest >= self.files.meta["padded_vocab_size"]:
            raise InputError(
                f"{self.files.path} is damaged: it holds token {largest}, and its vocabulary ends at "
                f"{self.files.meta['padded_vocab_size'] - 1}; delete the folder and prepare the text anew"
            )
        return batch

    def _folder(self, progress: bool) -> Path:
        if Path(self.path, "meta.json").is_file():
            return Path(self.path)
        return prepare(self.path, self.vocab_size, self.val_fraction, self.out_root, progress)

    def _order(self) -> "TrainOrder":
        sequences = self.batch_size * self._world_size
        return TrainOrder(len(self.files.train), self.seq_len, sequences, self.seed)

    def _batches_seen(self) -> int:
        if self.trainer is None:
            return 0
        # `processed` counts over all epochs, is restored before loaders are asked for, and does not count a batch
        # that was interrupted. Lightning's epochs play no part in the order.
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": _as_it_is,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


# ---- training ----------------------------------------------------------------------------------------------


class TrainOrder:
    """Which sequences make up batch ``n``.

    The tokens are cut into windows of S + 1 tokens, S apart, so that an epoch has each token as a target once, but
    for the rest that fills no window or no batch. Each epoch cuts at another place and shuffles anew.

    Args:
        n_tokens: in the token file.
        seq_len: S.
        batch_size: sequences in a batch, over all devices.
        seed: of the shuffling.
    """

    def __init__(self, n_tokens: int, seq_len: int, batch_size: int, seed: int) -> None:
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        # The cut needs up to S - 1 tokens before the first window. A text of a single window has no such room.
        self.windows = max(1, (n_tokens - seq_len) // seq_len)
        self.phases = min(seq_len, n_tokens - self.windows * seq_len)
        self.batches = self.windows // batch_size  # in an epoch
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def __call__(self, n: int) -> list[int]:
        """The first token of each sequence of batch ``n``; counted through all epochs."""
        epoch, batch = divmod(n, self.batches)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._starts = rng.integers(self.phases) + self.seq_len * rng.permutation(self.windows)
            self._epoch = epoch
        return self._starts[batch * self.batch_size :][: self.batch_size].tolist()


class _TrainBatches(Sampler[list[int]]):
    """One device's share of the batches. Asks where to begin each time that it is iterated over."""

    def __init__(
        self, order: TrainOrder, rank: int, batch_size: int, batches_seen: Callable[[], int], multiple: int = 1
    ) -> None:
        self.order = order
        # a Lightning epoch that ends within an accumulation would take a step on part of it
        self.length = max(multiple, order.batches // multiple * multiple)
        self.share = slice(rank * batch_size, (rank + 1) * batch_size)
        self.batches_seen = batches_seen

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        first = self.batches_seen()
        for n in range(first, first + len(self)):
            yield self.order(n)[self.share]


class _ResumableLoader(DataLoader):
    """Tells Lightning, which would warn otherwise, that this loader continues in the middle of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}  # where it stands is known to the trainer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _TrainWindows(Dataset[Batch]):
    """Indexed by the first token of a window."""

    def __init__(self, tokens: np.memmap, seq_len: int) -> None:
        self.tokens = _Tokens(tokens)
        self.seq_len = seq_len

    def __getitems__(self, starts: list[int]) -> Batch:
        tokens = self.tokens.open()
        windows = np.stack([tokens[start : start + self.seq_len + 1] for start in starts]).astype(np.int64)
        return {
            "inputs": torch.from_numpy(windows[:, :-1].copy()),
            "targets": torch.from_numpy(windows[:, 1:].copy()),
            "domain": torch.full((len(starts),), -1),
        }


# ---- validation --------------------------------------------------------------------------------------------


class _ValWindows(Dataset[Batch]):
    """Windows of each domain in turn, shuffled over all domains once and for all.

    Of W devices each takes every W-th window. To have as many as the others, a device may get an empty window:
    domain 0 and no target at all.
    """

    def __init__(self, files: TokenFiles, seq_len: int, rank: int = 0, world_size: int = 1) -> None:
        self.tokens = _Tokens(files.val)
        self.seq_len = seq_len
        windows = [  # (first token, how many targets, domain)
            (start, min(seq_len, end - 1 - start), domain)
            for domain, (begin, end) in enumerate(files.val_ranges)
            for start in range(begin - 1, end - 1, seq_len)  # begin - 1 is <|endoftext|>
        ]
        shuffled = np.random.Generator(np.random.Philox(key=0)).permutation(np.array(windows, np.int64))
        empty = np.zeros((-len(windows) % world_size, 3), np.int64)
        self.windows = np.concatenate([shuffled, empty])[rank::world_size]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: list[int]) -> Batch:
        tokens = self.tokens.open()
        inputs = np.full((len(indices), self.seq_len), END_OF_TEXT_ID, np.int64)
        targets = np.full((len(indices), self.seq_len), IGNORE, np.int64)
        for row, (start, count, _) in enumerate(self.windows[indices]):
            inputs[row, :count] = tokens[start : start + count]
            targets[row, :count] = tokens[start + 1 : start + count + 1]
        return {
            "inputs": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "domain": torch.from_numpy(self.windows[indices, 2]),
        }


class _Tokens:
    """Maps a token file anew for each batch, which costs microseconds: a map that is kept counts every page it has
    touched as memory of ours, and would travel to a worker as a copy of all tokens instead of a name."""

    def __init__(self, tokens: np.memmap) -> None:
        self.name = str(tokens.filename)
        self.dtype = tokens.dtype

    def open(self) -> np.memmap:
        return np.memmap(self.name, self.dtype, "r")


def _as_it_is(batch: Batch) -> Batch:
    """Collate nothing: the datasets return whole batches."""
    return batch
