"""`moepp plan` reads what `moepp fit` would run with, and names what does not fit in one line."""

import pytest

from moepp.cli import main
from tests.conftest import RECIPES

SIZES = RECIPES / "sizes"


def test_prints_the_plan_of_a_recipe_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--devices", "64", f"--config={SIZES / '100b.yaml'}", "--model.parallel.expert=8", "--mfu=0.5"]
    assert main(["plan", *options]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # 16 bytes a parameter by 64; 8,192 rows of 4,096 bf16, there and back, three times, 7 of 8 of them to others
    assert "parameters 99.9B, 12.3B active" in shown
    assert "AdamW 12.5 GB" in shown
    vanilla = 4 * 8192 * 4096 * 2 * 6 * 7 / 8
    assert (
        f"FFN experts' rows {0.75 * vanilla / 1e6:,.0f} MB the same of vanilla top-K {vanilla / 1e6:,.0f} MB"
        in shown
    )
    assert "zero-computation experts' rows 0 MB" in shown
    tflop = 6619  # at 0.5 · 989 TFLOP/s
    assert f"operations of a device {tflop:,} TFLOP products {tflop / 494.5:.2f} s" in shown


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--devices=x", "argument --devices: invalid int value: 'x'"),
        ("", "the following arguments are required: --devices"),
        ("--devices=0", "devices: must be at least 1, got 0"),
        ("--devices=8 --mfu=2", "mfu: must be at most 1, got 2.0"),
        ("--devices=8 --peak=nan", "peak: must be positive, got nan"),
        ("--devices=3", "transformer.hidden_size: must be a multiple of 3 shards, got 256"),
        ("--devices=8 --model.parallel.expert=5", "parallel.expert: must divide moe.n_ffn=8, got 5"),
        ("--devices=4 --model.parallel.expert=8", "parallel.expert: must divide the 4 devices, got 8"),
        ("--devices=8 --data.batch_size=0", "batch_size: must be at least 1, got 0"),
        ("--devices=8 --trainer.strategy=ddp", "trainer.strategy: only fsdp2 can be planned, got ddp"),
        ("--devices=8 --model.moe.taw=1", "unrecognized arguments: --model.moe.taw=1"),
        ("--devices=8 --mfuu=0.5", "unrecognized arguments: --mfuu=0.5 (did you mean mfu?)"),
    ],
)
def test_bad_input_ends_in_one_line(options: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options.split()]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"moepp plan: {line}")
    assert shown.count("\n") == 1
