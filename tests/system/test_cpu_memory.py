import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from moepp.system.cpu_memory import keep_freed_memory
    keep_freed_memory(torch.device("cpu"))
for _ in range(16):
    torch.zeros(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs Linux with glibc"
)
def test_a_large_tensor_gets_the_memory_of_the_one_before() -> None:
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    faults = {}
    for what in ("keep", "hand back"):
        command = [sys.executable, "-c", FAULTS, what]
        faults[what] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert faults["keep"] < 100
    assert faults["hand back"] > 4 * 2**26 / 2**16  # 64 MB four times, in pages of at most 64 kB
