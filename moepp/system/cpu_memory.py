"""Memory of a training process on a CPU."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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
