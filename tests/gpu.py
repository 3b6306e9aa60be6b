"""`make gpu`: what a GPU has to show, in one command that needs no network.

Each part is a process of its own with a log, and ends within ten minutes, the most that some machines are lent
for at a time; --seconds ends all of it as soon. Whatever fails, the rest goes on. What is done is not repeated:
called again, it does what is missing, and a study goes on where it was. What there is to publish is packed after
each part. --toy rehearses the same parts in small, on any machine.

Where there is no network the text has to be prepared beforehand (`moepp prepare data/corpus.yaml`), or the parts
that train on it fail.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moepp.model import InputError
from moepp.system.machine import device_name, provenance
from tests.bench.command import SECTIONS
from tests.conftest import RECIPES, small_text

LIMIT = 570  # seconds of a part
LEAST = 60  # with fewer left no part is begun
GRACE = 25  # to write a checkpoint in, once it is told to stop
PACKING = 10  # of all that is left at the end
PROFILER = "lightning.pytorch.profilers.PyTorchProfiler"
LEFT_OUT = (".ckpt", ".bin", ".tmp")  # of what is packed to be published
# 61M active parameters of MoE++'s 0.25B: nine runs and their checkpoints fit ten minutes or so, and the disk
SIZES = ["--model.transformer.n_layers=6", "--model.moe.n_ffn=8"]
ONCE = ["--trainer.val_check_interval=300", "--checkpoints.keep=1"]  # 3 GB each
# what runs without the packages of the command line, which the machine may lack
CUDA_TESTS = ["tests/model", "tests/training/test_module.py", "tests/bench/test_bench.py"]


@dataclass(frozen=True)
class Part:
    """A command and what it shows."""

    name: str
    shows: str
    command: list[str]  # of python -m


def parts(out: Path, data: Path, toy: bool) -> list[Part]:
    """All of them, the quickest to tell something is wrong first."""
    base = RECIPES / ("quick.yaml" if toy else "gpu.yaml")
    text = [f"--data.path={data}", *(["--data.vocab_size=320"] if toy else [])]
    gpu = [] if toy else ["--trainer.accelerator=gpu", "--trainer.deterministic=true"]
    bench = ["tests.bench", *(["--size=toy", "--quick"] if toy else [])]
    study = ["ablate", f"--matrix={RECIPES / 'compare.yaml'}", f"--base={base}", f"--out={out / 'compare'}"]
    study += ["--trainer.max_steps=4", "--seeds=1"] if toy else ["--trainer.max_steps=600", *SIZES, *ONCE]
    profile = ["fit", f"--config={base}", f"--trainer.default_root_dir={out / 'profile' / 'run'}"]
    profile += [f"--trainer.profiler={PROFILER}", f"--trainer.profiler.dirpath={out / 'profile'}"]
    profile += ["--trainer.profiler.filename=trace", "--trainer.max_steps=12"]
    # hooks of the profiler on every module would keep the blocks from being compiled
    profile += ["--trainer.profiler.record_module_names=false", "--trainer.enable_checkpointing=false"]
    return [
        Part("cuda", "the tests of the CUDA paths", ["pytest", "-m", "cuda", "-rs", *CUDA_TESTS]),
        Part("resume", "a killed run ends as if nobody had killed it", ["tests.soak", "--kills=4", *gpu]),
        *(
            Part(f"bench-{name}", "speed", [*bench, f"--only={name}", f"--out={out / 'bench' / name}"])
            for name in SECTIONS
        ),
        Part("profile", "where a training step's time goes", ["moepp", *profile, *text]),
        Part("compare", "vanilla MoE against MoE++", ["moepp", *study, *text]),
    ]


def run(part: Part, out: Path, limit: float) -> str:
    """done, failed, or unfinished: it was stopped at the limit, and may go on when it is called again."""
    command = [sys.executable, "-m", *part.command]
    with (out / f"{part.name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return "done" if process.wait(limit) == 0 else f"failed: {log.name}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return "unfinished"
        finally:
            with suppress(ProcessLookupError):  # and whatever it has begun, which would slow the next part down
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pack(out: Path) -> Path:
    """All but weights and tokens, in one file beside the folder."""
    path = out.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(out, out.name, filter=lambda info: None if info.name.endswith(LEFT_OUT) else info)
    return path


def main() -> int:
    parser = argparse.ArgumentParser("make gpu", description="what a GPU has to show, in parts of ten minutes")
    parser.add_argument("--data", type=Path, help="folder of prepared text (default: that of data/corpus.yaml)")
    parser.add_argument("--only", metavar="A,B", help="these parts alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to end within, where it is cut off")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--toy", action="store_true", help="rehearse it in small, on any machine")
    parser.add_argument("--out", type=Path, help="default: runs/gpu, or runs/gpu-toy")
    options = parser.parse_args()
    out = options.out or Path("runs", "gpu-toy" if options.toy else "gpu")
    if not options.toy and not torch.cuda.is_available():
        raise InputError("there is no GPU here; --toy rehearses it without one")
    if options.again:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    chosen = parts(out, options.data or text_for(out, options.toy), options.toy)
    names = [part.name for part in chosen]
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        raise InputError(f"only: no part {min(unknown)!r}: use {', '.join(names)}")

    end = time.perf_counter() + options.seconds - GRACE - PACKING
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part at hand, too
    console = Console(width=None if sys.stdout.isatty() else 140)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(title=f"{device_name(device)}, torch {torch.__version__}, {provenance()['commit'][:12]}")
    for title in ("part", "shows", "", "seconds"):
        table.add_column(title)
    good = True
    for part in [part for part in chosen if part.name in wanted]:
        done = out / f"{part.name}.done"
        begun = time.perf_counter()
        if done.is_file():
            result = "done before"
        elif (limit := min(LIMIT, end - begun)) < LEAST:
            result = "no time left"
        else:
            console.print(f"{part.name} …")
            result = run(part, out, limit)
            if result == "done":
                done.touch()
            pack(out)  # the end may not come
        good &= done.is_file()
        table.add_row(part.name, part.shows, result, f"{time.perf_counter() - begun:.0f}")
        with (out / "summary.txt").open("w") as file:  # whatever cuts it off, what was measured is kept
            Console(file=file, width=140).print(table)
    console.print(table)
    print(pack(out))
    return 0 if good else 1


def text_for(out: Path, toy: bool) -> Path:
    """A few sentences, or the default corpus as it was prepared. If it was not, its list, which a run can prepare
    where there is a network."""
    if toy:
        path = out / "small.txt"
        path.write_text(small_text())
        return path
    prepared = sorted(Path("data", "prepared").glob("corpus-v8192-*"))
    return prepared[-1] if prepared else Path("data", "corpus.yaml")


if __name__ == "__main__":
    from moepp.cli import one_line_errors

    codes: list[int] = []
    code = one_line_errors("gpu", lambda: codes.append(main()))
    sys.exit(code or codes[0])
