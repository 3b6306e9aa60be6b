"""Several devices: what MoE++ sends against vanilla MoE, and how memory falls with their number.

Each device has tokens of its own; FFN experts are spread over all of them, as with --model.parallel.expert=N. On
a CPU the devices are processes of this machine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import torch

from moepp.model import MoEConfig
from tests.bench import ranks
from tests.bench.ranks import Seen
from tests.bench.setting import VANILLA, Case, Row, Setting, measured

ON_CPU = (2, 4)  # processes
BARE = "vanilla MoE"
OWN = "τ = 0.75, the router's own choice"
CONTESTANTS = {  # and whether routing is forced
    BARE: (VANILLA, True),
    "τ = 0.75": (MoEConfig(tau=0.75), True),
    "τ = 0.25": (MoEConfig(tau=0.25), True),
    OWN: (MoEConfig(tau=0.75), False),
}
DEEP = 12  # layers, as the smallest of the paper's models has
CROWDED_ROUNDS = 3  # where processes share cores


def devices(at: Setting) -> Iterator[Row]:
    """Bytes, load and time by τ, for 2, 4, … devices, and memory of a sharded model on 1, 2, 4, … of them."""
    on_gpu = at.device.type == "cuda"
    most = min(torch.cuda.device_count(), VANILLA.n_ffn)
    numbers = [2**i for i in range(1, most.bit_length())] if on_gpu else ON_CPU
    if not numbers:
        yield Row(Case("devices", "all of it"), note="left out: needs two GPUs or more")
        return
    depths = at.sizes.transformer.n_layers, DEEP
    memory: dict[int, list[list[tuple[int, int]]]] = {}  # of each rank, by depth
    for n in (1, *numbers):
        crowded = crowd(n, at)
        rounds = min(at.rounds, CROWDED_ROUNDS) if crowded else at.rounds
        of_ranks = ranks.on_ranks(n, ranks.measure, at, CONTESTANTS, rounds, depths)
        memory[n] = [held for held, _ in of_ranks]
        if n > 1:
            yield from rows(n, [seen for _, seen in of_ranks], at, crowded)
    whole = "above 1/N: what is whole for a moment on each device, a block, the head and its gradient"
    for depth, n_layers in enumerate(depths):
        for part, what, note in ((0, "parameters, gradients, AdamW", ""), (1, "peak of a step", whole)):
            for n, by_rank in memory.items():
                alone = memory[1][0][depth][part] / 1e6
                megabytes = [figures[depth][part] / 1e6 for figures in by_rank]
                case = Case("devices", f"{named(n)}, {n_layers} layers", limit=what)
                yield measured(case, "MB a device", megabytes, ideal=alone / n, note=note if n > 1 else "")


def named(n: int) -> str:
    return f"{n} device" + "s" * (n > 1)


def crowd(n: int, at: Setting) -> str:
    cores = os.cpu_count() or 1
    if at.device.type == "cuda" or n <= cores:
        return ""
    return f"{n} processes on {cores} cores: says nothing about time"


def rows(n: int, by_rank: list[dict[str, Seen]], at: Setting, crowded: str) -> Iterator[Row]:
    """Of what `ranks.traffic` saw on each of n ranks."""
    seen = {name: [one[name] for one in by_rank] for name in CONTESTANTS}
    sent = {name: sum(sum(one.rows_L) for one in those) for name, those in seen.items()}
    # all wait for the slowest
    step = {name: by_round(max, [one.step for one in those]) for name, those in seen.items()}
    exchange = {name: by_round(fmean, [one.all_to_all for one in those]) for name, those in seen.items()}
    for name, (moe, forced) in CONTESTANTS.items():
        count_NLE = seen[name][0].count_NLE
        share = moe.ffn_share if forced else float(count_NLE[..., : moe.n_ffn].sum() / count_NLE.sum())

        def case(what: str, name: str = name) -> Case:
            return Case("devices", f"{named(n)}, {name}", limit=what)

        megabytes = [n_bytes / 1e6 for one in seen[name] for n_bytes in one.rows_L]
        numbers = seen[name][0].counts // count_NLE.shape[1]
        note = f"in a step, and as much received; numbers of rows: {numbers} B more"
        yield measured(case("sent"), "MB a layer and device", megabytes, note=note)
        if name != BARE:
            note = "" if forced else "ideal: the share of FFN experts that the router chose"
            yield Row(case("sent, of vanilla's"), "×", sent[name] / sent[BARE], ideal=share, note=note)
        here_LN = ranks.rows_of(count_NLE, moe.n_ffn).sum(0).double()
        load_L = here_LN.amax(1) / here_LN.mean(1)
        yield measured(case("rows of the fullest device"), "× the mean", load_L.tolist())
        for what, times, with_wait in (
            ("all-to-all", exchange, "with the wait for the slowest"),
            ("step", step, ""),
        ):
            note = "; ".join(filter(None, (with_wait, crowded)))
            if name == BARE:
                yield measured(case(what), "ms a step", [1e3 * s for s in times[name]], note=note)
            else:
                ratios = [bare / ours for bare, ours in zip(times[BARE], times[name], strict=True)]
                yield measured(case(f"{what}, speed-up"), "×", ratios, ideal=1 / share, note=note)
    row = at.sizes.transformer.hidden_size * at.dtype.itemsize
    for_ffn = sum(
        int(ranks.bytes_of_ffn_rows(seen[name][0].count_NLE, moe.n_ffn, row).sum())
        for name, (moe, _) in CONTESTANTS.items()
    )
    case_of_none = Case("devices", f"{named(n)}, for zero-computation experts", limit="sent")
    yield Row(case_of_none, "B", sum(sent.values()) - for_ffn, note="all that was sent less FFN experts' rows")


def by_round(of_ranks: Callable[[Sequence[float]], float], times: list[list[float]]) -> list[float]:
    return [of_ranks(one) for one in zip(*times, strict=True)]
