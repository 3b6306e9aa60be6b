"""What a training step takes of each of many devices, on paper: memory, bytes sent, operations, time.

The formulas follow sharding.py, dispatch.py, grouped.py, and FSDP2 as torch has it. All is in bytes and seconds,
for tokens that are spread evenly over experts, and blocks that are not compiled (a compiler keeps less).

T tokens of a micro-batch on a device, D hidden size, H intermediate size, V vocabulary, L layers.
"""

from dataclasses import dataclass

from .balance import whole_capacities
from .config import MoEConfig, TransformerConfig, require
from .counts import ParameterCount, count_parameters, flops_per_token
from .loss import CUDA_CHUNK
from .sharding import ParallelConfig

GATHERED, SCATTERED, AVERAGED = "parameters gathered, twice", "gradients scattered", "gradients of replicas"
ROWS, VANILLA, FREE = "FFN experts' rows", "the same of vanilla top-K", "zero-computation experts' rows"


@dataclass(frozen=True)
class Links:
    """How fast a device sends, in bytes per second and direction: within a machine, and between machines."""

    within: float
    between: float
    per_machine: int

    def ring(self, members: int, stride: int) -> float:
        """Bytes per second at which a device of a ring sends, whose members are every `stride`-th device: what
        leaves a machine is spread over the links of all members that it has."""
        here = max(1, self.per_machine // stride)
        return self.within if members <= here else min(self.within, here * self.between)

    def exchange_seconds(self, sent: float, members: int) -> float:
        """Seconds of sending `sent` bytes in equal parts to the other members: to those in the machine and to
        those beyond it at the same time."""
        far = max(0, members - self.per_machine) / max(1, members - 1)
        return max(sent * (1 - far) / self.within, sent * far / self.between)


@dataclass(frozen=True)
class Job:
    """A step to plan: `accumulate` times `batch_size` sequences of `seq_len` on each device.

    Raises:
        InputError: experts or devices cannot be divided so.
    """

    transformer: TransformerConfig
    moe: MoEConfig
    parallel: ParallelConfig
    devices: int
    batch_size: int
    seq_len: int
    accumulate: int = 1
    precision: str = "bf16-mixed"
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "batch_size", "seq_len", "accumulate"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        self.parallel.require_fits(self.transformer, self.moe, self.devices)

    @property
    def count(self) -> ParameterCount:
        return count_parameters(self.transformer, self.moe)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def ffn_rows(self) -> float:
        """Of a layer: what this device's tokens send to FFN experts, and what those here receive."""
        return self.tokens * self.moe.expected_ffn_per_token

    @property
    def master(self) -> int:
        """Bytes of a parameter, of its gradient, of each of AdamW's averages, and of the residual stream."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def product(self) -> int:
        """Bytes of what matrices are multiplied in."""
        return 4 if self.precision.startswith("32") else 2

    @property
    def per_copy(self) -> int:
        """Devices that a copy of the model is sharded over."""
        return self.devices // self.parallel.replicas

    def gathered(self) -> list[tuple[float, int, int, int]]:
        """Of a block: parameters that a device gathers, from how many, how far apart, in how many bytes each."""
        count, L, N = self.count, self.transformer.n_layers, self.parallel.expert
        matrix = 2 if self.precision == "bf16-mixed" else self.master
        return [
            (count.attention / L, self.per_copy, 1, matrix),
            (count.ffn_experts / L / N, self.per_copy // N, N, matrix),
            ((count.router + count.constants + count.norms) / L, self.per_copy, 1, self.master),
        ]

    def root(self) -> int:
        """Parameters outside of blocks, which are gathered once a micro-batch: of embedding, head, last norm."""
        return self.count.embedding + self.count.head + self.transformer.hidden_size


def fsdp(
    job: Job, links: Links, passes: int, *parts: tuple[float, int, int, int]
) -> dict[str, tuple[float, float]]:
    """(bytes, seconds) that a device sends for parameters gathered in so many passes, and for their gradients."""
    replicas, sums = job.parallel.replicas, dict.fromkeys((GATHERED, SCATTERED, AVERAGED), (0.0, 0.0))
    for number, shards, stride, size in parts:
        others, ring = (shards - 1) / shards * number, links.ring(shards, stride)
        across = 2 * (replicas - 1) / replicas * number / shards * job.master
        for name, sent, rate in (
            (GATHERED, passes * others * size, ring),
            (SCATTERED, others * job.master, ring),
            (AVERAGED, across, links.ring(replicas, job.per_copy)),
        ):
            sums[name] = sums[name][0] + sent, sums[name][1] + sent / rate
    return sums


def traffic(job: Job, links: Links) -> dict[str, tuple[float, float]]:
    """(bytes, seconds) that a device sends for a layer and micro-batch, forward and backward."""
    N, row = job.parallel.expert, job.transformer.hidden_size * job.product
    trips = 6 if job.checkpoint_activations else 4  # there and back: forward, as often again, backward
    sent = {ROWS: job.ffn_rows, VANILLA: job.tokens * job.moe.top_k, FREE: 0}
    exchanged = {name: trips * (N - 1) / N * rows * row for name, rows in sent.items()}
    rows = {name: (n_bytes, links.exchange_seconds(n_bytes, N)) for name, n_bytes in exchanged.items()}
    return fsdp(job, links, 2, *job.gathered()) | rows


def kept(job: Job) -> tuple[float, float]:
    """Bytes of activations that a layer keeps for its backward pass: all of them, and those of a checkpoint."""
    t, T, w, m = job.transformer, job.tokens, job.product, job.master
    D, H, q, kv = t.hidden_size, t.intermediate_size, t.n_heads * t.head_dim, t.kv_heads * t.head_dim
    stream = 2 * m * T * D  # before either norm
    attention = w * T * (D + (q + 2 * kv) + (q + kv) + q)  # normed, q|k|v, q and k rotated, output
    logits = 8 * T * job.moe.n_experts  # and scores
    moe = T * D * (4 + (w if w < 4 else 0))  # normed, in float32 for the router
    if job.parallel.expert > 1:
        rows, returned = job.ffn_rows, job.ffn_rows
    else:  # the host does not know how many there are: memory is for the most that there can be
        rows, returned = float(T * job.moe.top_k), 0.0
        if job.moe.capacity_factor is not None:
            rows = min(rows, job.moe.n_ffn * whole_capacities(job.moe, T)[0])
    experts = w * (rows * (2 * D + 4 * H) + returned * D)  # in, out, gate and up, silu of gate, their product
    return stream + attention + logits + moe + experts, m * T * D + logits


def memory(job: Job) -> dict[str, float]:
    """Bytes on a device by part, together at its fullest moment. Without what the allocator wastes."""
    T, w, m = job.tokens, job.product, job.master
    D, V, L = job.transformer.hidden_size, job.transformer.vocab_size, job.transformer.n_layers
    own, (whole, checkpoint) = m * job.count.total / job.per_copy, kept(job)
    layer = checkpoint if job.checkpoint_activations else whole
    # logits, whose place their gradient takes, and a softmax in float32; the head's in float32, and a chunk's part
    loss = min(T, CUDA_CHUNK) * V * (w if w == 4 else 4 + w) + V * D * (4 + w)
    # two blocks gathered, the gradients of one that are being scattered, the head's, and those between the two
    # products of experts
    block = sum(number * (2 * size + m) for number, _, _, size in job.gathered()) + m * V * D
    block += w * job.ffn_rows * job.transformer.intermediate_size
    # FSDP2 keeps what replicas average till the backward pass ends, beside the gradients of earlier micro-batches
    averaged = own / L if job.parallel.replicas > 1 and job.accumulate > 1 else 0
    block += whole - layer + (L - 1) * max(0, averaged - layer)
    return {
        "parameters": own,
        "gradients": own,
        "AdamW": 2 * own,
        "head, gathered": m * (V * D + D),  # where it is tied the embedding is the same
        "activations": L * layer + T * D * (m + w) + w * V * D,
        "loss, or a block's backward": max(loss, block),
    }


def operations(job: Job) -> float:
    """FLOPs of a micro-batch on a device, with what is computed a second time."""
    t = job.transformer
    forward = flops_per_token(t, job.moe, job.seq_len, job.moe.expected_ffn_per_token)
    again = forward - 2 * t.vocab_size * t.hidden_size if job.checkpoint_activations else 0
    return job.tokens * (3 * forward + again)


def seconds(job: Job, links: Links, flops: float) -> dict[str, float]:
    """Of a step, where products reach so many FLOP/s: parameters and gradients are sent beside them, and only what
    takes longer is waited for; the rows of FFN experts are waited for."""
    L, layer = job.transformer.n_layers, traffic(job, links)
    root = fsdp(job, links, 1, (job.root(), job.per_copy, 1, job.master))
    compute, beside = operations(job) / flops, sum(L * layer[name][1] + root[name][1] for name in root)
    rows = L * layer[ROWS][1]
    parts = {"products": compute, "parameters and gradients": beside, ROWS: rows}
    return {name: job.accumulate * s for name, s in (parts | {"step": max(compute, beside) + rows}).items()}
