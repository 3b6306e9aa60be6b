"""What every rank of several devices does: training steps of sharded models, whose all-to-alls it writes down.

L layers, N ranks, E experts, F = n_ffn, B sequences, S positions, D hidden size.
"""

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moepp.model import MoEConfig
from moepp.model.sharding import ParallelConfig, local, shard
from moepp.study.timing import in_turn
from moepp.system.machine import keep_freed_memory
from moepp.training.module import LitMoE
from moepp.training.optimizer import AdamW
from tests.bench import peers
from tests.bench.setting import Setting
from tests.bench.steps import ModelStep, peak_memory

TIME_LIMIT_S = 900
all_to_all_single = dist.all_to_all_single  # as it is when nobody writes it down


# ---- processes ---------------------------------------------------------------------------------------------


def on_ranks(
    n: int, work: Callable[..., Any], at: Setting, *more: Any, limit_s: float = TIME_LIMIT_S
) -> list[Any]:
    """What `work(at, *more)` returns on each of n ranks: processes with gloo on a CPU, with NCCL and a GPU each.

    Raises:
        NotEqual: on a rank.
        RuntimeError: a rank ended in another error, or took longer than `limit_s`. No process is left.
    """
    multiprocessing.set_forkserver_preload([__name__])  # else every process imports torch anew
    with tempfile.TemporaryDirectory() as folder:
        arguments = n, folder, work, at, *more
        ranks = mp.start_processes(rank_of, arguments, n, join=False, daemon=True, start_method="forkserver")
        end = time.monotonic() + limit_s
        try:
            while not ranks.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise RuntimeError(f"{n} processes: not done within {limit_s:g} s")
        except mp.ProcessRaisedException as error:
            kind, _, reason = str(error).strip().splitlines()[-1].partition(": ")
            message = f"process {error.error_index} of {n}: {kind.rpartition('.')[2]}: {reason}"
            raise (peers.NotEqual if kind.endswith("NotEqual") else RuntimeError)(message) from error
        except mp.ProcessExitedException as error:
            raise RuntimeError(
                f"process {error.error_index} of {n}: ended with exit code {error.exit_code}"
            ) from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, f"{rank}").read_bytes()) for rank in range(n)]


def rank_of(rank: int, n: int, folder: str, work: Callable[..., Any], at: Setting, *more: Any) -> None:
    """One process, to its end. They meet at a file, which takes no port."""
    on_gpu = at.device.type == "cuda"
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    keep_freed_memory(at.device)
    if on_gpu:
        at = replace(at, device=torch.device("cuda", rank))
        torch.cuda.set_device(at.device)
    dist.init_process_group("nccl" if on_gpu else "gloo", f"file://{folder}/meet", rank=rank, world_size=n)
    try:
        Path(folder, f"{rank}").write_bytes(pickle.dumps(work(at, *more)))
        dist.barrier()
    except RuntimeError as error:
        if "by peer" in str(error):  # gloo's connection to a rank that is gone: which shall be heard first
            time.sleep(10)
        raise
    dist.destroy_process_group()


# ---- a step ------------------------------------------------------------------------------------------------


class ShardedStep(ModelStep):
    """A training step of ours as `moepp fit` takes it with --trainer.strategy=fsdp2, on tokens of this rank.

    Args:
        forced: routing is, evenly to the share that τ implies; else the router chooses.

    Attributes:
        count_LE: how many of the last step's tokens chose each expert.
    """

    count_LE: Tensor

    def __init__(
        self, at: Setting, moe: MoEConfig, parallel: ParallelConfig, batch_size: int, forced: bool = True
    ) -> None:
        tokens_BS = tokens_here(at, batch_size)
        torch.manual_seed(0)  # the same weights everywhere
        model = LitMoE(at.sizes.transformer, moe, compile=at.device.type == "cuda", parallel=parallel)
        shard(model.model, parallel, at.device, at.dtype if at.precision == "bf16-mixed" else None)
        model.model.materialize(at.device)
        if forced:
            force_evenly(model, tokens_BS)
        super().__init__(at, model, tokens_BS)
        self.optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.1, fused=True)

    def total_loss(self) -> Tensor:
        model: Any = self.model
        figures = model.training_step({"inputs": self.tokens_BS, "targets": self.targets_BS}, 0)
        self.count_LE = figures["tokens_per_expert_LE"]
        return figures["loss"]

    def clip(self) -> None:
        model: Any = self.model
        model.configure_gradient_clipping(self.optimizer, 1.0)


def tokens_here(at: Setting, batch_size: int) -> Tensor:
    """(B, S), others on every rank."""
    t, own = at.sizes.transformer, torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(t.vocab_size, (batch_size, t.context_length), generator=own).to(at.device)


def force_evenly(model: LitMoE, tokens_BS: Tensor) -> None:
    moe, L = model.moe, len(model.model.blocks)
    for i, block in enumerate(peers.blocks(model.model)):
        experts_TK = peers.spread_evenly(tokens_BS.numel(), moe, moe.ffn_share, seed=dist.get_rank() * L + i)
        peers.force(block.moe.router, experts_TK.to(tokens_BS.device))


def check_against_one_device(at: Setting, step: ShardedStep) -> None:
    """Raise NotEqual unless the logits are those of the same model in one piece, on the same tokens."""
    torch.manual_seed(0)
    model: Any = step.model
    whole = LitMoE(at.sizes.transformer, model.moe).to(at.device)
    force_evenly(whole, step.tokens_BS)
    peers.check("logits of several devices", step.logits(), ModelStep(at, whole, step.tokens_BS).logits())


# ---- what it sends -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One all-to-all on one rank: bytes to and from other ranks, when it began and ended."""

    sent: int
    received: int
    of_rows: bool  # of tokens or gradients, not of their numbers
    begun: Any
    ended: Any


class Watched:
    """A step, every all-to-all of which is written down."""

    def __init__(self, step: ShardedStep) -> None:
        self.step = step
        self.calls: list[list[Call]] = []  # by step

    def __call__(self) -> None:
        self.calls.append([])
        with mock.patch.object(dist, "all_to_all_single", self.all_to_all):
            self.step()

    def all_to_all(
        self, output: Tensor, input: Tensor, arriving: Any = None, sent: Any = None, group: Any = None
    ) -> None:
        begun = now(input.device)
        all_to_all_single(output, input, arriving, sent, group)
        n_bytes = to_others(input, sent, group), to_others(output, arriving, group)
        self.calls[-1].append(Call(*n_bytes, sent is not None, begun, now(input.device)))

    def rows_by_layer(self) -> list[int]:
        """Bytes of rows sent in the last step, which is forward through the layers and back, twice in each.

        Raises:
            NotEqual: other all-to-alls than these, or not as much received as sent.
        """
        L = len(self.step.count_LE)
        sent_L, received_L = [0] * L, [0] * L
        rows = [call for call in self.calls[-1] if call.of_rows]
        there = [i // 2 for i in range(2 * L)]
        for i, call in zip([*there, *reversed(there)], rows, strict=False):
            sent_L[i] += call.sent
            received_L[i] += call.received
        if len(rows) != 4 * L or sent_L != received_L:
            raise peers.NotEqual(f"{len(rows)} all-to-alls sent {sent_L} bytes and received {received_L}")
        return sent_L


def to_others(tensor: Tensor, split: list[int] | None, group: Any) -> int:
    """Bytes of a tensor's parts but this rank's own."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = len(tensor) - (len(tensor) // n if split is None else split[rank])
    return rows * tensor.shape[1:].numel() * tensor.element_size()


def now(device: torch.device) -> Any:
    """A moment on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(call: Call) -> float:
    return (
        call.begun.elapsed_time(call.ended) / 1e3
        if hasattr(call.begun, "elapsed_time")
        else call.ended - call.begun
    )


def rows_of(count_NLE: Tensor, n_ffn: int) -> Tensor:
    """(N from, L, N to): rows of FFN experts, by where their tokens are and where the experts are."""
    return count_NLE[..., :n_ffn].unflatten(-1, (len(count_NLE), -1)).sum(-1)


def bytes_of_ffn_rows(count_NLE: Tensor, n_ffn: int, row: int) -> Tensor:
    """(N, L): what each rank has to send in a step. Rows of `row` bytes go to the other ranks' experts, what the
    experts here made of others' rows goes back; and in backward gradients the same ways."""
    rows_NLN = rows_of(count_NLE, n_ffn)
    own_NL = rows_NLN.diagonal(dim1=0, dim2=2).T
    return 2 * row * (rows_NLN.sum(2) + rows_NLN.sum(0).T - 2 * own_NL)


@dataclass
class Seen:
    """Of one contestant's steps, on one rank.

    Attributes:
        count_NLE: how many tokens of each rank chose each expert.
        rows_L: bytes of rows sent in a step, as many are received.
        counts: bytes of numbers of rows sent in a step.
        step, all_to_all: seconds by round.
    """

    count_NLE: Tensor
    rows_L: list[int]
    counts: int
    step: list[float]
    all_to_all: list[float]


def traffic(at: Setting, contestants: dict[str, tuple[MoEConfig, bool]], rounds: int) -> dict[str, Seen]:
    """Of each contestant: a MoEConfig, and whether its routing is forced.

    Raises:
        NotEqual: another output than on one device, or other bytes than the FFN rows of other ranks.
    """
    n, t = dist.get_world_size(), at.sizes.transformer
    parallel = ParallelConfig(expert=n, sharded=True)
    watched, seen = {}, {}
    for name, (moe, forced) in contestants.items():
        step = ShardedStep(at, moe, parallel, at.sizes.batch_size, forced)
        if forced:
            check_against_one_device(at, step)
        one = watched[name] = Watched(step)
        one()
        of_ranks = [torch.empty_like(step.count_LE) for _ in range(n)]
        dist.all_gather(of_ranks, step.count_LE)
        count_NLE = torch.stack(of_ranks).cpu()
        rows_L = one.rows_by_layer()
        ffn_L = bytes_of_ffn_rows(count_NLE, moe.n_ffn, t.hidden_size * at.dtype.itemsize)[dist.get_rank()]
        if rows_L != ffn_L.tolist():
            raise peers.NotEqual(f"{name}: {rows_L} bytes sent, those of FFN experts are {ffn_L.tolist()}")
        counts = sum(call.sent for call in one.calls[-1] if not call.of_rows)
        seen[name] = Seen(count_NLE, rows_L, counts, [], [])
    # every rank has to take as many rounds
    for times in in_turn(list(watched.values()), at.device, rounds, 0.0):
        for figures, s in zip(seen.values(), times, strict=True):
            figures.step.append(s)
    for name, one in watched.items():
        seen[name].all_to_all = [sum(map(seconds, calls)) for calls in one.calls[-rounds:]]
    return seen


# ---- what it holds -----------------------------------------------------------------------------------------


def memory(at: Setting, n_layers: int) -> tuple[int, int]:
    """Bytes of parameters, gradients and AdamW's state held after a step of a sharded model of so many layers; and
    of all tensors at the peak of a step. The batch is the setting's, spread over the ranks."""
    at = replace(at, sizes=replace(at.sizes, transformer=replace(at.sizes.transformer, n_layers=n_layers)))
    batch_size = max(1, at.sizes.batch_size // dist.get_world_size())
    step = ShardedStep(at, MoEConfig(), ParallelConfig(sharded=True), batch_size)
    held: list[int] = []
    hook = step.optimizer.register_step_post_hook(lambda *_: held.append(bytes_held(step)))
    step()
    hook.remove()
    # that a thread of gloo's has freed a buffer shows nowhere, and not in every step
    return held[0], bytes_held(step) + min(peak_memory(step, at.device) for _ in range(3))


def bytes_held(step: ShardedStep) -> int:
    parameters = list(step.model.parameters())
    gradients = [gradient for p in parameters if (gradient := p.grad) is not None]
    state = [tensor for tensors in step.optimizer.state.values() for tensor in tensors.values()]
    return sum(local(tensor).nbytes for tensor in [*parameters, *gradients, *state])


def measure(
    at: Setting, contestants: dict[str, tuple[MoEConfig, bool]], rounds: int, depths: tuple[int, ...]
) -> tuple[list[tuple[int, int]], dict[str, Seen]]:
    """`memory` of models of each of `depths` layers, and where there are others `traffic`."""
    held = [memory(at, n_layers) for n_layers in depths]
    return held, traffic(at, contestants, rounds) if dist.get_world_size() > 1 else {}
