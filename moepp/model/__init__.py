"""MoE++ in plain PyTorch: copy this folder into any trainer."""

from moepp.model.config import MoEConfig, TransformerConfig
from moepp.model.counts import ParameterCount, count_parameters, flops_per_token
from moepp.model.errors import InputError
from moepp.model.loss import linear_cross_entropy, nll_by_token
from moepp.model.moe import MoELayer
from moepp.model.released import export_released, load_released
from moepp.model.router import Routing, mean_load_balance_loss
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
    "linear_cross_entropy",
    "load_released",
    "mean_load_balance_loss",
    "nll_by_token",
]
