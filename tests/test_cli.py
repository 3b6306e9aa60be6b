import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("verb", "missing", "extra"), [("figures", "scipy", "study"), ("eval", "lm_eval", "eval")]
)
def test_a_missing_extra_is_named(verb: str, missing: str, extra: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from moepp.cli import main; sys.exit(main(['{verb}']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = f"moepp {verb}: needs {missing}: pip install 'moepp[{extra}]'\n"
    assert (ended.returncode, ended.stderr) == (2, line)


@pytest.mark.parametrize("arguments", ["--help", "generate --help"])
def test_whoever_reads_the_output_may_stop_early(arguments: str) -> None:
    command = f"{sys.executable} -m moepp {arguments} | true"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("verb", ["fit", "plan", "generate", "figures", "prepare"])
def test_help_speaks_of_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert "Lightning Trainer command line tool" not in shown
    assert shown.startswith(f"usage: moepp {verb} ") or f"usage: moepp [options] {verb} " in shown
