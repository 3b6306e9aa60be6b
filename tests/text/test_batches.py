"""Token files → batches: the order, every held-out token once, devices."""

import tracemalloc
from collections import Counter

import pytest
import torch

from moepp.text.batches import IGNORE, Batch, HeldOutBatches, TrainBatches, TrainOrder, held_out_windows
from moepp.text.token_files import TokenFiles
from tests.text.conftest import oracle

S, B = 16, 4


def held_out(files: TokenFiles, *options: int) -> list[Batch]:
    batches = HeldOutBatches(files, *options)
    return [batches[n] for n in range(len(batches))]


# ---- training order --------------------------------------------------------------------------------------------


def test_batch_n_is_that_of_the_oracle_in_whatever_order_one_asks(folder: str) -> None:
    files = TokenFiles.open(folder)
    batches = TrainBatches(files, TrainOrder(len(files.train), S, B, seed=7))
    assert len(batches) > 5
    for n in (0, 3, 2 * len(batches) + 1, len(batches), 3):
        inputs, targets = oracle(files.train[:], 7, n, S, B)
        assert {value.dtype for value in batches[n].values()} == {torch.int64}
        assert batches[n]["inputs"].numpy().tolist() == inputs.tolist()
        assert batches[n]["targets"].numpy().tolist() == targets.tolist()
        assert batches[n]["domain"].tolist() == [-1] * B


def test_order_is_pinned() -> None:
    """Runs are compared across versions of this code: the order must never change."""
    order = TrainOrder(n_tokens=200, seq_len=10, batch_size=6, seed=3)
    assert (order.windows, order.batches) == (19, 3)
    assert [order(n) for n in (0, 2, 3)] == [
        [148, 68, 58, 88, 38, 118],
        [8, 108, 128, 158, 138, 168],
        [158, 108, 48, 168, 118, 18],
    ]


def test_order_of_runs_of_before_is_pinned() -> None:
    """Their permutation was drawn and held in memory."""
    order = TrainOrder(n_tokens=200, seq_len=10, batch_size=6, seed=3, computed=False)
    assert [order(n) for n in (0, 2, 3)] == [
        [118, 48, 98, 148, 168, 88],
        [158, 58, 108, 78, 8, 138],
        [18, 158, 58, 148, 8, 28],
    ]


def test_a_trillion_tokens_take_no_memory() -> None:
    order = TrainOrder(n_tokens=10**12, seq_len=256, batch_size=512, seed=0)
    tracemalloc.start()
    starts = order(0) + order(order.batches - 1) + order(order.batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert 0 <= min(starts) < 10**10
    assert 99 * 10**10 < max(starts) <= 10**12 - 257


@pytest.mark.parametrize("n_tokens", [11, 15, 19, 20, 21, 29, 30, 200, 205])
def test_an_epoch_has_each_window_once_and_stays_inside(n_tokens: int) -> None:
    order = TrainOrder(n_tokens, seq_len=10, batch_size=1, seed=0)
    phases = set()
    for epoch in range(50):
        starts = [order(epoch * order.batches + i)[0] for i in range(order.batches)]
        phase = min(starts)
        assert sorted(starts) == [phase + 10 * w for w in range(order.windows)]
        assert 0 <= phase < 10
        assert max(starts) + 11 <= n_tokens
        assert n_tokens - (order.windows * 10 + 1) < 20  # no more is left out than an epoch's shift needs
        phases.add(phase)
    assert len(phases) == min(10, n_tokens - 10 * order.windows)


def test_seed_and_epoch_change_the_order() -> None:
    order, other = TrainOrder(5000, 10, 50, 0), TrainOrder(5000, 10, 50, 1)
    assert order(0) != other(0)
    assert {s % 10 for s in order(0)} == {order(0)[0] % 10}
    assert sorted(order(0)) != sorted(order(order.batches))
    assert order(order.batches) != other(0)  # (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_devices_share_a_batch(folder: str) -> None:
    files = TokenFiles.open(folder)
    order = TrainOrder(len(files.train), S, 2 * B, seed=0)
    whole, *parts = (TrainBatches(files, order, *place) for place in ((0, 1), (0, 2), (1, 2)))
    for n in range(len(whole)):
        assert torch.equal(whole[n]["inputs"], torch.cat([part[n]["inputs"] for part in parts]))


# ---- held-out text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq_len", "batch_size"), [(S, B), (7, B), (100, 1)])
def test_validation_has_every_token_as_a_target_once(folder: str, seq_len: int, batch_size: int) -> None:
    files = TokenFiles.open(folder)
    val, seen, counts = files.val, Counter[tuple[int, int, int]](), []
    names = ("inputs", "targets", "domain")
    for batch in held_out(files, seq_len, batch_size):
        assert batch["inputs"].shape == batch["targets"].shape == (batch_size, seq_len)
        for inputs, targets, domain in zip(*(batch[k].tolist() for k in names), strict=True):
            count = seq_len - targets.count(IGNORE)
            assert targets[count:] == [IGNORE] * (seq_len - count)
            assert targets[:count][:-1] == inputs[1:count]  # the next token
            seen.update((domain, i, t) for i, t in zip(inputs[:count], targets[:count], strict=True))
            counts.append(count)
    assert 0 not in counts[:-batch_size]  # the last batch alone is filled up
    assert seen == Counter(
        (d, int(val[i - 1]), int(val[i])) for d, (a, b) in enumerate(files.val_ranges) for i in range(a, b)
    )
    assert sum(seen.values()) == len(val) - 1


def test_the_halves_of_the_held_out_text_share_no_document(folder: str) -> None:
    files = TokenFiles.open(folder)
    whole, tune, report = (held_out_windows(files, S, part) for part in ("all", "tune", "report"))
    targets = [
        {(domain, start + 1 + i) for start, count, domain in windows.tolist() for i in range(count)}
        for windows in (whole, tune, report)
    ]
    assert targets[1] | targets[2] == targets[0]
    assert not targets[1] & targets[2]
    for domain, (begin, end) in enumerate(files.val_ranges):
        first = min(at for d, at in targets[2] if d == domain)
        documents = int((files.val[begin:end] == files.end_of_text).sum())
        assert documents == 1 or files.val[first - 1] == files.end_of_text  # the cut is between documents
        assert begin < first < end
    batches = HeldOutBatches(files, S, B, part="report")
    assert sum(int((batches[n]["targets"] != IGNORE).sum()) for n in range(len(batches))) == len(targets[2])


def test_bytes_of_validation_targets_are_the_bytes_of_the_documents(folder: str) -> None:
    """What bits per byte divides by."""
    files = TokenFiles.open(folder)
    sizes = [0, 0, 0]
    for batch in held_out(files, S, B):
        for targets, domain in zip(batch["targets"], batch["domain"], strict=True):
            sizes[domain] += int(files.letters_per_token[targets[targets != IGNORE]].sum())
    assert files.bytes_per_letter.tolist() == [1.0] * 3
    assert sizes == [meta["val"]["bytes"] for meta in files.meta["domains"].values()]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_devices_share_validation_evenly(folder: str, world_size: int) -> None:
    files = TokenFiles.open(folder)
    parts = [HeldOutBatches(files, S, B, rank, world_size) for rank in range(world_size)]
    assert len({len(part.windows) for part in parts}) == 1  # else the slower devices would wait for ever
    windows = [tuple(window) for part in parts for window in part.windows.tolist()]
    assert Counter(w for w in windows if w[1]) == Counter(map(tuple, held_out_windows(files, S).tolist()))
    last = parts[-1][len(parts[-1]) - 1]
    for window, targets in zip(parts[-1].windows[-len(last["targets"]) :], last["targets"], strict=True):
        assert (targets != IGNORE).sum() == window[1]
