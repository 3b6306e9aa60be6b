"""`make gpu` with parts that end as parts may end."""

import os
import subprocess
import sys
import tarfile
import time
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
    monkeypatch.setattr(gpu, "LEAST", 0.0)
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


def test_it_ends_within_its_time_and_goes_on_later(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "PACKING", 0.5)
    begun = time.monotonic()
    assert make(monkeypatch, [SLOW, GOOD], "--seconds=2") == 1
    assert time.monotonic() - begun < 4
    summary = Path("gpu/summary.txt").read_text()
    assert "unfinished" in summary
    assert "no time left" in summary
    assert make(monkeypatch, [GOOD]) == 0


def test_what_a_part_has_begun_ends_with_it(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    Path("parent.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", ".")
    assert make(monkeypatch, [Part("parent", "", ["parent"])]) == 1
    for _ in range(50):
        if not running(int(Path("child").read_text())):
            return
        time.sleep(0.1)
    pytest.fail("it runs on")


def running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_signal_to_all_of_it_ends_the_part_too(workdir: Path) -> None:
    Path("parent.py").write_text("import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)")
    code = "import sys; from pathlib import Path; from tests import gpu; gpu.parts = lambda *_: [PART]; gpu.main()"
    code = code.replace("PART", "gpu.Part('parent', '', ['parent'])")
    root = str(Path(gpu.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}"}
    whole = subprocess.Popen([sys.executable, "-c", code, "--toy", "--out=gpu"], env=environment)
    for _ in range(300):
        if Path("child").is_file() and Path("child").read_text():
            break
        time.sleep(0.1)
    whole.terminate()
    assert whole.wait(10) == 143
    assert not running(int(Path("child").read_text()))


def test_without_prepared_text_what_needs_none_runs(workdir: Path) -> None:
    assert gpu.text_for(Path("gpu"), toy=False) == Path("data/corpus.yaml")


def test_bad_input_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no part 'nonsense': use good"):
        make(monkeypatch, [GOOD], "--only=nonsense")


def test_no_part_can_outlast_a_loan_of_ten_minutes() -> None:
    assert gpu.LIMIT + gpu.GRACE < 600
