"""Two and four devices train as one does; their checkpoints go from any number of devices to any other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from moepp.cli import main
from moepp.training.checkpoint import last_checkpoint, load, read_checkpoint, step_path
from moepp.training.devices import spare_copies
from tests.conftest import assert_same, read_csv, tiny
from tests.ranks import Ranks

STEPS = 20
LAYOUTS = {  # (processes, top-k, options): as many sequences a step as one process of 8
    "ddp": (2, 2, ["--trainer.strategy=ddp"]),
    "fsdp2": (2, 2, ["--trainer.strategy=fsdp2", "--model.checkpoint_activations=true"]),
    "expert parallel": (2, 1, ["--trainer.strategy=fsdp2", "--model.parallel.expert=2"]),
    "replicas": (4, 3, ["--trainer.strategy=fsdp2", "--model.parallel.replicas=2", "--model.parallel.expert=2"]),
}


def options(text: Path, folder: Path, processes: int, *more: str) -> list[str]:
    """A run of STEPS steps whose gradients are clipped, with a checkpoint in the middle."""
    return [
        *tiny(text),
        f"--data.batch_size={8 // processes}",
        f"--data.out_root={text.parent / 'prepared'}",
        f"--trainer.devices={processes}",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_steps={STEPS}",
        "--trainer.precision=32-true",
        "--trainer.val_check_interval=10",
        "--trainer.gradient_clip_val=0.5",
        *more,
    ]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def alone(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By top-k the run of one process."""
    folders = {top_k: tmp_path_factory.mktemp("alone") / "run" for top_k in (1, 2, 3)}
    for top_k, folder in folders.items():
        assert main(["fit", *options(text_file, folder, 1, f"--model.moe.top_k={top_k}")]) == 0
    return folders


def fit(ranks: Ranks, processes: int, arguments: list[str]) -> None:
    assert ranks.run(processes, main, ["fit", *arguments]) == [0] * processes


def assert_same_end(run: Path, other: Path, tolerance: float = 1e-3) -> None:
    """Weights and AdamW's averages: of each tensor the largest difference against its largest value."""
    one, two = (tensors_of(read_checkpoint(step_path(folder, STEPS))) for folder in (run, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= tolerance * value.abs().max(), name


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = checkpoint["optimizer_states"][0]["state"]
    averages = {f"{i}.{key}": value for i, each in state.items() for key, value in each.items()}
    return checkpoint["state_dict"] | averages


def assert_same_rows(run: Path, other: Path, first: int = 1) -> None:
    """Losses, gradient norms, routing and validation of each step, from the `first` on."""
    one, two = ([row for row in read_csv(folder) if int(row["step"]) >= first] for folder in (run, other))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, of_other in zip(one, two, strict=True):
        for name, value in row.items():
            if not name.startswith("speed/") and value:
                assert float(of_other[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-6), (
                    name,
                    row["step"],
                )


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.heavy] * (LAYOUTS[name][0] > 2)) for name in LAYOUTS]
)
def test_as_one_process_of_as_large_a_batch(
    layout: str, ranks: Ranks, alone: dict[int, Path], text_file: Path, tmp_path: Path
) -> None:
    processes, top_k, more = LAYOUTS[layout]
    more = [f"--model.moe.top_k={top_k}", *more]
    run = tmp_path / "run"
    fit(ranks, processes, options(text_file, run, processes, *more))
    assert_same_rows(alone[top_k], run)
    assert_same_end(alone[top_k], run)
    log = (run / "train.log").read_text()
    assert log.count(f"step {STEPS}/{STEPS}") == log.count("validation loss") == 1  # one log, one summary
    if layout == "ddp":  # of the others it is looked at below
        again = tmp_path / "again"
        fit(ranks, processes, [*options(text_file, again, processes, *more), f"--ckpt_path={step_path(run, 10)}"])
        assert_same_end(run, again, tolerance=0.0)


def test_ddp_makes_no_copies_unless_it_is_told_to() -> None:
    for own in ({}, {"broadcast_buffers": True, "static_graph": True}):
        strategy = DDPStrategy(**own)
        spare_copies(strategy)
        assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "broadcast_buffers": False} | own


@pytest.mark.heavy
def test_a_run_goes_on_with_more_and_fewer_devices(
    ranks: Ranks, alone: dict[int, Path], text_file: Path, tmp_path: Path
) -> None:
    """4 → 1, 4 → 2 otherwise sharded, and 1 → 4, from the middle to the same end."""
    four, sharded = tmp_path / "four", "--trainer.strategy=fsdp2"
    spread = [sharded, "--model.parallel.expert=2"]
    fit(ranks, 4, options(text_file, four, 4, *spread))
    middle = step_path(four, 10)
    assert middle.is_dir()
    assert last_checkpoint(four) == step_path(four, STEPS)
    to_one, to_two, from_one = (tmp_path / name for name in ("one", "two", "from_one"))
    assert main(["fit", *options(text_file, to_one, 1), f"--ckpt_path={middle}"]) == 0
    fit(ranks, 2, [*options(text_file, to_two, 2, sharded), f"--ckpt_path={middle}"])
    fit(ranks, 4, [*options(text_file, from_one, 4, *spread), f"--ckpt_path={step_path(alone[2], 10)}"])
    for run in (to_one, to_two, from_one):
        assert_same_rows(alone[2], run, first=11)
        assert_same_end(alone[2], run)
    # and as it was: to the last bit
    again = tmp_path / "again"
    fit(ranks, 4, [*options(text_file, again, 4, *spread), f"--ckpt_path={middle}"])
    assert_same_end(four, again, tolerance=0.0)


@pytest.mark.heavy
def test_one_file_can_be_made_of_shards(ranks: Ranks, text_file: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    fit(ranks, 2, options(text_file, run, 2, "--trainer.strategy=fsdp2", "--model.parallel.expert=2"))
    best = run / "checkpoints/best.ckpt"
    assert main(["generate", f"--ckpt={best}", "--prompt=the", "--max_new_tokens=3"]) == 0
    assert main(["export", str(tmp_path / "hub"), f"--ckpt={best}", "--format=hf"]) == 0
    assert main(["import", str(tmp_path / "hub"), str(tmp_path / "back.ckpt")]) == 0
    assert_same(*(load(path).model.state_dict() for path in (tmp_path / "back.ckpt", best)))
    assert main(["validate", *options(text_file, run, 1), f"--ckpt_path={best}"]) == 0, capsys.readouterr().err
    # in its own folder the run goes on in one process, in one file, and sharded again
    for processes, more in ((1, "--trainer.max_steps=21"), (2, "--trainer.max_steps=22")):
        arguments = [*options(text_file, run, processes, more), f"--ckpt_path={step_path(run, 19 + processes)}"]
        if processes == 1:
            assert main(["fit", *arguments]) == 0, capsys.readouterr().err
            assert step_path(run, 21).is_file()
        else:
            fit(ranks, 2, [*arguments, "--trainer.strategy=fsdp2"])
    # damage is found, named, and passed over
    last = step_path(run, 22)
    shard = max(last.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert last_checkpoint(run) == step_path(run, 21)
    assert f"checksum of {shard.name}" in capsys.readouterr().err
    shard.unlink()
    with pytest.raises(Exception, match=f"{shard.name} is missing"):
        read_checkpoint(last)
    with pytest.raises(AssertionError, match="is damaged"):
        ranks.run(2, refused_by, options(text_file, run, 2, "--trainer.strategy=fsdp2"), str(last))


def refused_by(arguments: list[str], checkpoint: str) -> None:
    from moepp.training.lightning_cli import run

    run("fit", [*arguments, f"--ckpt_path={checkpoint}"])


@pytest.mark.heavy
def test_state_falls_with_the_number_of_devices(ranks: Ranks) -> None:
    """Of parameters, gradients and AdamW's averages each device holds its part, but for what does not divide."""
    one, two, four = (ranks.run(n, held_bytes)[0] for n in (1, 2, 4))
    assert two == pytest.approx(one / 2, rel=0.01)
    assert four == pytest.approx(one / 4, rel=0.01)


def held_bytes() -> int:
    import torch.distributed as dist

    from moepp.model import MoEConfig, Transformer, TransformerConfig
    from moepp.model.sharding import ParallelConfig, local, shard
    from moepp.training.optimizer import AdamW

    dist.init_process_group("gloo")
    config = TransformerConfig(320, 2, 64, 96, 4, context_length=16)
    with torch.device("meta"):
        model = Transformer(config, MoEConfig())
    shard(model, ParallelConfig(sharded=True), torch.device("cpu"))
    model.materialize(torch.device("cpu"))
    optimizer = AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    return sum(local(tensor).nbytes for tensor in [*model.parameters(), *gradients, *states])


def test_bad_steps_are_skipped_by_all(ranks: Ranks, text_file: Path, tmp_path: Path) -> None:
    """One of two has a loss that is not finite, once: no weight moves, on neither, and training goes on."""
    more = ["--trainer.strategy=fsdp2", "--model.parallel.expert=2", "--trainer.max_steps=4"]
    more += ["--trainer.val_check_interval=1", "--checkpoints.keep=9"]
    run = tmp_path / "run"
    assert ranks.run(2, spoiled, ["fit", *options(text_file, run, 2, *more)]) == [0, 0]
    assert [float(row["train/skipped_steps"]) for row in read_csv(run) if row["train/skipped_steps"]] == [
        0,
        1,
        1,
        1,
    ]
    weights = [read_checkpoint(step_path(run, step))["state_dict"] for step in (1, 2, 3)]
    assert_same(weights[1], weights[0])
    assert not torch.equal(weights[1]["model.embedding.weight"], weights[2]["model.embedding.weight"])


def spoiled(arguments: list[str]) -> int:
    from moepp.training.module import LitMoE

    plain = LitMoE.training_step

    def training_step(self: LitMoE, batch: Any, batch_idx: int) -> Any:
        outputs = plain(self, batch, batch_idx)
        if self.trainer.global_step == 1 and self.trainer.global_rank == 1:
            outputs["loss"] = outputs["loss"] * torch.nan
        return outputs

    LitMoE.training_step = training_step  # type: ignore[method-assign]
    try:
        return main(arguments)
    finally:
        LitMoE.training_step = plain  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.parallel.expert=3"], "parallel.expert: must divide moe.n_ffn=8, got 3"),
        (["--model.parallel.expert=4"], "parallel.expert: must divide the 2 devices, got 4"),
        (["--model.parallel.expert=16"], "parallel.expert: must divide moe.n_ffn=8, got 16"),
        (["--model.parallel.expert=0"], "parallel.expert: must be at least 1, got 0"),
        (["--model.parallel.replicas=3"], "parallel.expert x replicas: must divide the 2 devices, got 3"),
        (["--model.parallel.expert=2", "--trainer.strategy=ddp"], "needs --trainer.strategy=fsdp2"),
        (
            ["--model.transformer.intermediate_size=47"],
            "intermediate_size: must be a multiple of 2 shards, got 47",
        ),
        (["--trainer.precision=16-mixed"], "does not support"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: list[str], message: str, text_file: Path, workdir: Path, capsys
) -> None:
    """Before any other process is started."""
    arguments = options(text_file, Path("run"), 2, "--trainer.strategy=fsdp2", *more)
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("run").exists()


# ---- processes that are told to stop, die or hang ------------------------------------------------------------


class Pair:
    """A run of two processes that goes on until something happens to it."""

    def __init__(self, text: Path, *more: str, script: str = "from moepp.cli import main") -> None:
        long = [
            "--trainer.max_steps=100000",
            "--trainer.val_check_interval=50000",
            "--trainer.log_every_n_steps=5",
        ]
        arguments = options(text, Path("run"), 2, *long, *more)
        Path("fit.py").write_text(f"import sys\n{script}\nsys.exit(main(sys.argv[1:]))\n")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "fit.py", "fit", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        next(line for line in self.process.stdout if line.startswith("step"))
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (self.second,) = map(int, children.read_text().split())

    def end(self, limit: float = 60.0) -> tuple[int, str]:
        """(exit code, what it wrote to stderr)"""
        code = self.process.wait(limit)
        with suppress(ProcessLookupError):
            os.kill(self.second, signal.SIGCONT)  # one that is stopped would keep the pipes open
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for a process's children in /proc")
class TestTwoProcesses:
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_a_signal_to_one_stops_both(self, strategy: str, text_file: Path, workdir: Path) -> None:
        pair = Pair(text_file, f"--trainer.strategy={strategy}")
        os.kill(pair.second, signal.SIGTERM)
        code, _ = pair.end()
        assert code == 143
        checkpoint = last_checkpoint(Path("run"))
        assert checkpoint is not None
        assert f"{checkpoint} is written" in Path("run/train.log").read_text()
        for _ in range(100):  # it ends after the first
            if not Path(f"/proc/{pair.second}").exists():
                return
            time.sleep(0.1)
        raise AssertionError("the second process goes on")

    def test_a_dead_one_ends_the_other_in_one_line(self, text_file: Path, workdir: Path) -> None:
        """Also on a machine slow enough for Lightning to see it, which looks every five seconds."""
        slow = "import time\nfrom lightning import Trainer\nfrom moepp.cli import main\n"
        slow += "Trainer._teardown = lambda trainer: time.sleep(6)"
        pair = Pair(text_file, "--trainer.strategy=fsdp2", script=slow)
        os.kill(pair.second, signal.SIGKILL)
        code, errors = pair.end()
        assert code == 1
        assert re.fullmatch("moepp: the devices lost each other.*\n", errors)

    def test_a_dead_one_that_no_collective_misses(self) -> None:
        """As NCCL's do not, until their time is over."""
        script = """import subprocess, time
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from moepp.training.devices import end_after_a_child
_ChildProcessObserver._terminate_all = lambda observer: end_after_a_child(observer, grace=0.1)
children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
children[1].kill()
_ChildProcessObserver(0, children, sleep_period=0).start()
time.sleep(60)"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
        assert ended.returncode == 1
        assert re.search(r"\nmoepp: the devices lost each other.*process \d+: exit code -9.*\n$", ended.stderr)

    def test_a_port_that_is_taken(self, text_file: Path, workdir: Path, alone: dict[int, Path]) -> None:
        """Also where a run goes on; and no process is left that waits for the first."""
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            taken.listen()
            port = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1]), "OMP_NUM_THREADS": "1"}
            arguments = options(text_file, Path("run"), 2, "--trainer.strategy=ddp")
            begun = f"--ckpt_path={step_path(alone[2], 10)}"
            command = [sys.executable, "-m", "moepp", "fit", *arguments, begun]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | port
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert re.fullmatch("moepp: the devices lost each other.*address already in use.*\n", ended.stderr)

    def test_one_that_hangs_is_not_waited_for_forever(self, text_file: Path, workdir: Path) -> None:
        short = "from datetime import timedelta\nfrom moepp.training import devices\nfrom moepp.cli import main\n"
        short += "devices.TIME_LIMIT = timedelta(seconds=24)"  # on a slow machine they start ten apart
        pair = Pair(text_file, "--trainer.strategy=ddp", script=short)
        os.kill(pair.second, signal.SIGSTOP)
        begun = time.monotonic()
        code, errors = pair.end()
        assert code == 1
        assert "was waited for longer than 0.4 minutes" in errors
        assert time.monotonic() - begun < 52
