"""The balance loss in a model of transformers, whose own knows nothing of τ."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moepp.model import InputError, mean_load_balance_loss

from .modeling_moepp import share_of_step
from .modules import Pathway, SwappedBlock


def balance_loss(model: nn.Module) -> Tensor:
    """L_b of the last forward pass, the mean over layers: a scalar with a gradient, padding counted as well.

    While `model` trains, β·L_b is in the loss that it returns. Add it yourself where you make your own loss of the
    logits.

    Raises:
        InputError: `swap_moe` has not been here, or nothing has been computed since.
    """
    for module in model.modules():
        pathway = getattr(module, "pathway", None)
        if isinstance(pathway, Pathway) and pathway.routings:
            return mean_load_balance_loss(pathway.routings)
    raise InputError("balance_loss: no forward pass of a model that swap_moe has changed")


def with_balance(decoder: nn.Module, theirs: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`theirs`, the loss function (logits, labels, ...) of `decoder`'s model, and while it trains β·L_b on top.

    Trainer adds up the losses of a step's micro-batches. With `num_items_in_batch`, how many labels the step has,
    each counts by its share of the labels, and so must its L_b; without, Trainer divides both. Either way a step's
    loss has a mean of L_b, over processes as well.
    """
    loss = theirs(*args, **kwargs)
    if not decoder.training:
        return loss
    beta = next(block.moe for block in decoder.modules() if isinstance(block, SwappedBlock)).balance_weight
    labels = args[1:2]  # or by name, among the others
    return loss + beta * share_of_step(*labels, **kwargs) * balance_loss(decoder)
