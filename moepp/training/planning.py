"""`moepp plan`: what a recipe takes of each of many devices, by the formulas of model/scale.py."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moepp.model import MoEConfig, TransformerConfig
from moepp.model.config import require
from moepp.model.scale import Job, Links, memory, operations, seconds, traffic
from moepp.model.sharding import ParallelConfig
from moepp.training.arguments import OwnOptions
from moepp.training.devices import SHARDED
from moepp.training.lightning_cli import model_vocab_size, resolve

ABOUT = """Memory, bytes sent and time of a training step on each of N devices, sharded as --trainer.strategy=fsdp2
does. Nothing is trained, and no device is needed. All options of `moepp fit` apply, such as --data.batch_size=4,
--model.parallel.expert=8, --model.checkpoint_activations=true, --trainer.precision=bf16-true."""
OPTIONS = (
    ("peak", 989e12, "FLOP/s of a device (an H100 SXM's in bf16, %(default).3g)"),
    ("mfu", 0.4, "share of it that products reach, those computed again included (%(default)s)"),
    ("bandwidth", 450e9, "bytes/s that a device sends within a machine (NVLink of an H100, %(default).3g)"),
    ("between", 50e9, "bytes/s that a device sends to other machines (a 400 Gb/s adapter each, %(default).3g)"),
)


def run(verb: str, arguments: list[str]) -> None:
    """Print the plan. What is no option of its own is one of `moepp fit`."""
    usage = f"moepp {verb} --config RECIPE --devices N [OPTIONS]"
    parser = OwnOptions(f"moepp {verb}", usage, ABOUT, allow_abbrev=False)
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="of all machines")
    parser.add_argument("--per_machine", type=int, default=8, metavar="N", help="devices of one (%(default)s)")
    for name, default, what in OPTIONS:
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=what)
    own, others = parser.parse_own(arguments)
    for name in ("per_machine", "peak", "mfu", "bandwidth", "between"):
        require(0 < getattr(own, name) < float("inf"), name, getattr(own, name), "must be positive")
    require(own.mfu <= 1, "mfu", own.mfu, "must be at most 1")
    job = job_of(resolve([f"--trainer.strategy={SHARDED}", *others]), own.devices)
    Console().print(table(job, Links(own.bandwidth, own.between, own.per_machine), own.peak * own.mfu))


def job_of(options: dict[str, Any], devices: int) -> Job:
    """The step that `moepp fit` would take with these resolved options, on so many devices.

    Raises:
        InputError: they are of another strategy, or do not fit the devices.
    """
    model, data, trainer = options["model"], options["data"], options["trainer"]
    strategy = trainer["strategy"]
    require(strategy == SHARDED, "trainer.strategy", strategy, f"only {SHARDED} can be planned")
    return Job(
        TransformerConfig(model_vocab_size(data["vocab_size"], model["init_from"], None), **model["transformer"]),
        MoEConfig(**model["moe"]),
        ParallelConfig(**model["parallel"], sharded=True),
        devices,
        data["batch_size"],
        data["seq_len"],
        trainer["accumulate_grad_batches"],
        str(trainer["precision"] or "bf16-mixed"),
        model["checkpoint_activations"],
    )


def table(job: Job, links: Links, flops: float) -> Table:
    ffn, parallel = job.moe.expected_ffn_per_token, job.parallel
    shown = Table(show_header=False)
    parts, times = memory(job), seconds(job, links, flops)
    step_tokens = job.devices * job.tokens * job.accumulate
    sections = {
        "model": {
            "parameters": f"{job.count.total / 1e9:.1f}B, {job.count.active(ffn) / 1e9:.1f}B active per token",
            "FFN experts per token and layer": f"{ffn:.2f} of {job.moe.top_k} choices",
            "devices": f"{job.devices}: experts over {parallel.expert}, replicas {parallel.replicas}",
            "precision": job.precision + (", blocks computed again" if job.checkpoint_activations else ""),
            "tokens of a step": f"{step_tokens:,}, {job.tokens:,} x {job.accumulate} on a device",
        },
        "memory of a device": {name: f"{n / 1e9:.1f} GB" for name, n in parts.items()}
        | {"together": f"{sum(parts.values()) / 1e9:.1f} GB"},
        "sent, per layer and micro-batch": {
            name: f"{n / 1e6:,.0f} MB" for name, (n, _) in traffic(job, links).items()
        },
        "time of a step": {"operations of a device": f"{job.accumulate * operations(job) / 1e12:,.0f} TFLOP"}
        | {name: f"{s:.2f} s" for name, s in times.items()}
        | {"tokens per second": f"{step_tokens / times['step']:,.0f}"},
    }
    for title, rows in sections.items():
        shown.add_row(f"[bold]{title}")
        for name, figure in rows.items():
            shown.add_row(f"  {name}", figure)
        shown.add_section()
    return shown
