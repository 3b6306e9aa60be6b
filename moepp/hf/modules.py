"""What modules of transformers become: theirs by class and by parameters, ours by what they compute.

A module stays the object that it is and gets a class that is ours first and then its own (`become`). So names,
parameters, hooks and every `isinstance` hold, by which transformers finds the router's logits.

Decoder layers hand on hidden states alone, and gradient checkpointing computes layers again during the backward
pass, the last first. So the previous layer's logits are an argument of the layer's `forward`, which checkpointing
keeps for the second time, and what is computed the second time is recorded nowhere.

B sequences, S positions, T = B·S tokens, D hidden size, E experts, F FFN experts, H intermediate size, G = 2H.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moepp.model import InputError, MoEConfig, Routing
from moepp.model.autocast import to_autocast
from moepp.model.experts import Terms, ZeroComputationExperts, ffn_experts
from moepp.model.router import Router


def become(module: Any, ours: Any) -> None:
    """Give the module a class that is `ours` first. Its name stays, which FSDP and accelerate look for."""
    module.__class__ = mixed(ours, module.__class__)


@cache
def mixed(ours: Any, theirs: Any) -> Any:
    return type(theirs.__name__, (ours, theirs), {})


class Pathway:
    """The routings of one forward pass, layer by layer, and whether that pass has a gradient.

    No list or mapping: accelerate would hand each layer a copy of it.
    """

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.has_gradient = torch.is_grad_enabled()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pathway":
        return Pathway()  # copied models start afresh: tensors with a graph cannot be copied


def begin_pathway(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the decoder's forward: a pathway of its own, which the decoder hands on to all of its layers."""
    if getattr(model, "_is_replica", False):
        raise InputError("nn.DataParallel is not supported: start with torchrun, or with one GPU visible")
    model.pathway = Pathway()  # type: ignore[assignment]
    return args, kwargs | {"pathway": model.pathway}


class SwappedLayer(nn.Module):
    """A decoder layer that gives its block the previous layer's logits."""

    mlp: "SwappedBlock"

    def __call__(self, *args: Any, pathway: Pathway, **kwargs: Any) -> Any:
        """Outside of what checkpointing computes twice."""
        routings = pathway.routings
        self.mlp.pathway = pathway
        try:
            return super().__call__(*args, previous_logits_TE=routings[-1].logits if routings else None, **kwargs)
        finally:
            self.mlp.pathway = None

    def forward(self, *args: Any, previous_logits_TE: Tensor | None, **kwargs: Any) -> Any:
        self.mlp.previous_logits_TE = previous_logits_TE
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.mlp.previous_logits_TE = None


class SwappedBlock(nn.Module):
    """`mlp`: route, compute, combine, as in moepp.model.MoELayer."""

    moe: MoEConfig
    gate: nn.Module
    experts: nn.Module
    zero_computation: ZeroComputationExperts | None
    pathway: Pathway | None
    previous_logits_TE: Tensor | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        _, routing = self.gate(hidden_states, self.previous_logits_TE)
        if self.pathway is not None:
            if self.pathway.has_gradient and not torch.is_grad_enabled():
                raise InputError("gradient checkpointing with use_reentrant=True loses gradients of the router")
            self.pathway.routings.append(routing)
        x_TD = to_autocast(hidden_states.flatten(0, 1))
        terms = None if self.zero_computation is None else self.zero_computation(x_TD, routing)
        return self.experts(x_TD, routing, terms).view_as(hidden_states)


class SwappedRouter(Router):
    """`gate`: our router, whose rows are `weight` (F, D), which is theirs, and `added` (E - F, D)."""

    weight: nn.Parameter
    added: nn.Parameter | None

    def matrices(self) -> list[Tensor]:
        return [self.weight if self.added is None else torch.cat([self.weight, self.added])]

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, previous_logits_TE: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """(T, E) the scores, which transformers records as `router_logits`, and the routing."""
        routing = super().forward(x_BSD, previous_logits_TE)
        return routing.scores, routing


class SwappedExperts(nn.Module):
    """`experts`: gate_up_proj (F, G, D) and down_proj (F, D, H) through our kernels."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, x_TD: Tensor, routing: Routing, terms: Terms | None) -> Tensor:
        return ffn_experts(x_TD, routing, self.gate_up_proj, self.down_proj, terms)
