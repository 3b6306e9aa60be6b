"""The machine, its devices and its libraries: what they are called, what they can do, and how they are set up."""

import ctypes
import logging
import os
import platform
import subprocess
import sys
import threading
import warnings
from functools import cache
from pathlib import Path

import torch

from moepp import __version__

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by how a precision's name begins
# bf16 and fp16, of NVIDIA's data sheets. Lightning's table has these cards with sparsity or in pairs, twice what a
# matrix product can reach, and does not know the name "NVIDIA H200".
HALF_FLOPS = {"H100 NVL": 835.5e12, "H200 NVL": 835.5e12, "H200": 989.5e12}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@cache
def provenance() -> dict[str, str]:
    """What a result came from: versions, the source's commit, and the machine."""
    return {
        "moepp": __version__,
        "commit": commit(),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The source's, and whether it had been changed since; "unknown" where it is no clone."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.check_output(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], text=True, stderr=subprocess.DEVNULL
        )
        top, head = found.splitlines()
        if Path(top) != root:  # installed within a repository of others
            return "unknown"
        changes = subprocess.check_output([*git, "status", "--porcelain", ":/moepp", ":/recipes"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changes else "")


def default_precision(device: torch.device) -> str:
    """Lightning's name of the precision to train in where nobody says: bf16 where the device multiplies it."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        bf16 = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
    return "bf16-mixed" if bf16 else "32-true"


def product_dtype(precision: str) -> torch.dtype:
    """What matrix products are computed in, under a precision as Lightning names it."""
    return DTYPES.get(precision.partition("-")[0], torch.float32)


@cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at this precision, without sparsity; None where nobody has written it down."""
    if device.type != "cuda":
        return None
    name, dtype = torch.cuda.get_device_name(device), product_dtype(precision)
    for chip, flops in HALF_FLOPS.items():
        if chip in name:
            return flops if dtype in (torch.bfloat16, torch.float16) else None
    from lightning.fabric.utilities.throughput import get_available_flops  # with all of Lightning

    return get_available_flops(device, dtype)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{(n := torch.get_num_threads())} CPU thread{'s' * (n > 1)}"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: have glibc keep what is freed for the next tensor, instead of handing it back to the system.

    Otherwise each tensor of over 32 MB, such as the stacked gradients of 64 experts, is fresh memory in every
    step, and the page faults cost as much as a product: 64 experts took 1.5 times the time of 8, and now take 1.2
    (recipes/results/LOG.md). Does nothing where there is another C library, nor for a GPU, whose host memory is
    better handed back.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_lightning() -> None:
    """Silence its notes on unused GPUs, few workers and where else to log."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    # of TensorBoard's writing thread, on a full disk: whoever logs next is told of it as well
    threading.excepthook = lambda died: None if died.exc_type is OSError else threading.__excepthook__(died)
