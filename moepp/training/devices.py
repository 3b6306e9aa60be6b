"""Several devices: Lightning's strategies, with a time limit, and one that shards the model (FSDP2)."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from moepp.model import InputError
from moepp.model.sharding import as_shards
from moepp.system.files import fsync_folder, put_in_place, remove
from moepp.training import shards
from moepp.training.checkpoint import read_rest, write_checkpoint

TIME_LIMIT = timedelta(minutes=10)  # how long a device is waited for
LOST = "moepp: the devices lost each other: one ended{} ({}); --ckpt_path=last goes on"
SHARDED = "fsdp2"  # --trainer.strategy


def strategy_of(name: Any) -> Any:
    """What --trainer.strategy names, where it is ours to make; else what it is."""
    return Sharded() if name == SHARDED else name


def is_sharded(trainer: Any) -> bool:
    """By the options of a trainer (a section that is wrong has none)."""
    return getattr(trainer, "strategy", None) == SHARDED


def spare_copies(strategy: Strategy) -> None:
    """DDP by default copies all gradients into its buckets, and sends all buffers, which every device computes."""
    if isinstance(strategy, DDPStrategy):
        ours = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        strategy._ddp_kwargs = ours | strategy._ddp_kwargs


@contextmanager
def naming_lost_device(strategy: Strategy) -> Iterator[None]:
    """A device that has died, or cannot be reached, shows as an error of whichever collective the others are in,
    at the latest after TIME_LIMIT.

    Raises:
        SystemExit: with one line.
    """
    strategy._timeout = TIME_LIMIT  # type: ignore[attr-defined]  # Lightning's are 30 minutes, whoever chose them
    _ChildProcessObserver._terminate_all = end_after_a_child  # type: ignore[method-assign, assignment]
    try:
        yield
    except RuntimeError as error:  # NCCL's and the store's are dist.DistError, gloo's are not
        reason = " ".join(str(error).split())
        of_gloo = dist.is_initialized() and re.search(r"gloo|Connection closed|Timed out", reason)
        if not (isinstance(error, dist.DistError) or of_gloo):
            raise
        for process in getattr(strategy.launcher, "procs", []):  # that this one has started, and that wait for it
            process.kill()
        minutes = TIME_LIMIT.total_seconds() / 60
        others = f", cannot be reached, or was waited for longer than {minutes:g} minutes"
        raise SystemExit(LOST.format(others, reason[:200])) from error


def end_after_a_child(observer: _ChildProcessObserver, grace: float = 20.0) -> None:
    """Ends this process, one of whose children has died. Lightning's own does it at once and without a word; here
    it has `grace` seconds to say itself what broke, as it does unless it waits for an answer through NCCL."""
    codes = {child.pid: child.returncode for child in observer._child_processes if child.returncode}
    for child in observer._child_processes:
        child.kill()
    time.sleep(grace)
    reason = ", ".join(f"process {pid}: exit code {code}" for pid, code in codes.items())
    print(LOST.format("", reason), file=sys.stderr, flush=True)
    os._exit(1)


class Agreement:
    """Whether any device was told to stop. The question goes round beside the training, and its answer is looked
    at when the next is asked, which is at the same step on every device: nobody waits for it."""

    def __init__(self) -> None:
        # of its own, on the CPU: one of GPUs would have to wait for all that they have in hand
        self.group = dist.new_group(timeout=TIME_LIMIT, backend="gloo") if dist.is_initialized() else None
        self.asked: tuple[Any, Tensor] | None = None

    def any(self, told: bool) -> bool:
        if self.group is None:
            return told
        answer = self.answer()
        asked = torch.tensor(float(told))
        self.asked = dist.all_reduce(asked, dist.ReduceOp.MAX, self.group, async_op=True), asked
        return answer

    def answer(self) -> bool:
        """To the last question; it is answered when it is asked no more."""
        if self.asked is None:
            return False
        work, asked = self.asked
        work.wait()
        self.asked = None
        return bool(asked)


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer state in shards, as LitMoE.configure_model lays them out.

    A checkpoint is a folder of shards (shards.py); one file, or a folder that more or fewer devices wrote, is read
    as well.
    """

    # Lightning's own gather whole tensors, and leave the optimizer to the strategy: here the state is that of any
    # other run, but for tensors that are sharded

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return state | {"state": {i: dict(tensors) for i, tensors in state["state"].items()}}  # those are in use

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Written beside and renamed: what stands at `filepath` is whole, or is not there."""
        path = Path(self.broadcast(filepath))
        beside = path.with_name(path.name + ".tmp")
        if self.is_global_zero:
            remove(beside)
            beside.mkdir(parents=True)
        self.barrier()
        shards.write(beside, shards.take_shards(checkpoint))
        if self.is_global_zero:
            write_checkpoint(beside / shards.REST, checkpoint)
            put_in_place(path, beside)
            fsync_folder(path.parent)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, of each tensor the shard that this device keeps."""
        path = Path(self.broadcast(checkpoint_path))
        is_folder = shards.is_folder(path)
        checkpoint = read_rest(path)
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(checkpoint)  # names what does not fit; Lightning asks too late
        named = shards.take_shards(self.template(checkpoint["moepp"]))
        if is_folder:
            if damage := self.find_damage(path):
                raise InputError(f"{path}: is damaged ({damage})")
            shards.read_shards(path, named)
        else:
            whole = {name: there[key] for name, there, key in shards.tensors_of(checkpoint)}
            named = {name: as_shards(whole[name], like) for name, like in named.items()}
        shards.put_back(checkpoint, named)
        return checkpoint

    def template(self, described: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint with all tensors that this run would write, those of the optimizer empty."""
        assert self.lightning_module is not None
        template: dict[str, Any] = {"moepp": described, "state_dict": self.lightning_module.state_dict()}
        for optimizer in self.optimizers:
            parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
            empty = [{key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} for p in parameters]
            template["optimizer_states"] = [{"state": dict(enumerate(empty))}]
        return template

    def find_damage(self, path: Path) -> str | None:
        """What `shards.find_damage` finds, each device looking at its part of the files."""
        found: list[str | None] = [None] * self.world_size
        dist.all_gather_object(found, shards.find_damage(path, self.global_rank, self.world_size))
        return next(filter(None, found), None)
