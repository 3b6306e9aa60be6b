"""A sharded model computes what one process computes, compiled and with activations computed again, too."""

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moepp.model import MoEConfig, Transformer, TransformerConfig, linear_cross_entropy, mean_load_balance_loss
from moepp.model.sharding import ParallelConfig, shard
from tests.ranks import Ranks

CONFIG = TransformerConfig(128, 3, 32, 48, 4, context_length=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.end()


def loss_of(model: Transformer, tokens_BS: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden_BSD, routings = model.hidden(tokens_BS[:, :-1])
        targets_N = tokens_BS[:, 1:].flatten()
        loss = linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head.weight, targets_N)
        return loss + 0.01 * mean_load_balance_loss(routings)


def difference(parallel: ParallelConfig, moe: MoEConfig, bf16: bool, compiled: bool) -> float:
    """The largest of all gradients', of the largest value in each. Weights are drawn alike."""
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = Transformer(CONFIG, moe)
    torch.manual_seed(0)
    with torch.device("meta"):
        sharded = Transformer(CONFIG, moe)
    if compiled:
        for block in sharded.blocks:
            block.compile(backend="eager")  # what could go wrong is the tracing
        sharded.checkpoint_activations = True
    shard(sharded, parallel, CPU, torch.bfloat16 if bf16 else None)
    sharded.materialize(CPU)
    for name, value in sharded.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(value, whole.state_dict()[name]), name
    tokens_BS = torch.randint(CONFIG.vocab_size, (4 * n, 17), generator=torch.Generator().manual_seed(1))
    loss_of(sharded, tokens_BS[rank::n], bf16).backward()
    with mock.patch.object(dist, "is_initialized", return_value=False):  # all tokens are here
        loss_of(whole, tokens_BS, bf16).backward()
    largest = 0.0
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if one.numel() == 0:
            continue
        gradient = other.grad.full_tensor()
        assert gradient.dtype == torch.float32, name
        largest = max(largest, float((gradient - one.grad).abs().max() / one.grad.abs().max()))
    return largest


def difference_with_ddp(static_graph: bool) -> float:
    """Likewise of DistributedDataParallel, whose static graph is told by the first step."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = Transformer(CONFIG, MoEConfig()).double()
    replica = DistributedDataParallel(copy.deepcopy(whole), static_graph=static_graph)
    tokens_BS = torch.randint(CONFIG.vocab_size, (8, 16), generator=torch.Generator().manual_seed(1))

    def backward(model: torch.nn.Module, tokens_BS: Tensor) -> None:
        output = model(tokens_BS)
        (output.logits.square().mean() + mean_load_balance_loss(output.routings)).backward()

    backward(replica, tokens_BS[dist.get_rank() :: 2])
    with mock.patch.object(dist, "is_initialized", return_value=False):
        backward(whole, tokens_BS)
    pairs = zip(whole.parameters(), replica.module.parameters(), strict=True)
    return max(float((one.grad - other.grad).abs().max()) for one, other in pairs if one.numel())


@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp_has_the_gradients_of_one_process(ranks: Ranks, static_graph: bool) -> None:
    assert max(ranks.run(2, difference_with_ddp, static_graph)) < 1e-12


@pytest.mark.parametrize(
    ("expert", "n_const", "bf16", "compiled", "tolerance"),
    [(1, 2, False, False, 1e-4), (2, 2, False, True, 1e-4), (1, 2, True, False, 2e-2), (1, 0, False, False, 1e-4)],
)
def test_gradients_of_one_process(
    ranks: Ranks, expert: int, n_const: int, bf16: bool, compiled: bool, tolerance: float
) -> None:
    parallel, moe = ParallelConfig(expert, sharded=True), MoEConfig(n_const=n_const)
    assert max(ranks.run(2, difference, parallel, moe, bf16, compiled)) < tolerance
