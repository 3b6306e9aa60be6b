"""There are as many cases as promised, and what a case must not do is noticed."""

import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz import harness, test_command_line, test_configurations, test_runs, test_text, test_weights
from tests.fuzz.harness import Hang, cases, digests, time_limit, works_or_one_line

MODULES = [test_command_line, test_configurations, test_runs, test_text, test_weights]


def test_at_least_2000_cases() -> None:
    """Each test sees to it itself that it runs as many as it planned (`harness.cases`)."""
    planned = [
        number for name, number in harness.PLANNED.items() if name.rsplit(".", 1)[0] in map(name_of, MODULES)
    ]
    assert sum(planned) >= 2000


def name_of(module: object) -> str:
    return module.__name__  # type: ignore[attr-defined]


def test_too_few_cases_are_noticed() -> None:
    @cases(50, value=st.booleans())
    def test(value: bool) -> None:
        pass

    with pytest.raises(AssertionError, match="only 2 cases"):
        test()


def test_a_hang_is_noticed() -> None:
    with pytest.raises(Hang), time_limit(0.05):
        time.sleep(5)


@pytest.mark.parametrize(
    "fault", ["traceback", "two lines", "no line", "warning", "changed file", "left run", "exit 1"]
)
def test_faults_are_noticed(fault: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: tuple[str, ...]) -> int:
        if fault == "traceback":
            raise TypeError
        if fault == "warning":
            warnings.warn("careful", stacklevel=1)
        if fault == "changed file":
            Path("input").write_text("other")
        if fault == "left run":
            Path("runs/1").mkdir(parents=True)
            Path("runs/1/config.yaml").touch()
        if fault != "no line":
            print("moepp fit: wrong", end="\nand more\n" if fault == "two lines" else "\n", file=sys.stderr)
        return 1 if fault == "exit 1" else 2

    Path("input").write_text("as it was")
    monkeypatch.setattr(harness, "main", main)
    with pytest.raises((AssertionError, TypeError)):
        works_or_one_line("fit")


def test_one_line_is_fine(workdir: Path) -> None:
    before = digests()
    assert not works_or_one_line("generate")
    assert works_or_one_line("--version")
    assert digests() == before
