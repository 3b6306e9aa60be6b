import pytest
import torch

from moepp.system.device import peak_flops


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
    for precision in ("bf16-mixed", "16-mixed"):
        assert peak_flops(torch.device("cuda"), precision) == (half and pytest.approx(half, rel=2e-3))
    assert peak_flops(torch.device("cuda"), "32-true") == (single and pytest.approx(single, rel=2e-2))
    peak_flops.cache_clear()


def test_a_cpu_has_no_data_sheet() -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None
