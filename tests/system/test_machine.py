import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moepp.system import machine
from moepp.system.machine import commit, default_precision, peak_flops

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from moepp.system.machine import keep_freed_memory
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


def test_the_commit_is_that_of_the_source_and_not_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "moepp" / "system" / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(source))
    source.parent.mkdir(parents=True)
    assert commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert commit() == head
    source.touch()
    assert commit() == f"{head} with changes"
    monkeypatch.setattr(machine, "__file__", str(tmp_path / ".venv" / "moepp" / "system" / "machine.py"))
    (tmp_path / ".venv").mkdir()
    assert commit() == "unknown"


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [  # NVIDIA's data sheets: tensor cores without sparsity, and float32 without tensor cores, where known
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, None),
        ("NVIDIA H200", 989e12, None),
        ("NVIDIA H200 NVL", 835e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("of tomorrow", None, None),
    ],
)
def test_peak_of_a_gpu(
    name: str, half: float | None, single: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda *_: True)
    peak_flops.cache_clear()
    for precision in ("bf16-mixed", "16-mixed", "bf16-true", "16-true"):
        assert peak_flops(torch.device("cuda"), precision) == (half and pytest.approx(half, rel=2e-3))
    assert peak_flops(torch.device("cuda"), "32-true") == (single and pytest.approx(single, rel=2e-2))
    peak_flops.cache_clear()


def test_a_cpu_has_no_data_sheet() -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "32-true"),
        ({}, "32-true"),  # not of this kind at all
    ],
)
def test_a_cpu_that_multiplies_bf16_trains_in_it(
    capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert default_precision(torch.device("cpu")) == precision
