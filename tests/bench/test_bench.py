"""The bench at toy size: what it compares is equal, routing has the share it says, and its figures add up."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moepp.model import InputError, MoEConfig, MoELayer
from moepp.training.module import LitMoE
from tests.bench import layers, peers, plots, results, steps
from tests.bench.__main__ import main
from tests.bench.command import SECTIONS
from tests.bench.setting import BOTH, RECIPES, SIZES, VANILLA, Case, Row, Setting, measured

CPU = torch.device("cpu")
PRODUCTS = Case("layer", "τ = 0.75", BOTH, layers.PER_EXPERT)


@pytest.fixture
def at() -> Setting:
    torch.manual_seed(0)
    return Setting(SIZES["toy"], CPU, rounds=2, seconds=0.0)


# ---- forced routing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n_tokens", [37, 96])
def test_forced_routing_has_the_share_that_tau_implies(tau: float, n_tokens: int) -> None:
    moe = MoEConfig(tau=tau)
    experts_TK = peers.spread_evenly(n_tokens, moe, moe.ffn_share)
    counts = experts_TK.flatten().bincount(minlength=moe.n_experts)
    assert int(counts[: moe.n_ffn].sum()) == round(2 * n_tokens * 8 * tau / (8 * tau + 4))
    for kind in (counts[: moe.n_ffn], counts[moe.n_ffn :]):
        assert kind.max() - kind.min() <= 1  # as even as whole numbers can be
    assert (experts_TK[:, 0] != experts_TK[:, 1]).all()  # a token's experts differ


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(InputError, match="impossible"):
        peers.spread_evenly(8, VANILLA, 0.5)  # there is nobody else to take the other half
    with pytest.raises(InputError, match="impossible"):
        peers.spread_evenly(8, MoEConfig(n_ffn=1, n_zero=1, n_copy=0, n_const=0), 0.9)  # twice the same expert


def test_a_forced_layer_computes_the_forced_experts_and_trains_its_router() -> None:
    torch.manual_seed(0)
    layer, moe = MoELayer(16, 24, MoEConfig()), MoEConfig()
    experts_TK = peers.spread_evenly(40, moe, 0.6)
    peers.force(layer.router, experts_TK)
    y, routing = layer(torch.randn(40, 16), torch.randn(40, 12))
    assert torch.equal(routing.experts, experts_TK)
    assert int(routing.computed().sum()) == 48
    y.square().sum().backward()
    assert layer.router.weights[0].grad.abs().sum() > 0


# ---- parity ------------------------------------------------------------------------------------------------


def test_parity_bites(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = layers.RoutedLayer(at, MoEConfig())
    routed.check_against_loop()
    routed.limits()
    right = peers.ReleasedLoop.expert

    def without_the_copy_expert(self: peers.ReleasedLoop, e: int, x: torch.Tensor) -> torch.Tensor:
        return right(self, e, x) * (e != self.moe.kinds["copy"].start)

    with monkeypatch.context() as patch:
        patch.setattr(peers.ReleasedLoop, "expert", without_the_copy_expert)
        with pytest.raises(peers.NotEqual, match="released loop, output"):
            routed.check_against_loop()
    routed.layer.ffn.w_down.data[3, 0, 0] += 10
    routed.check_against_loop()  # whose weights are copied from the layer each time
    right_sum = routed.layer.experts
    monkeypatch.setattr(routed.layer, "experts", lambda x, routing: 0.999 * right_sum(x, routing))
    with pytest.raises(peers.NotEqual, match="dense experts"):
        routed.limits()


@pytest.mark.parametrize(
    ("wrong", "tolerated"),
    [(1.0, True), (1 + 5e-5, True), (1 + 2e-4, False), (float("nan"), False), (float("inf"), False)],
)
def test_parity_tolerance(wrong: float, tolerated: bool) -> None:
    expected = torch.randn(20, 3)
    if tolerated:
        peers.check("x", expected * wrong, expected)
    else:
        with pytest.raises(peers.NotEqual, match="x: differs"):
            peers.check("x", expected * wrong, expected)


def test_a_peer_that_computes_something_else_stops_the_bench(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.DenseExperts, "forward", lambda self, rows: [0 * x for x in rows])
    with pytest.raises(SystemExit, match="moepp bench: layer: .*so it is not timed"):
        main(["--size=toy", "--quick", "--only=layer"])
    assert not (workdir / "runs/bench/bench.csv").exists()


@pytest.mark.parametrize("section", ["layer", "tau", "zero", "tokens", "experts", "constants"])
def test_a_layer_that_computes_something_else_is_not_timed(
    section: str, at: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MoELayer.experts
    monkeypatch.setattr(MoELayer, "experts", lambda self, x, routing: 0.99 * whole(self, x, routing))
    monkeypatch.setattr("tests.bench.setting.in_turn", lambda *_: pytest.fail("was timed"))
    with pytest.raises(peers.NotEqual):
        list(SECTIONS[section](at))


def test_what_was_measured_is_kept_when_a_section_breaks(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(at: Setting) -> Iterator[Row]:
        yield Row(Case("tau", "half"), "×", 2.0)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(SECTIONS, "tau", broken)
    monkeypatch.setattr("tests.bench.setting.in_turn", sleepless)
    with pytest.raises(SystemExit, match="tau ended in an error"):
        main(["--size=toy", "--quick", "--only=tau,zero", "--out=b"])
    with (workdir / "b/bench.csv").open(newline="") as file:
        notes = {(row["section"], row["name"]): (row["value"], row["note"]) for row in csv.DictReader(file)}
    assert notes["tau", "half"] == ("2.0", "")
    assert notes["tau", "the rest"] == ("", "broken: RuntimeError: no kernel image is available")
    assert notes["zero", "τ = 0.75, forward"][0] == "200.0"  # the section after it


# what a machine with PyTorch for GPUs may lack, and no network to fetch it: they read options and packed text, and
# evaluate studies
LACKING = ("jsonargparse", "omegaconf", "zstandard", "docstring_parser", "typeshed_client", "pandas")


def test_the_bench_needs_none_of_the_packages_of_the_command_line(workdir: Path) -> None:
    code = f"""
import sys
sys.modules |= dict.fromkeys({LACKING})  # importing any of them fails
from tests.bench.__main__ import main
sys.exit(main(["--size=toy", "--quick", "--only=zero,start", "--out=b"]))
"""
    root = {"PYTHONPATH": str(RECIPES.parent)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | root)
    assert ended.returncode == 0, ended.stderr
    assert "left out: `moepp fit` needs jsonargparse and omegaconf" in ended.stdout
    with (workdir / "b/bench.csv").open(newline="") as file:
        values = {row["name"]: row["value"] for row in csv.DictReader(file)}
    assert float(values["waiting for data"]) > 0


@pytest.mark.parametrize("back_end", ["eager", "batched_mm", "grouped_mm"])
def test_mixtral_is_vanilla_moe(at: Setting, back_end: str) -> None:
    pytest.importorskip("transformers")
    models = steps.Models(at, 2, 16)
    ours, theirs = models.moepp(VANILLA), models.mixtral(back_end)
    assert theirs.model.config._experts_implementation == back_end
    peers.check("logits", theirs.logits(), ours.logits())
    # the same cross-entropy; the two balance losses differ, β = 0.01 keeps them small
    assert theirs.loss().item() == pytest.approx(ours.loss().item(), abs=0.05)
    theirs.model.model.layers[0].mlp.experts.down_proj.data[2] *= 1.5
    with pytest.raises(peers.NotEqual):
        peers.check("logits", theirs.logits(), ours.logits())


def test_mixtral_computes_grouped_mm_in_bf16_under_autocast(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    mixtral = steps.Models(at, 2, 16).mixtral("grouped_mm")
    seen = set()
    can_use = moe._can_use_grouped_mm

    def spy(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        seen.update((input.dtype, weight.dtype))
        return can_use(input, weight, offs)

    monkeypatch.setattr(moe, "_can_use_grouped_mm", spy)
    with torch.autocast("cpu", torch.bfloat16):
        mixtral.loss()
    assert seen == {torch.bfloat16}


def test_llama_is_one_wide_expert(at: Setting) -> None:
    pytest.importorskip("transformers")
    models = steps.Models(at, 2, 16)
    peers.check("logits", models.llama().logits(), models.moepp(steps.DENSE).logits())
    assert (
        models.llama().model.config.intermediate_size
        == 2 * models.moepp(VANILLA).model.transformer.intermediate_size
    )


def test_peers_are_named_where_transformers_is_missing(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    rows = {row.case.name: row for row in steps.step(at)}
    assert "pip install 'transformers>=5'" in rows["Mixtral and Llama of transformers"].note
    assert rows["MoE++ against vanilla MoE"].value
    assert "MoE++ against Mixtral's best back-end" in {
        row.case.name for row in results.missing(list(rows.values()), at.kind)
    }


def test_a_peer_that_does_not_run_is_named_and_ours_are_timed(
    at: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: steps.Models) -> steps.ModelStep:
        raise TypeError("of another version")

    monkeypatch.setattr(steps.Models, "llama", broken)
    rows = {row.case.name: row for row in steps.step(at)}
    assert rows["Llama, dense"].note == "left out: TypeError: of another version"
    assert rows["MoE++ against Mixtral's best back-end"].value
    assert "MoE++ against a dense Llama" not in rows


# ---- figures -----------------------------------------------------------------------------------------------


def test_a_row_is_the_median_and_quartiles_over_rounds() -> None:
    row = measured(Case("tau", "τ = 0.75", BOTH), "×", [1.0, 1.5, 3.0, 1.25, 2.0], ideal=2.0, paper=0.75)
    assert row.case.name == "τ = 0.75, forward + backward"
    assert (row.value, row.quartiles, row.rounds) == (1.5, (1.25, 2.0), 5)
    assert row.share == 0.75
    assert Row(Case("a", "b"), "×").share is None


@pytest.mark.parametrize(
    ("case", "value", "ideal", "expected"),
    [
        (Case("tau", "τ = 0.75", BOTH), 1.6, 1 / 0.6, "met"),  # 0.96 of the ideal
        (Case("tau", "τ = 0.75", BOTH), 1.5, 1 / 0.6, "missed"),
        (Case("layer", "τ = 0.1", BOTH, layers.PER_EXPERT), 0.8, None, "met"),
        (Case("zero", "τ = 0.75", BOTH), 4.9, None, "met"),
        (Case("zero", "τ = 0.75", BOTH), 5.1, None, "missed"),
        (Case("experts", "64 FFN experts, same rows"), 1.3, None, "missed"),
        (Case("step", "MoE++ against a dense Llama"), None, None, "not measured"),
        (Case("mfu", "sizes/0.6b.yaml, compiled"), None, None, ""),  # nothing is asked of a CPU
        (Case("step", "vanilla MoE"), 1.0, None, ""),
    ],
)
def test_verdicts(case: Case, value: float | None, ideal: float | None, expected: str) -> None:
    assert results.verdict(Row(case, "", value, ideal=ideal), "cpu") == expected


def test_in_bf16_a_cpu_has_aims_of_its_own(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MATMUL", 64)  # a CPU without AVX512_BF16 takes a minute for one of 2048
    at = replace(at, precision="bf16-mixed")
    rows = {row.case.name: row for row in steps.step(at)}
    assert rows["MoE++ against MoE++ in float32"].value
    assert results.verdict(Row(PRODUCTS, "", 0.8), at.kind) == "met"
    assert list(layers.layer(at))


def test_memory_counts_what_lives_at_once(at: Setting) -> None:
    def run() -> None:
        a = torch.empty(1000, 1000)
        b = a + 1
        del a
        c = b * 2
        assert b.shape == c.shape

    assert steps.peak_memory(run, CPU) == pytest.approx(8e6, rel=0.01)


def sleepless(functions: list[Callable[[], object]], *_: object) -> list[list[float]]:
    """Two rounds without looking at the clock: function i takes i + 1 seconds, then twice that."""
    for function in functions:
        function()
    return [[float(i + 1) for i in range(len(functions))], [2.0 * (i + 1) for i in range(len(functions))]]


def test_sections_that_are_left_out_have_no_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(plots, "save", lambda figure, path: titles.extend(a.get_title() for a in figure.axes))
    plots.bench(Path("bench.png"), [Row(PRODUCTS, "of its limit", 0.9, (0.8, 1.0))])
    assert titles == ["layer: share of its limit"]


def test_table_and_csv_are_complete_and_add_up(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.setting.in_turn", sleepless)
    sections = "--only=layer,tau,zero,tokens,experts,constants"
    assert main(["--size=toy", "--quick", "--precision=32-true", sections, "--out=b"]) == 0
    with (workdir / "b/bench.csv").open(newline="") as file:
        rows = {(row["section"], row["name"]): row for row in csv.DictReader(file)}
    assert (workdir / "b/bench.png").is_file()
    aims = {case for case, target in results.TARGETS.items() if target.cpu is not None}
    assert {(case.section, case.name) for case in aims} <= set(rows)
    text = (workdir / "b/bench.txt").read_text()
    assert all(name in text for _, name in rows)
    for row in rows.values():
        assert row["commit"]
        assert row["command"].startswith("python -m tests.bench --size=toy")
        if row["ideal"]:
            share = float(row["value"]) / float(row["ideal"])
            assert float(row["share_of_ideal"]) == pytest.approx(share)
    # vanilla takes 1 s, the τ's 2 to 6 s
    by_tau = [rows["tau", f"τ = {tau}, forward + backward"] for tau in ("0.1", "0.25", "0.5", "0.75", "1")]
    assert [float(row["value"]) for row in by_tau] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])
    assert [float(row["ideal"]) for row in by_tau] == pytest.approx([6, 3, 2, 5 / 3, 1.5])
    paper = [float(row["paper_share_of_ideal"]) for row in by_tau]
    assert paper == pytest.approx([2.65 / 6, 1.93 / 3, 1.38 / 2, 1.25 * 3 / 5, 1.19 / 1.5])
    assert by_tau[3]["verdict"] == "missed"
    # the layer takes 1 s, its limits 2 and 3
    assert float(rows["layer", "τ = 0.75, forward + backward, per expert"]["value"]) == 2
    assert float(rows["layer", "τ = 0.75, forward + backward, one MLP"]["value"]) == 3
    assert rows["layer", "τ = 0.75, forward + backward, per expert"]["verdict"] == "met"
    assert float(rows["zero", "τ = 0.75, forward"]["value"]) == 200
    # 512 tokens, 16 times as many, take 5 times as long
    assert float(rows["tokens", "512 tokens"]["value"]) == pytest.approx(5 / 16)
    assert float(rows["experts", "64 FFN experts, same rows"]["value"]) == 5


def test_bad_options_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only=layer,nothing"]) == 2
    assert "no section 'nothing'" in capsys.readouterr().err
    assert main(["--size=huge"]) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_whole_cuda_step_never_waits_for_the_device() -> None:
    """Forward, loss, backward, clipping and AdamW, with the model's own routing."""
    at = Setting(SIZES["toy"], torch.device("cuda"), rounds=2, seconds=0.0)
    tokens_BS = torch.randint(at.sizes.transformer.vocab_size, (2, 16), device="cuda")
    one = steps.ModelStep(at, LitMoE(at.sizes.transformer, MoEConfig()), tokens_BS)
    one()  # AdamW makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
