"""Token ids that litdata streams: the same guarantees as token files."""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moepp.cli import main
from moepp.model.errors import InputError
from moepp.text.batches import TrainBatches
from moepp.text.data_module import TokenDataModule
from moepp.text.litdata_set import GROUP, GroupedOrder, LitdataSet
from moepp.text.prepare import prepare
from moepp.text.token_files import TokenFiles
from tests.conftest import tiny
from tests.text.conftest import make, one_line, permuted, write_text
from tests.text.test_data_module import run

os.environ.setdefault("LITDATA_CACHE_DIR", f"{tempfile.gettempdir()}/moepp-litdata")  # litdata reads it once
S, B = 16, 4
WINDOWS_C = np.array([5, 0, 9, 1, 7, 7, 3, 8, 2, 6, 4, 9, 9, 1, 5, 5, 2, 8, 0, 3])


# ---- the order, which needs no litdata -------------------------------------------------------------------------


def grouped(n: int, seed: int, batch: int) -> list[int]:
    """Batch n, written as plainly as possible: all windows of the epoch in a list."""
    epoch, i = divmod(n, int(WINDOWS_C.sum()) // batch)

    def keys(stream: int) -> list[int]:
        rng = np.random.Generator(np.random.Philox(counter=[0, 0, 0, stream], key=[seed, epoch]))
        return rng.integers(1 << 64, size=12, dtype=np.uint64).tolist()

    chunks = [permuted(c, len(WINDOWS_C), keys(0)) for c in range(len(WINDOWS_C))]
    order = []
    for g in range(0, len(chunks), GROUP):
        windows = [sum(WINDOWS_C[:c]) + w for c in chunks[g : g + GROUP] for w in range(WINDOWS_C[c])]
        order += [windows[permuted(w, len(windows), keys(g // GROUP + 1))] for w in range(len(windows))]
    return [int(window) for window in order[i * batch : (i + 1) * batch]]


@pytest.mark.parametrize("batch", [1, 4, 25, 94])
def test_order_is_that_of_the_oracle_in_whatever_order_one_asks(batch: int) -> None:
    order = GroupedOrder(WINDOWS_C, S, batch, seed=3)
    assert order.batches == 94 // batch
    for n in (0, 2 * order.batches, order.batches - 1, order.batches, 1, 0):
        assert order(n) == grouped(n, 3, batch)


def test_an_epoch_has_each_window_once_and_few_chunks_at_a_time() -> None:
    order = GroupedOrder(np.full(100, 50), S, 20, seed=0)
    epochs = [[order(n) for n in range(e * order.batches, (e + 1) * order.batches)] for e in range(2)]
    for epoch in epochs:
        assert sorted(window for batch in epoch for window in batch) == list(range(5000))
        for n in range(0, order.batches - 10, 20):  # a group after the other: 400 windows, 20 batches
            assert len({window // 50 for batch in epoch[n : n + 20] for window in batch}) == GROUP
    assert epochs[0] != epochs[1]
    assert order(0) != GroupedOrder(np.full(100, 50), S, 20, seed=1)(0)


# ---- a data set ------------------------------------------------------------------------------------------------


def write_set(folder: Path, documents: list[np.ndarray]) -> None:
    """What litdata.optimize writes with a TokensLoader and one worker."""
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_size=256, item_loader=litdata.TokensLoader())
    for i, document in enumerate(documents):
        cache._add_item(i, torch.from_numpy(document.astype(np.uint16)))
    cache.done()
    cache.merge(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TokenFiles:
    """Token files of one domain, to compare with."""
    root = tmp_path_factory.mktemp("files")
    write_text(root / "text", {"all": 100})
    return TokenFiles.open(make(root, val_fraction=0.1, vocab_size=290))


@pytest.fixture(scope="module")
def root(files: TokenFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as litdata has it."""
    root = tmp_path_factory.mktemp("litdata") / "words"
    for part, tokens in (("train", files.train[1:]), ("val", files.val[1:])):
        ends = np.flatnonzero(tokens == files.end_of_text) + 1
        write_set(root / part, np.split(tokens, ends[:-1]))
    shutil.copy(files.path / "tokenizer.json", root)
    return root


def opened(path: str, tmp_path: Path, **options: object) -> TokenDataModule:
    options = {"seq_len": S, "batch_size": B, "vocab_size": 290, "out_root": str(tmp_path / "out")} | options
    data = TokenDataModule(path, **options)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


def windows_of(root: Path, files: TokenFiles) -> list[list[int]]:
    """Chunk by chunk, S + 1 tokens at a time."""
    chunks = json.loads((root / "train" / "index.json").read_text())["chunks"]
    assert len(chunks) > 2 * GROUP
    parts = np.split(files.train[1:], np.cumsum([chunk["dim"] for chunk in chunks]))
    return [part[i : i + S + 1].tolist() for part in parts for i in range(0, len(part) - S, S + 1)]


def test_held_out_text_is_that_of_the_data_set(root: Path, files: TokenFiles, tmp_path: Path) -> None:
    data = opened(f"litdata:{root}", tmp_path)
    assert data.files.val.tolist() == files.val.tolist()
    assert data.files.domains == ["words"]
    train, val = (data.files.meta["domains"]["words"][part] for part in ("train", "val"))
    assert train == {"documents": 0, "bytes": 0, "tokens": len(files.train) - 1}
    assert val == files.meta["domains"]["all"]["val"]
    assert data.files.bytes_per_letter.tolist() == [1.0]
    columns = [list(column.cells) for column in data.files.describe().columns]
    assert columns[6][-1] == f"{val['bytes'] / val['tokens']:.2f}"
    assert prepare(f"litdata:{root}", out_root=str(tmp_path / "out")) == data.files.path  # the second time
    assert data.files.path.name.startswith("words-v290-")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["", "local:"])  # to litdata a folder after local: is a bucket: it is fetched
def test_batches_are_those_windows(
    root: Path, files: TokenFiles, tmp_path: Path, where: str, workers: int
) -> None:
    windows = windows_of(root, files)
    options = {"tokenizer": str(root / "tokenizer.json"), "num_workers": workers, "seed": 5}
    data = opened(f"litdata:{where}{root}", tmp_path, **options)
    seen: Counter[tuple[int, ...]] = Counter()
    loaded = list(data.train_dataloader())
    assert len(loaded) == len(windows) // B > 20
    order = data.order()
    for n, batch in enumerate(loaded):
        expected = [windows[i] for i in order(n)]
        assert batch["inputs"].tolist() == [window[:-1] for window in expected]
        assert batch["targets"].tolist() == [window[1:] for window in expected]
        assert batch["domain"].tolist() == [-1] * B
        seen.update(map(tuple, expected))
    assert sum((Counter(map(tuple, windows)) - seen).values()) == len(windows) % B


def test_chunks_of_a_bucket_are_fetched_once_an_epoch_and_dropped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text may be larger than the disk. Another process that drops a chunk too early costs a fetch, no more."""
    monkeypatch.setattr("moepp.text.litdata_set.KEPT", 10)
    bucket = LitdataSet(f"local:{root}/train")
    opened_before = bucket.chunks
    for path in opened_before.folder.glob("*.bin"):
        path.unlink()
    fetched: list[int] = []
    fetch = opened_before.fetch
    monkeypatch.setattr(opened_before, "fetch", lambda chunk: (fetched.append(chunk), fetch(chunk)))
    order = GroupedOrder(opened_before.tokens_C // (S + 1), S, B, seed=0)
    here = LitdataSet(f"{root}/train")
    for n in range(order.batches):
        assert bucket.windows(order(n), S + 1).tolist() == here.windows(order(n), S + 1).tolist()
        assert len(list(opened_before.folder.glob("*.bin"))) <= 10
    assert len(fetched) == len(set(fetched)) > 2 * GROUP
    for path in opened_before.folder.glob("*.bin"):
        path.unlink()
    assert bucket.windows(order(0), S + 1).tolist() == here.windows(order(0), S + 1).tolist()


def test_devices_share_a_batch(root: Path, tmp_path: Path) -> None:
    data = opened(f"litdata:{root}", tmp_path)
    whole, *parts = (TrainBatches(data.files, data.order(), *place) for place in ((0, 1), (0, 2), (1, 2)))
    for n in range(len(whole)):
        assert torch.equal(whole[n]["inputs"], torch.cat([part[n]["inputs"] for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_sees_the_same_batches(root: Path, tmp_path: Path, workers: int) -> None:
    def data() -> TokenDataModule:
        return opened(f"litdata:{root}", tmp_path, num_workers=workers)

    epoch = len(data().train_dataloader())
    whole, _ = run(data(), epoch + 9, tmp_path / "a")
    assert len(set(whole)) == epoch + 9
    for at in (7, epoch + 4):
        first, checkpoint = run(data(), at, tmp_path / str(at))
        second, _ = run(data(), epoch + 9, tmp_path / f"{at}b", checkpoint)
        assert first + second == whole


def test_a_model_trains_and_goes_on(root: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny(root), f"--data.path=litdata:{root}", "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert "step 4/4" in capsys.readouterr().out


# ---- bad input -------------------------------------------------------------------------------------------------


def test_without_litdata_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    shutil.copy(Path(folder, "tokenizer.json"), tmp_path)
    assert main(["prepare", f"litdata:{tmp_path}", f"--out_root={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.strip() == "moepp prepare: needs litdata: pip install 'moepp[litdata]'"


def test_bad_sets(root: Path, files: TokenFiles, tmp_path: Path) -> None:
    def refused(path: Path, *parts: str, **options: object) -> None:
        with pytest.raises(InputError) as error:
            opened(f"litdata:{path}", tmp_path, **options)
        one_line(error, *parts)

    refused(tmp_path / "none", "there is no", "none/tokenizer.json", "data.tokenizer")
    no_train = Path(shutil.copytree(root, tmp_path / "no_train"))
    shutil.rmtree(no_train / "train")
    refused(no_train, "no_train/train cannot be opened as a data set of token ids")
    no_index = Path(shutil.copytree(root, tmp_path / "no_index"))
    (no_index / "val" / "index.json").unlink()
    refused(no_index, "no_index/val cannot be opened as a data set of token ids")
    damaged = Path(shutil.copytree(root, tmp_path / "damaged"))
    (damaged / "train" / "index.json").write_text("{")
    refused(damaged, "damaged/train cannot be opened as a data set of token ids")
    other = Path(shutil.copytree(root, tmp_path / "other"))
    write_text(tmp_path / "text", {"all": 20})
    few = make(tmp_path, vocab_size=260)
    refused(other, "/val has a token 2", "ends with 259", "data.tokenizer", tokenizer=str(few / "tokenizer.json"))
    chunks = json.loads((root / "train" / "index.json").read_text())["chunks"]
    for n in (0, (len(chunks) - 1) // 2, -1):
        foreign = Path(shutil.copytree(root, tmp_path / f"foreign{n}"))
        chunk = foreign / "train" / chunks[n]["filename"]
        chunk.write_bytes(chunk.read_bytes()[:-2] + b"\xff\xff")
        refused(foreign, "/train has a token 65535", "data.tokenizer")
    refused(root, "training tokens, too few for one batch of 4", seq_len=1000)
