"""`make gpu` with parts that end as parts may end."""

import sys
import tarfile
from pathlib import Path

import pytest

from moepp.model import InputError
from tests import gpu
from tests.gpu import Part

GOOD = Part("good", "", ["json.tool", "--help"])
FAILS = Part("fails", "", ["json.tool", "no/such/file"])
SLOW = Part("slow", "", ["http.server", "0", "--bind", "127.0.0.1"])  # would run for ever


def make(monkeypatch: pytest.MonkeyPatch, parts: list[Part], *arguments: str) -> int:
    monkeypatch.setattr(gpu, "parts", lambda out, data, toy: parts)
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--out=gpu", *arguments])
    return gpu.main()


def test_it_goes_on_after_what_fails_and_says_so(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    assert make(monkeypatch, [FAILS, SLOW, GOOD]) == 1
    lines = Path("gpu/summary.txt").read_text().splitlines()
    results = {name: line for line in lines for name in ("fails", "slow", "good") if f"│ {name}" in line}
    assert "failed: gpu/fails.log" in results["fails"]
    assert "unfinished" in results["slow"]
    assert "done" in results["good"]
    with tarfile.open("gpu.tar.gz") as archive:
        assert {"gpu/fails.log", "gpu/summary.txt"} <= set(archive.getnames())


def test_what_is_done_is_not_repeated(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(monkeypatch, [GOOD]) == 0
    broken = Part("good", "", FAILS.command)
    assert make(monkeypatch, [broken]) == 0
    assert make(monkeypatch, [broken], "--again") == 1


def test_bad_input_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no part 'nonsense': use good"):
        make(monkeypatch, [GOOD], "--only=nonsense")
    with pytest.raises(InputError, match="moepp prepare data/corpus.yaml"):
        gpu.text_for(Path("gpu"), toy=False)


def test_no_part_can_outlast_a_loan_of_ten_minutes() -> None:
    assert gpu.LIMIT + gpu.GRACE < 600
