"""What scale.py says against a training step on processes of gloo, which compute as a GPU does.

Of 1 and 4 processes by hand, figures in docs/scale.md: python -m tests.model.test_scale 1 2 4
"""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from statistics import mean
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

from moepp.model import (
    MoEConfig,
    Transformer,
    TransformerConfig,
    attention,
    experts,
    linear_cross_entropy,
    mean_load_balance_loss,
)
from moepp.model.scale import (
    AVERAGED,
    FREE,
    GATHERED,
    ROWS,
    SCATTERED,
    VANILLA,
    Job,
    Links,
    fsdp,
    memory,
    operations,
    seconds,
    traffic,
)
from moepp.model.sharding import ParallelConfig, local, shard
from moepp.training.optimizer import AdamW

LINKS = Links(1.0, 1.0, 8)
TRANSFORMER = TransformerConfig(
    vocab_size=1024, n_layers=4, hidden_size=128, intermediate_size=352, n_heads=4, context_length=256,
    tie_embeddings=False,
)  # fmt: skip
MOE = MoEConfig(tau=1.0)  # untrained, it spreads tokens as τ = 1 would


def job_of(devices: int, precision: str = "bf16-mixed", checkpoint: bool = False, **parallel: int) -> Job:
    return Job(
        TRANSFORMER, MOE, ParallelConfig(sharded=True, **parallel), devices, 4, 256, 2, precision, checkpoint
    )


JOBS = [
    job_of(1),
    job_of(2),
    job_of(2, expert=2, checkpoint=True),
    job_of(2, "32-true", replicas=2),
    job_of(4),
    job_of(4, expert=2),
    job_of(4, expert=4),
    job_of(4, expert=2, replicas=2, checkpoint=True),
]


def of_size(devices: int) -> list[Job]:
    return [job for job in JOBS if job.devices == devices]


class FusedRMSNorm(torch.autograd.Function):
    """As a GPU's kernel it keeps its input and a number a row; on a CPU autograd keeps two tensors as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.rms_norm(x, x.shape[-1:], weight, ctx.eps)
        return *torch.autograd.grad(y, (x, weight), grad), None


class Sent:
    """Bytes that this process sends, by collective: of those that go round, what a ring would."""

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        of_group = dist.get_world_size
        for kind, label in (
            (collectives.DefaultAllGather, GATHERED),
            (collectives.DefaultReduceScatter, SCATTERED),
        ):
            self.count(kind, "__call__", label, self.sharded)
        self.count(dist, "all_reduce", AVERAGED, lambda x, op=None, group=None: (
            x.nbytes * 2 * (of_group(group) - 1) / of_group(group)))  # fmt: skip
        self.count(dist, "all_to_all_single", ROWS, self.rows)

    @staticmethod
    def sharded(self: Any, *args: Any, group: dist.ProcessGroup, **others: Any) -> int:
        tensors = [x for x in (*args, *others.values()) if isinstance(x, Tensor)]
        return min(x.nbytes for x in tensors) * (group.size() - 1)

    @staticmethod
    def rows(
        output: Tensor, input: Tensor, arriving: Any = None, sent: Any = None, group: Any = None, **_: Any
    ) -> int:
        if sent is None:  # how many rows there will be
            return 0
        return (sum(sent) - sent[dist.get_rank(group)]) * input.shape[1] * input.element_size()

    def count(self, owner: Any, name: str, label: str, n_bytes: Any) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            self.by_name[label] += n_bytes(*args, **options)
            return original(*args, **options)

        setattr(owner, name, counting)


def measure(job: Job, sent: Sent) -> dict[str, float]:
    """Of one step of training on this process, in bytes."""
    # as a GPU does: products of all experts at once, attention without scores, a norm in one kernel
    experts.use_grouped = lambda x, w: True
    attention.LONGEST = 0
    nn.RMSNorm.forward = lambda self, x: FusedRMSNorm.apply(x, self.weight, self.eps)  # type: ignore[method-assign]
    bf16 = job.precision == "bf16-mixed"
    with torch.device("meta"):
        model = Transformer(job.transformer, job.moe)
    model.checkpoint_activations = job.checkpoint_activations
    shard(model, job.parallel, torch.device("cpu"), torch.bfloat16 if bf16 else None)
    model.materialize(torch.device("cpu"))
    optimizer = AdamW(model.parameters(), fused=True)
    tokens_BS = torch.randint(job.transformer.vocab_size, (job.batch_size, job.seq_len))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden_BSD, routings = model.hidden(tokens_BS)
            targets_N = tokens_BS.roll(-1, 1).flatten()
            cross_entropy = linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head.weight, targets_N)
            return cross_entropy + 0.01 * mean_load_balance_loss(routings)

    def step() -> None:
        loss().backward()
        optimizer.step()

    step()  # from the second on all is as it will be
    gradients = sum(local(p.grad).nbytes for p in model.parameters())
    state = sum(local(x).nbytes for one in optimizer.state.values() for k, x in one.items() if k != "step")
    optimizer.zero_grad()

    saved: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        one = loss()
    activations = sum(storage.nbytes() for storage in saved.values())  # by now what was gathered is empty again
    one.backward()  # the gradients stay, as those of an earlier micro-batch
    saved.clear()

    sent.by_name.clear()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    parameters = sum(local(p).nbytes for p in model.parameters())
    return {
        "parameters": parameters,
        "gradients": gradients,
        "AdamW": state,
        "activations": activations,
        "at the peak": parameters + gradients + state + max(accumulate(n for _, n in changes)),
        **{name: sent.by_name[name] for name in (GATHERED, SCATTERED, AVERAGED, ROWS)},
    }


def measure_all(plans: list[Job]) -> None:
    """Print one line of JSON: what each step took, the mean over processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    sent, took = Sent(), []
    for job in plans:
        of_ranks: list[Any] = [None] * job.devices
        dist.all_gather_object(of_ranks, measure(job, sent))
        took.append({name: mean(one[name] for one in of_ranks) for name in of_ranks[0]})
    if dist.get_rank() == 0:
        print(json.dumps(took))
    dist.destroy_process_group()


def run(processes: int) -> list[dict[str, float]]:
    """What the steps of JOBS on so many processes took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ended = subprocess.run([*command, "-m", "tests.model.test_scale"], capture_output=True, text=True, check=True)
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("[")))


def planned(job: Job) -> dict[str, float]:
    """What scale.py says of what `measure` measures."""
    parts, L = memory(job), job.transformer.n_layers
    sent = {name: L * n_bytes for name, (n_bytes, _) in traffic(job, LINKS).items()}
    for name, (n_bytes, _) in fsdp(job, LINKS, 1, (job.root(), job.per_copy, 1, job.master)).items():
        sent[name] += n_bytes
    return {
        **{name: parts[name] for name in ("parameters", "gradients", "AdamW", "activations")},
        "at the peak": sum(parts.values()),
        **{name: sent[name] for name in (GATHERED, SCATTERED, AVERAGED, ROWS)},
    }


@pytest.mark.heavy
def test_memory_and_bytes_are_those_of_a_step_on_two_processes() -> None:
    for job, measured in zip(of_size(2), run(2), strict=True):
        assert planned(job) == pytest.approx(measured, rel=0.05, abs=1000), job


def test_a_ring_between_machines_takes_the_links_of_all_its_members() -> None:
    links = Links(within=450.0, between=50.0, per_machine=8)
    assert [links.ring(8, 1), links.ring(64, 1), links.ring(2, 4), links.ring(8, 8)] == [450, 400, 450, 50]
    assert links.exchange_seconds(7.0, 8) == 7 / 450
    assert links.exchange_seconds(15.0, 16) == 8 / 50  # to 8 of the 15 others, which takes longer than to the 7


def test_nothing_is_sent_by_one_device_and_what_takes_longest_decides() -> None:
    alone = job_of(1)
    assert {n_bytes for name, (n_bytes, _) in traffic(alone, LINKS).items()} == {0.0}
    fast, slow = Links(1e30, 1e30, 8), Links(1.0, 1.0, 8)
    job = job_of(4, expert=2)
    assert seconds(job, fast, 1.0)["step"] == pytest.approx(2 * operations(job))
    by_links = seconds(job, slow, 1e30)
    assert by_links["step"] == pytest.approx(by_links["parameters and gradients"] + by_links[ROWS])
    sent = traffic(job, slow)
    assert sent[ROWS][0] / sent[VANILLA][0] == MOE.ffn_share
    assert sent[FREE][0] == 0


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        measure_all(of_size(int(os.environ["WORLD_SIZE"])))
    for n in map(int, sys.argv[1:]):
        for job, measured in zip(of_size(n), run(n), strict=True):
            print(f"\n{n} processes, {job.parallel}, {job.precision}, again: {job.checkpoint_activations}")
            for name, expected in planned(job).items():
                print(f"  {name:<30}{expected / 1e6:8.2f}{measured[name] / 1e6:8.2f} MB")
