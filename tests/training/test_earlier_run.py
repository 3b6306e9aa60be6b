"""A run of before the package was taken apart into rooms (commit c2da855): it goes on, and it still speaks.

earlier_run/ has its step 80 of 120 and the metrics of all 120 (tests.conftest.small_text, one thread, torch 2.13).
"""

import json
import shutil
from pathlib import Path

import pytest

from moepp.cli import main
from moepp.training.checkpoint import last_checkpoint, read_checkpoint
from tests.conftest import RECIPES, read_csv, small_text

EARLIER = Path(__file__).parent / "earlier_run"


def test_it_resumes_to_the_same_end(workdir: Path) -> None:
    Path("small.txt").write_text(small_text())
    run = Path(shutil.copytree(EARLIER, "runs/moepp/1"))
    assert main(["fit", f"--config={RECIPES / 'moepp.yaml'}", "--ckpt_path=last"]) == 0
    assert sorted(path.name for path in run.glob("config*")) == ["config.yaml"]  # no option is another by now
    expected, rows = read_csv(EARLIER), read_csv(run)
    assert list(rows[0]) == list(expected[0])
    for before, row in zip(expected, rows, strict=True):
        for name, text in before.items():
            if not name.startswith("speed/"):
                assert float(row[name] or 0) == pytest.approx(float(text or 0), rel=1e-3), (
                    name
                )  # another CPU rounds
    # the order that it began with, which newer runs no longer have, is also that of whoever goes on from here
    assert read_checkpoint(last_checkpoint(run))["computed_order"] is False
    assert json.loads((run / "result.json").read_text())["final/loss"] == pytest.approx(0.57963, abs=1e-3)


def test_it_generates_the_same_text(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt=the router", "--temperature=0", "--max_new_tokens=16"]
    assert main(["generate", f"--ckpt={EARLIER}/checkpoints/step-00000080.ckpt", *options]) == 0
    assert capsys.readouterr().out.strip() == "the router see others copy what them vector to vector"
