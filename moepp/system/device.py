"""What a device is called, and what it can do at most."""

from functools import cache

import torch
from lightning.fabric.utilities.throughput import get_available_flops

HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
# bf16 and fp16, of NVIDIA's data sheets. Lightning's table has these cards with sparsity or in pairs, twice what a
# matrix product can reach, and does not know the name "NVIDIA H200".
HALF_FLOPS = {"H100 NVL": 835.5e12, "H200 NVL": 835.5e12, "H200": 989.5e12}


@cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at this precision, without sparsity; None where nobody has written it down."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for chip, flops in HALF_FLOPS.items():
        if chip in name:
            return flops if precision in HALF else None
    return get_available_flops(device, HALF.get(precision, torch.float32))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
