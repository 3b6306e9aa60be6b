"""Experts spread over ranks do what they do in one process: outputs, every gradient, whoever wants whom."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moepp.model import MoEConfig, MoELayer, mean_load_balance_loss
from moepp.model.router import Routing
from tests.ranks import Ranks

D, H = 16, 24


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.end()


def layer_of(moe: MoEConfig) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(D, H, moe).double()
    for parameter in layer.parameters():
        parameter.data *= 10  # as large as those of trained models
    return layer


def tokens_of(rank: int, n_tokens: int, n_experts: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x, previous = (torch.randn(n_tokens, n, generator=generator).double() for n in (D, n_experts))
    return x.requires_grad_(), previous.requires_grad_()


def spread(layer: MoELayer) -> None:
    """Leave this rank's part of the experts in the layer."""
    layer.ffn.ranks = dist.group.WORLD
    for name, parameter in list(layer.ffn.named_parameters()):
        part = parameter.detach().chunk(dist.get_world_size())[dist.get_rank()]
        setattr(layer.ffn, name, torch.nn.Parameter(part.clone()))


def force(layer: MoELayer, experts: list[int] | None) -> None:
    """All tokens of this rank choose these."""
    if experts is not None:
        layer.router.choose = lambda scores: torch.tensor(experts).expand(len(scores), len(experts))


def compare(moe: MoEConfig, forced: list[list[int] | None]) -> list[int]:
    """As many tokens on each rank, then other numbers on each."""
    dist.init_process_group("gloo")
    compare_with(moe, [7] * 4, forced)
    return compare_with(moe, [1, 30, 5, 12], forced)


def compare_with(moe: MoEConfig, n_tokens: list[int], forced: list[list[int] | None]) -> list[int]:
    """On each rank: the same tokens through the spread layer, and through all of it. Returns rows per expert."""
    rank, n = dist.get_rank(), dist.get_world_size()
    whole, parts = layer_of(moe), layer_of(moe)
    spread(parts)
    results = []
    for layer in (whole, parts):
        force(layer, forced[rank])
        x, previous = tokens_of(rank, n_tokens[rank], moe.n_experts)
        y, routing = layer(x[None], previous)
        (y.square().sum() + 0.1 * mean_load_balance_loss([routing])).backward()
        results.append((y, x.grad, previous.grad, routing))
    for one, other in zip(*(result[:3] for result in results), strict=True):
        assert_close(one, other)
    for name, parameter in whole.named_parameters():
        if parameter.grad is None:  # nobody on this rank chose it
            parameter.grad = torch.zeros_like(parameter)
        if ".w_" not in name:
            assert_close(parameter.grad, parts.get_parameter(name).grad)
            continue
        dist.all_reduce(parameter.grad)
        mean = parameter.grad.chunk(n)[rank] / n
        assert_close(mean, parts.get_parameter(name).grad)
    return computed_rows(results[1][3])


def computed_rows(routing: Routing) -> list[int]:
    return routing.experts[routing.computed()].bincount(minlength=routing.moe.n_ffn).tolist()


def assert_close(one: Tensor, other: Tensor | None) -> None:
    assert other is not None
    torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


CASES = {
    "top-1": (MoEConfig(top_k=1), None),
    "top-2": (MoEConfig(), None),
    "top-3": (MoEConfig(top_k=3), None),
    "capacity": (MoEConfig(capacity_factor=0.5), None),
    "vanilla": (MoEConfig(n_zero=0, n_copy=0, n_const=0), None),
    "a rank without FFN rows": (MoEConfig(), [[8, 9], None, None, None]),
    "no rank has any": (MoEConfig(), [[8, 9]] * 4),
    "all want the experts of one rank": (MoEConfig(), [[0, 1]] * 4),
}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(ranks: Ranks, case: str, n: int) -> None:
    moe, forced = CASES[case]
    rows = ranks.run(n, compare, moe, forced or [None] * 4)
    if case == "a rank without FFN rows":
        assert sum(rows[0]) == 0 < sum(rows[1])
    if case == "no rank has any":
        assert sum(map(sum, rows)) == 0


def sent_bytes(moe: MoEConfig) -> tuple[int, int]:
    """(bytes of rows that this rank sent to others in a forward pass, FFN rows of others' experts it wanted)."""
    dist.init_process_group("gloo")
    rank, sent = dist.get_rank(), 0
    plain = dist.all_to_all_single

    def counting(output: Tensor, rows: Tensor, arriving=None, leaving=None, group=None) -> None:
        nonlocal sent
        if leaving is not None:  # not the exchange of counts
            sent += rows[0].nbytes * (sum(leaving) - leaving[rank]) if len(rows) else 0
        plain(output, rows, arriving, leaving, group=group)

    layer = layer_of(moe)
    spread(layer)
    dist.all_to_all_single = counting
    try:
        with torch.no_grad():
            _, routing = layer(tokens_of(rank, 50)[0][None])
    finally:
        dist.all_to_all_single = plain
    rows = torch.tensor(computed_rows(routing)).view(dist.get_world_size(), -1).sum(1)
    wanted = torch.stack([rows.new_empty(len(rows)) for _ in rows])
    dist.all_gather(list(wanted), rows)
    dist.barrier()
    to_others = int(rows.sum() - rows[rank])
    back = int(wanted[:, rank].sum() - rows[rank])  # results for the tokens of others
    return sent, (to_others + back) * D * 8


def test_nothing_is_sent_for_zero_computation_experts(ranks: Ranks) -> None:
    for moe in (MoEConfig(), MoEConfig(tau=0.1, top_k=3)):
        for sent, of_ffn_rows in ranks.run(2, sent_bytes, moe):
            assert sent == of_ffn_rows > 0


def balance(over: str) -> tuple[float, Tensor]:
    """The balance loss's mean over ranks, and its gradient of the router."""
    dist.init_process_group("gloo")
    layer = layer_of(MoEConfig(balance_over=over))
    x, previous = tokens_of(dist.get_rank(), 20)
    loss = mean_load_balance_loss([layer(x[None], previous)[1]])
    loss.backward()
    (weight,) = layer.router.weights
    mean = torch.cat((loss.detach().view(1), weight.grad.flatten())) / dist.get_world_size()
    dist.all_reduce(mean)
    return float(mean[0]), mean[1:]


def test_balance_over_the_batch_is_that_of_one_process(ranks: Ranks) -> None:
    layer = layer_of(MoEConfig())
    parts = [tokens_of(rank, 20) for rank in range(2)]
    x, previous = (torch.cat(each) for each in zip(*parts, strict=True))
    loss = mean_load_balance_loss([layer(x[None], previous)[1]])
    loss.backward()
    whole = layer.router.weights[0].grad.flatten()
    for of_ranks, gradient in ranks.run(2, balance, "batch"):
        assert of_ranks == pytest.approx(float(loss), rel=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-12)
    for of_ranks, _ in ranks.run(2, balance, "device"):
        assert of_ranks != pytest.approx(float(loss), rel=1e-6)
