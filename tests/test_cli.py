import subprocess
import sys

import pytest

import moepp.training.commands  # noqa: F401  (imported before modules are hidden below)
from moepp.cli import VERBS, main

HEAVY = ("torch", "lightning", "jsonargparse", "numpy", "rich")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from moepp.cli import main; main(['--help']); main(['--version']);"
        f"sys.exit(sum(name in sys.modules for name in {HEAVY}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, "something heavy was imported"
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith(("moepp.study", "scipy", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("moepp.cli.VERBS", VERBS | {"report": ("moepp.study.compare.report", "run", "")})
    assert main(["report"]) == 2
    assert "pip install 'moepp[study]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--help", "generate --help"])
def test_whoever_reads_the_output_may_stop_early(arguments: str) -> None:
    command = f"{sys.executable} -m moepp {arguments} | true"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("verb", ["fit", "generate", "figures", "prepare"])
def test_help_speaks_of_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert "Lightning Trainer command line tool" not in shown
    assert shown.startswith(f"usage: moepp {verb} ") or f"usage: moepp [options] {verb} " in shown
