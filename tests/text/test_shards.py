"""Token files in shards are read as one, and nothing of them is held."""

import json
from pathlib import Path

import numpy as np
import pytest

from moepp.model.errors import InputError
from moepp.text import shards
from moepp.text.batches import TrainBatches, TrainOrder
from moepp.text.shards import Shards, shard_names, write_shards
from moepp.text.token_files import TokenFiles
from tests.text.conftest import make, one_line, write_text


def written(folder: Path, tokens: np.ndarray, at: list[int]) -> Shards:
    write_shards((folder / name for name in shard_names()), np.split(tokens, at))
    paths = sorted(folder.iterdir())
    return Shards(paths, [path.stat().st_size // 2 for path in paths], "uint16")


@pytest.mark.parametrize("shard", [1, 3, 7, 100, 1000])
@pytest.mark.parametrize("at", [[], [1, 2, 50], [7, 7, 99]])
def test_windows_and_stretches_across_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, at: list[int]
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard)
    tokens = np.random.default_rng(0).integers(1 << 16, size=100).astype(np.uint16)
    read = written(tmp_path, tokens, at)
    assert [path.name for path in read.paths] == [f"train-{i:05}.bin" for i in range(-(-100 // shard))]
    assert [path.stat().st_size // 2 for path in read.paths[:-1]] == [shard] * (len(read.paths) - 1)
    assert (len(read), read.dtype) == (100, np.uint16)
    for part in (slice(None), slice(0, 0), slice(6, 8), slice(99, 200), slice(0, 100), slice(50, 40)):
        assert read[part].dtype == np.uint16
        assert read[part].tolist() == tokens[part].tolist()
    for length in (1, 2, 9, 100):
        starts = [99 - length + 1, 0, *range(0, 100 - length, 3), 0]
        windows = read.windows(starts, length)
        assert windows.dtype == np.int64
        assert windows.tolist() == [tokens[start : start + length].tolist() for start in starts]


def test_a_text_prepared_in_shards_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text", {"a": 40, "b": 20})
    whole = TokenFiles.open(make(tmp_path))
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    sharded = TokenFiles.open(make(tmp_path, out_root=str(tmp_path / "shards")))
    assert len(sharded.train.paths) > 3
    assert sharded.train[:].tolist() == whole.train[:].tolist()
    assert sharded.val.tolist() == whole.val.tolist()
    assert sharded.meta["domains"] == whole.meta["domains"]
    batches = [TrainBatches(f, TrainOrder(len(f.train), 30, 8, seed=1)) for f in (whole, sharded)]
    for n in range(len(batches[0])):
        assert batches[0][n]["targets"].tolist() == batches[1][n]["targets"].tolist()


def test_a_shard_that_is_damaged_or_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    write_text(tmp_path / "text", {"a": 40})
    folder = make(tmp_path)
    hashes = json.loads((folder / "meta.json").read_text())["files"]
    assert list(hashes) == [*(f"train-{i:05}.bin" for i in range(len(hashes) - 1)), "val.bin"]
    assert len({file["sha256"] for file in hashes.values()}) == len(hashes) > 3
    with (folder / "train-00001.bin").open("r+b") as file:
        file.truncate(998)
    with pytest.raises(InputError) as error:
        TokenFiles.open(folder)
    one_line(error, "train-00001.bin is 998 bytes, not 1000")
    (folder / "train-00001.bin").unlink()
    with pytest.raises(InputError) as error:
        TokenFiles.open(folder)
    one_line(error, "train-00001.bin", "No such file")
