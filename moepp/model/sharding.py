"""A model spread over ranks: parameters sharded by block (FSDP2), FFN experts besides over the ranks of an expert
mesh (dispatch.py).

Ranks in a row are N of `expert` within `shard` within `replica`. The tokens of every rank are its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import MoEConfig, TransformerConfig, require


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share what. Dense parameters are sharded over all ranks of a copy of the model, the experts
    that `expert` leaves to a rank over those ranks of the copy that have the same experts.

    Args:
        expert: ranks that the FFN experts of a layer are spread over; router, attention and zero-computation
            experts are on every rank.
        replicas: whole copies of the model, whose gradients alone are averaged: for machines between which
            parameters should not be gathered.
        sharded: whether the model is, which --trainer.strategy=fsdp2 sets.
    """

    expert: int = 1
    replicas: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("expert", "replicas"):
            number = getattr(self, name)
            require(number >= 1, f"parallel.{name}", number, "must be at least 1")
            require(number == 1 or self.sharded, f"parallel.{name}", number, "needs --trainer.strategy=fsdp2")

    def require_fits(self, transformer: TransformerConfig, moe: MoEConfig, world_size: int) -> None:
        """Raise an InputError where experts, ranks, or the rows of an expert cannot be divided so."""
        require(moe.n_ffn % self.expert == 0, "parallel.expert", self.expert, f"must divide moe.n_ffn={moe.n_ffn}")
        ranks = self.expert * self.replicas
        name = "parallel.expert" if self.replicas == 1 else "parallel.expert x replicas"
        require(world_size % ranks == 0, name, ranks, f"must divide the {world_size} devices")
        if self.sharded:
            shards = world_size // ranks
            for size in ("hidden_size", "intermediate_size"):
                value = getattr(transformer, size)
                require(
                    value % shards == 0, f"transformer.{size}", value, f"must be a multiple of {shards} shards"
                )


def shard(
    model: Any, parallel: ParallelConfig, device: torch.device, matrix_dtype: torch.dtype | None = None
) -> None:
    """Shard a Transformer, in place. On the meta device it takes no memory before its `materialize`.

    Args:
        model: a Transformer.
        parallel: which fits the ranks that there are.
        device: of this rank.
        matrix_dtype: what the matrices of attention and experts are gathered in, where autocast would cast them;
            all else, and every gradient, is in the parameters' own.

    Raises:
        InputError: experts or ranks cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    world_size = dist.get_world_size()
    parallel.require_fits(model.config, model.moe_config, world_size)
    shards = world_size // (parallel.expert * parallel.replicas)
    shape = parallel.replicas, shards * parallel.expert
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))
    expert_shape = parallel.replicas, shards, parallel.expert
    expert_mesh = init_device_mesh(device.type, expert_shape, mesh_dim_names=("replica", "shard", "expert"))
    dense, experts = (
        (each["shard"] if parallel.replicas == 1 else each["replica", "shard"]) for each in (mesh, expert_mesh)
    )
    # reduced in float32, whatever they are gathered in
    reduced = None if matrix_dtype is None else torch.float32
    of_matrices = MixedPrecisionPolicy(matrix_dtype, reduced, cast_forward_inputs=False)
    of_others = MixedPrecisionPolicy(cast_forward_inputs=False)

    def by_row(parameter: nn.Parameter) -> Shard:
        """Of stacked experts each one's rows, as there may be fewer experts than ranks."""
        return Shard(1 if parameter.dim() == 3 else 0)

    # constant experts' where there are none: FSDP cannot reduce gradients of no elements
    empty = {parameter for parameter in model.parameters() if parameter.numel() == 0}
    for block in model.blocks:
        matrices, ffn = [block.attention.qkv, block.attention.output], block.moe.ffn
        if parallel.expert == 1:
            matrices.append(ffn)
        else:
            ffn.ranks = expert_mesh["expert"].get_group()
            for name, parameter in list(ffn.named_parameters()):
                part = distribute_tensor(parameter, expert_mesh["expert"], [Shard(0)], src_data_rank=None)
                ffn.register_parameter(name, nn.Parameter(part))
            fully_shard(ffn, mesh=experts, mp_policy=of_matrices, shard_placement_fn=by_row)
        fully_shard(matrices, mesh=dense, mp_policy=of_matrices, shard_placement_fn=by_row)
        # norms and routers, in float32. In the root's group they would save a gather a block, but the head's
        # gradient, which is in it, would stay whole until the first block's are there
        fully_shard(block, mesh=dense, mp_policy=of_others, ignored_params=empty)
    if not model.config.tie_embeddings:  # whole for its forward pass alone: nothing needs it in backward
        fully_shard(model.embedding, mesh=dense, mp_policy=of_others)
        model.embedding.set_unshard_in_backward(False)
    fully_shard(model, mesh=dense, mp_policy=of_others, ignored_params=empty)
    register_fsdp_forward_method(model, "hidden")


def local(tensor: Tensor) -> Tensor:
    """The shard on this rank, the same memory; of a tensor that is not sharded all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_shards(whole: Tensor, like: Any) -> Tensor:
    """What this rank keeps of a tensor that every rank has, as `like` is sharded; where it is not, all of it."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
