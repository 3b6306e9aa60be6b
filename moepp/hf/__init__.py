"""Where people use transformers: our layer inside its own models, and our models among its own."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError("moepp.hf needs transformers: pip install 'moepp[hf]'") from None

from moepp.model.conversion import set_bias

from .added import load_added
from .loss import balance_loss
from .registration import MoeppConfig, MoeppForCausalLM, MoeppModel
from .schedule import BiasSchedule
from .swap import swap_moe

__all__ = [
    "BiasSchedule",
    "MoeppConfig",
    "MoeppForCausalLM",
    "MoeppModel",
    "balance_loss",
    "load_added",
    "set_bias",
    "swap_moe",
]
