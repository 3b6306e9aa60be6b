"""The DataModule: workers, resuming through a real Trainer, bad input."""

import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moepp.model.errors import InputError
from moepp.text.batches import HeldOutBatches
from moepp.text.data_module import TokenDataModule
from moepp.text.token_files import TokenFiles
from tests.text.conftest import one_line, oracle

S, B = 16, 4


def module(folder: str, **options: object) -> TokenDataModule:
    options = {"path": folder, "vocab_size": 290, "seq_len": S, "batch_size": B} | options
    return TokenDataModule(**options)  # type: ignore[arg-type]


def opened(folder: str, **options: object) -> TokenDataModule:
    data = module(folder, **options)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_hand_out_the_batches(folder: str, workers: int) -> None:
    data = opened(folder, seed=7, num_workers=workers)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) > 5
    for n, batch in enumerate(batches):
        inputs, targets = oracle(data.files.train[:], 7, n, S, B)
        assert batch["inputs"].numpy().tolist() == inputs.tolist()
        assert batch["targets"].numpy().tolist() == targets.tolist()
    val = HeldOutBatches(data.files, S, B)
    loaded = list(data.val_dataloader())
    assert len(loaded) == len(val) == len(data.test_dataloader())
    for n, batch in enumerate(loaded):
        assert all(torch.equal(batch[key], val[n][key]) for key in ("inputs", "targets", "domain"))


def test_devices_have_shares(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices with batches of 4 see together what one device with batches of 8 sees."""
    whole = list(opened(folder, batch_size=8).train_dataloader())
    parts = []
    monkeypatch.setattr(TokenDataModule, "world_size", 2)
    for rank in range(2):
        monkeypatch.setattr(TokenDataModule, "rank", rank)
        data = opened(folder)
        parts.append(list(data.train_dataloader()))
        assert next(iter(data.val_dataloader()))["inputs"].shape == (B, S)
        assert len(data.val_dataloader()) == len(HeldOutBatches(data.files, S, B, rank, 2))
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for n, batch in enumerate(whole):
        assert torch.equal(batch["inputs"], torch.cat([parts[0][n]["inputs"], parts[1][n]["inputs"]]))


def test_first_validation_batches_mix_domains_and_do_not_depend_on_the_seed(folder: str) -> None:
    first = next(iter(opened(folder, seed=0, batch_size=12).val_dataloader()))
    again = next(iter(opened(folder, seed=1, batch_size=12).val_dataloader()))
    assert set(first["domain"].tolist()) == {0, 1, 2}
    assert torch.equal(first["inputs"], again["inputs"])


# ---- through a Trainer -----------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Learns nothing much and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(hashlib.sha256(batch["inputs"].numpy().tobytes()).hexdigest())
        return self.weight * batch["targets"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(
    data: TokenDataModule,
    steps: int,
    root: Path,
    resume: Path | None = None,
    every: int | None = 1,
    **options: Any,
) -> tuple[list[str], Path]:
    """Train up to `steps`, with a checkpoint every so many of them (None: after validation).

    Returns:
        the batches, and the newest checkpoint.
    """
    model = Recorder()
    keep = ModelCheckpoint(root, filename="{step}", save_last=True, every_n_train_steps=every, save_top_k=-1)
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"num_sanity_val_steps": 0, "use_distributed_sampler": False, "default_root_dir": root}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[keep], **options)
    trainer.fit(model, data, ckpt_path=resume, weights_only=False if resume else None)
    return model.seen, root / "last.ckpt"


def expected(folder: str, batches: int) -> list[str]:
    tokens = TokenFiles.open(folder).train[:]
    return [hashlib.sha256(oracle(tokens, 0, n, S, B)[0].tobytes()).hexdigest() for n in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", ["middle", "end", "second"])
def test_resumed_run_sees_the_same_batches(folder: str, tmp_path: Path, stop: str, workers: int) -> None:
    """Stopped in the middle of the first epoch, at its end, and in the middle of the second."""
    epoch = len(opened(folder).train_dataloader())
    at, steps = {"middle": epoch // 2, "end": epoch, "second": epoch + 2}[stop], 2 * epoch + 3
    whole = expected(folder, steps)
    assert len(set(whole)) == steps
    first, checkpoint = run(module(folder, num_workers=workers), at, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second, _ = run(module(folder, num_workers=workers), steps, tmp_path / "b", checkpoint)
    assert first == whole[:at]
    assert second == whole[at:]
    assert not [w for w in caught if "not resumable" in str(w.message)]


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 5},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
    ],
)
def test_other_settings_do_not_disturb_the_order(folder: str, tmp_path: Path, options: dict[str, int]) -> None:
    per_step = options.get("accumulate_grad_batches", 1)
    first, checkpoint = run(module(folder), 7, tmp_path, **options)
    second, _ = run(module(folder), 16, tmp_path / "b", checkpoint, **options)
    epoch = len(opened(folder).train_dataloader())
    if per_step == 1:
        assert first + second == expected(folder, 16)
    else:  # an epoch with an odd number of batches ends with a step on one
        assert first + second == expected(folder, len(first + second))
        assert 2 * 16 - 2 * 16 // epoch - 2 <= len(first + second) <= 2 * 16


@pytest.mark.parametrize("other", [1, 3, 2 * B])
@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_of_another_size_go_on_with_the_text(folder: str, tmp_path: Path, other: int, epoch: int) -> None:
    """Nothing of an epoch is seen twice, less than a batch of it left out; also where the size changes again."""
    tokens = TokenFiles.open(folder).train[:]

    def batches(size: int, first: int, n: int) -> list[str]:
        """So many, from this batch of the epoch on."""
        n_before = epoch * len(opened(folder, batch_size=size).train_dataloader()) + first
        wanted = (oracle(tokens, 0, n_before + i, S, size)[0] for i in range(n))
        return [hashlib.sha256(inputs_BS.tobytes()).hexdigest() for inputs_BS in wanted]

    step = epoch * len(opened(folder).train_dataloader())
    _, checkpoint = run(module(folder), step + 5, tmp_path)
    seen, checkpoint = run(module(folder, batch_size=other), step + 7, tmp_path / "other", checkpoint)
    first = math.ceil(5 * B / other)
    assert seen == batches(other, first, 2)
    seen, _ = run(module(folder), step + 8, tmp_path / "again", checkpoint)
    assert seen == batches(B, math.ceil((first + 2) * other / B), 1)


def test_resume_from_a_checkpoint_after_validation(folder: str, tmp_path: Path) -> None:
    """Those of the middle of an epoch, of its end, and of the next: three states of Lightning's counters."""
    epoch = len(opened(folder).train_dataloader())
    assert epoch % 2 == 0
    run(module(folder), epoch + 2, tmp_path, every=None, val_check_interval=2)
    for step in (2, epoch - 2, epoch, epoch + 2):
        checkpoint = tmp_path / f"step={step}.ckpt"
        seen, _ = run(module(folder), 2 * epoch, tmp_path / str(step), checkpoint, val_check_interval=2)
        assert seen == expected(folder, 2 * epoch)[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_overfit_batches_sees_the_same_batches_every_epoch(folder: str, tmp_path: Path, workers: int) -> None:
    seen, _ = run(module(folder, num_workers=workers), 6, tmp_path, overfit_batches=2)
    assert seen == 3 * expected(folder, 2)


def test_resume_after_a_crash_inside_a_step(folder: str, tmp_path: Path) -> None:
    """The batch that was being worked on is seen again."""

    class Crash(Recorder):
        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            if len(self.seen) == 4:
                self.trainer.save_checkpoint(tmp_path / "crash.ckpt")
                raise RuntimeError("power cut")
            return loss

    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=9, enable_checkpointing=False, **quiet)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(Crash(), module(folder))
    second, _ = run(module(folder), 9, tmp_path / "b", tmp_path / "crash.ckpt")
    assert second == expected(folder, 9)[3:]


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 256),
        ("seq_len", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("num_workers", -1),
        ("num_workers", 10**6),
        ("seed", 2**63),
        ("vocab_size", 10**12),
        ("seq_len", None),  # what ${model.transformer.context_length} is, where a recipe leaves it empty
    ],
)
def test_impossible_arguments(folder: str, key: str, value: float | None) -> None:
    with pytest.raises(InputError) as error:
        module(folder, **{key: value})
    one_line(error, f"data.{key}: must", f"got {value}")


def test_text_shorter_than_a_sequence_or_a_batch(folder: str) -> None:
    tokens = len(TokenFiles.open(folder).train)
    opened(folder, seq_len=tokens - 1, batch_size=1)
    with pytest.raises(InputError) as error:
        opened(folder, seq_len=tokens, batch_size=1)
    one_line(error, f"{tokens} training tokens", f"1 x 1 sequences of {tokens} + 1", "data.seq_len")
    with pytest.raises(InputError) as error:
        opened(folder, seq_len=16, batch_size=10_000)
    one_line(error, f"{tokens} training tokens", "one batch of 10000 x 1 sequences of 16", "data.batch_size")


def test_prepared_folder_of_another_vocabulary(folder: str, tmp_path: Path) -> None:
    opened(folder, vocab_size=8192)  # a row that no token needs does no harm
    larger = shutil.copytree(folder, tmp_path / "larger")
    meta = json.loads((larger / "meta.json").read_text()) | {"vocab_size": 321, "padded_vocab_size": 384}
    (larger / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError) as error:
        opened(str(larger), vocab_size=320)
    one_line(error, "vocabulary of 321, more than the model's 320", "data.vocab_size=384")


def test_held_out_text_that_makes_no_two_halves(folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    begin, _ = meta["domains"]["b"]["val_range"]
    for tokens in (0, 2):  # a domain may have none, and then has none in either half
        meta["domains"]["b"]["val_range"] = [begin, begin + tokens]
        (copy / "meta.json").write_text(json.dumps(meta))
        for part in ("tune", "report"):
            assert len(opened(str(copy), val_part=part).val_dataloader()) > 0
    meta["domains"]["b"]["val_range"] = [begin, begin + 1]
    (copy / "meta.json").write_text(json.dumps(meta))
    opened(str(copy))
    with pytest.raises(InputError) as error:
        opened(str(copy), val_part="report")
    one_line(error, "data.val_part: of b a single token", "data.val_fraction")


def test_truncated_token_file(folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "val.bin").write_bytes((copy / "val.bin").read_bytes()[:-2])
    with pytest.raises(InputError) as error:
        opened(str(copy))
    one_line(error, "val.bin", "cut off")


def test_text_is_prepared_at_first_use(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("A line of text, and another.\n\n" * 400)
    data = opened(str(tmp_path / "my.txt"), out_root=str(tmp_path / "out"))
    assert data.files.path.parent == tmp_path / "out"
    assert data.files.domains == ["my"]
    assert next(iter(data.train_dataloader()))["inputs"].shape == (B, S)
    assert len(data.test_dataloader()) == len(data.val_dataloader()) > 0
