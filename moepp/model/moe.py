"""The MoE++ layer: route, compute, combine."""

from torch import Tensor, nn

from .autocast import to_autocast
from .config import MoEConfig
from .experts import FFNExperts, ZeroComputationExperts
from .init import draw_seed, init_parameters
from .router import Router, Routing


class MoELayer(nn.Module):
    """Mixture of FFN and zero-computation experts (the paper's §3; vanilla MoE with the switches off).

    Args:
        hidden_size: D.
        intermediate_size: H of each SwiGLU expert.
        moe: experts, router and balance.
        first: the layer is the first of its stack and never receives `previous_logits`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, moe: MoEConfig, first: bool = False) -> None:
        super().__init__()
        seed = draw_seed()
        self.moe = moe
        self.router = Router(hidden_size, moe, first)
        self.ffn = FFNExperts(hidden_size, intermediate_size, moe)
        self.zero_computation = ZeroComputationExperts(hidden_size, moe) if moe.n_zero_computation else None
        init_parameters(self, seed)

    def forward(self, x: Tensor, previous_logits: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (..., D) → y (..., D) and the routing of its T tokens.

        `previous_logits` (T, E) are the `routing.logits` of the layer before. Capacity, where it is set, serves
        earlier positions first, the last dimension but one being the position.
        """
        x_BSD = x.reshape(x.shape[:-2].numel(), *x.shape[-2:]) if x.dim() > 1 else x.view(1, 1, -1)
        routing = self.router(x_BSD, previous_logits)
        x_TD = to_autocast(x_BSD.flatten(0, 1))
        if self.moe.scale_expert_input != 1.0:
            x_TD = x_TD * self.moe.scale_expert_input
        return self.experts(x_TD, routing).view_as(x), routing

    def experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D): what the experts of a routing that is given make of its tokens."""
        terms = None if self.zero_computation is None else self.zero_computation(x_TD, routing)
        return self.ffn(x_TD, routing, terms)
