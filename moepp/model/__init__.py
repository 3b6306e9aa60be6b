"""MoE++ in plain PyTorch: the layer, a transformer of such layers, their loss, and text from them.

Nothing here knows of a trainer, and nothing but torch and safetensors is imported: copy this folder into yours.
"""

from .config import MoEConfig, TransformerConfig
from .conversion import add_zero_computation, upcycle
from .counts import (
    ParameterCount,
    count_parameters,
    flops_per_token,
    hidden_flops_per_token,
    training_flops_per_token,
)
from .errors import InputError
from .foreign import load_foreign
from .hub import export_hub, load_hub
from .loss import linear_cross_entropy, linear_distillation, nll_by_token
from .moe import MoELayer
from .released import export_released, load_released
from .router import Routing, mean_load_balance_loss
from .transformer import KVCache, Output, Transformer

__all__ = [
    "InputError",
    "KVCache",
    "MoEConfig",
    "MoELayer",
    "Output",
    "ParameterCount",
    "Routing",
    "Transformer",
    "TransformerConfig",
    "add_zero_computation",
    "count_parameters",
    "export_hub",
    "export_released",
    "flops_per_token",
    "hidden_flops_per_token",
    "linear_cross_entropy",
    "linear_distillation",
    "load_foreign",
    "load_hub",
    "load_released",
    "mean_load_balance_loss",
    "nll_by_token",
    "training_flops_per_token",
    "upcycle",
]
