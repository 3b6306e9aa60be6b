"""MoE++ in plain PyTorch: copy this folder into any trainer."""

from moepp.model.config import MoEConfig, TransformerConfig
from moepp.model.counts import ParameterCount, count_parameters, flops_per_token
from moepp.model.errors import InputError
from moepp.model.moe import MoELayer
from moepp.model.released import export_released, load_released
from moepp.model.router import Routing
from moepp.model.transformer import KVCache, Output, Transformer

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
    "count_parameters",
    "export_released",
    "flops_per_token",
    "load_released",
]
