"""Text → batches, as Lightning wants it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from moepp.model.errors import InputError
from moepp.text.batches import Batch, EpochSampler, HeldOutBatches, Part, TrainBatches, TrainOrder, part_of
from moepp.text.litdata_set import GroupedOrder, LitdataSet
from moepp.text.prepare import check_options, check_range, prepare
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import padded_vocab_size


class TokenDataModule(L.LightningDataModule):
    """Batches of tokens (moepp.text.batches), made from text at the first use.

    Args:
        path: what to train on: a corpus list (.yaml), a file (.txt, .md, .jsonl, also .gz or .zst), a folder of
            such files, hf:owner/name, a folder that `moepp prepare` made, or litdata:<folder or bucket> with data
            sets of token ids train/ and val/, and tokenizer.json.
        vocab_size: most tokens in the vocabulary; the model's is this, rounded up to a multiple of 64.
        seq_len: tokens in a sequence.
        batch_size: sequences per device in one forward pass.
        seed: decides the order of the training sequences.
        val_fraction: part of each domain that is held out for validation, in whole documents.
        num_workers: processes that load batches; reading token files is so cheap that 0 is fine.
        out_root: where token files are kept.
        tokenizer: tokenizer.json of another model to make them with, instead of training one on the text.
        allow_other_text: continue a checkpoint that was trained on another text (made with the same tokenizer).
        val_part: held-out text to validate on: all, or of each domain the half to choose options by (tune), or the
            other half, which then says how good they are (report).
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
        tokenizer: str | None = None,
        allow_other_text: bool = False,
        val_part: Part = "all",
    ) -> None:
        super().__init__()
        check_options(vocab_size, val_fraction, "data.")
        check_range("data.seq_len", seq_len, 1, 2**31)
        check_range("data.batch_size", batch_size, 1, 2**31)
        check_range("data.seed", seed, 0, 2**63 - 1)
        check_range("data.num_workers", num_workers, 0, 1024)  # each is a process
        self.path = path
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.out_root = out_root
        self.tokenizer = tokenizer
        self.allow_other_text = allow_other_text
        self.val_part: Part = val_part
        self.computed_order = True  # False in an older run, once its checkpoint is restored
        self.renumbered = 0  # batch n of the order is the trainer's batch n - this
        self.files: TokenFiles  # from setup() on

    def prepare_data(self) -> None:
        """Make the token files, in one process of each machine."""
        self.folder(progress=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the token files.

        Raises:
            InputError: they are damaged, of another vocabulary, or hold less than one batch or no `val_part`.
        """
        files = TokenFiles.open(self.folder(progress=False))
        if files.meta["vocab_size"] > padded_vocab_size(self.vocab_size):
            raise InputError(
                f"{files.path} has a vocabulary of {files.meta['vocab_size']}, more than the model's "
                f"{padded_vocab_size(self.vocab_size)}: set data.vocab_size={files.meta['padded_vocab_size']}"
            )
        part_of(files, self.val_part)  # or why there is none
        self.files = files
        if (tokens := len(files.train)) <= self.seq_len or self.order().batches == 0:
            raise InputError(
                f"{self.path} has {tokens} training tokens, too few for one batch of {self.batch_size} x "
                f"{self.world_size} sequences of {self.seq_len} + 1: give more text, or lower data.batch_size or "
                "data.seq_len"
            )

    def train_dataloader(self) -> DataLoader:
        """One epoch of training batches, from where the trainer stands."""
        batches = TrainBatches(self.files, self.order(), self.rank, self.world_size)
        # a Lightning epoch that ends within an accumulation would take a step on part of it
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        length = max(accumulate, len(batches) // accumulate * accumulate)
        return ResumableLoader(batches, sampler=EpochSampler(length, self.batches_seen), **self.loader_options())

    def last_batches(self, n_tokens: int) -> Iterator[Batch]:
        """This device's share of the training batches just before where the trainer stands, of so many tokens."""
        batches, seen = TrainBatches(self.files, self.order(), self.rank, self.world_size), self.batches_seen()
        n_batches = -(-n_tokens // self.batch_tokens)
        return (batches[n] for n in range(max(0, seen - n_batches), seen))

    def val_dataloader(self) -> DataLoader:
        """Each token of `val_part` as a target exactly once; any number of first batches is a fair sample."""
        place = self.rank, self.world_size
        batches = HeldOutBatches(self.files, self.seq_len, self.batch_size, *place, part=self.val_part)
        return DataLoader(batches, **self.loader_options())

    test_dataloader = val_dataloader  # there is no third part of the text

    def folder(self, progress: bool) -> Path:
        if Path(self.path, "meta.json").is_file():
            return Path(self.path)
        return prepare(self.path, self.vocab_size, self.val_fraction, self.out_root, progress, self.tokenizer)

    def order(self) -> TrainOrder | GroupedOrder:
        train, batch_size = self.files.train, self.batch_size * self.world_size
        if isinstance(train, LitdataSet):
            return GroupedOrder(train.chunks.tokens_C // (self.seq_len + 1), self.seq_len, batch_size, self.seed)
        return TrainOrder(len(train), self.seq_len, batch_size, self.seed, self.computed_order)

    def batches_seen(self) -> int:
        """Of the order, in all epochs."""
        return self.batches_trained + self.renumbered

    @property
    def batches_trained(self) -> int:
        """On, by the trainer's count."""
        if self.trainer is None:
            return 0
        # `processed` counts over all epochs, is restored before loaders are asked for, and does not count a batch
        # that was interrupted. Lightning's epochs play no part in the order.
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed

    def state_dict(self) -> dict[str, int]:
        """How far the text has been read, for whoever goes on with batches of another size."""
        epoch, batch = divmod(self.batches_seen(), self.order().batches)
        return {"batches": self.batches_trained, "epoch": epoch, "tokens_of_epoch": batch * self.batch_tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the text has been read to: nothing of an epoch twice, and less than a batch is left out.
        (Sequences of another length are cut and shuffled anew: of these as many tokens are left out.)"""
        in_epoch = self.order().batches
        batch = -(-state["tokens_of_epoch"] // self.batch_tokens)
        self.renumbered = state["epoch"] * in_epoch + min(batch, in_epoch) - state["batches"]

    def tokens_seen(self) -> int:
        """By all devices."""
        return self.batches_seen() * self.batch_tokens

    @property
    def batch_tokens(self) -> int:
        """Of all devices' micro-batches."""
        return self.batch_size * self.world_size * self.seq_len

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the datasets hand out whole batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class ResumableLoader(DataLoader):
    """Tells Lightning, which would warn otherwise, that this loader continues in the middle of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}  # where it stands is known to the trainer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
