"""Autocast, for what it does not know: our own autograd functions."""

import torch
from torch import Tensor


def to_autocast(tensor: Tensor) -> Tensor:
    """In the dtype of autocast where that is on for the tensor's device, else as it is."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
