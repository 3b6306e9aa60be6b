"""moepp: train MoE++, mixture-of-experts with zero-computation experts.

The names below are imported when they are first used, so that `import moepp` and `moepp --help` stay instant.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepp.model import MoEConfig, MoELayer, Transformer, TransformerConfig, load_foreign, load_released

__version__ = "0.1.0"
__all__ = ["MoEConfig", "MoELayer", "Transformer", "TransformerConfig", "load_foreign", "load_released"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import moepp.model

        return getattr(moepp.model, name)
    raise AttributeError(f"module 'moepp' has no attribute {name!r}")
