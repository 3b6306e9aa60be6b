"""Our model among transformers' own: its Auto classes open exported folders without `trust_remote_code`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_moepp import MoeppConfig
from .modeling_moepp import MoeppForCausalLM, MoeppModel

AutoConfig.register(MoeppConfig.model_type, MoeppConfig, exist_ok=True)
for auto, model in ((AutoModel, MoeppModel), (AutoModelForCausalLM, MoeppForCausalLM)):
    auto.register(MoeppConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)  # what they save has the code beside it, for those without moepp
MoeppConfig.register_for_auto_class()
