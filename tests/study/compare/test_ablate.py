"""A tiny study from end to end: its report, and what stops, breaks and contends for it."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moepp.cli import main
from moepp.model import InputError
from moepp.study.compare.ablate import locked
from moepp.study.compare.matrix import Matrix, Run, read_matrix, resolve
from moepp.study.compare.runs import Workers, steps_done, visible_gpus
from tests.conftest import RECIPES, refused, tiny

STEPS = 40
MATRIX = {
    "base": str(RECIPES / "moepp.yaml"),
    "reference": "vanilla",
    "seeds": 1,
    "sources": {"accuracy": "points, of nowhere"},
    "variants": {
        "vanilla": {
            "model": {"moe": {"n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}},
            "plots": ["curves"],
        },
        "moepp": {"paper": {"accuracy": {"1B": 12.5}}, "plots": ["curves"]},
    },
}


@pytest.fixture(scope="session")
def command(text_file: Path) -> list[str]:
    shrunk = [option for option in tiny(text_file) if not option.startswith(("--config", "--trainer.val_check"))]
    steps = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=10"]
    return ["ablate", "--matrix=m.yaml", "--jobs=2", *shrunk, *steps]


@pytest.fixture(scope="session", autouse=True)
def quick_timing() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moepp.study.compare.speed.SECONDS", 0.0)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a study of 2 variants has run to its end, undisturbed."""
    folder = tmp_path_factory.mktemp("study")
    write_matrix(folder, MATRIX)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command) == 0
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, as the current directory."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def write_matrix(folder: Path, matrix: dict) -> None:
    (folder / "m.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_timings(report: Path) -> tuple[str, list[dict[str, str]], str]:
    text = "".join(line for line in (report / "report.md").open() if not line.startswith("- commit"))
    before, _, after = text.partition("## Speed")
    rows = [
        {name: value for name, value in row.items() if not name.startswith("speed_")}
        for row in read_csv(report / "results.csv")
    ]
    return before + after.partition("## Bits per byte by domain")[2], rows, (report / "runs.csv").read_text()


def test_the_report_holds_what_a_reviewer_asks_for(finished: Path) -> None:
    report = finished / "runs/m/report"
    text = (report / "report.md").read_text()
    assert "per byte, on all held-out text: mean" in text
    rows = {row["variant"]: row for row in read_csv(report / "results.csv")}
    assert list(rows) == ["vanilla", "moepp"]
    vanilla, moepp = rows["vanilla"], rows["moepp"]
    assert float(vanilla["ffn_experts_per_token"]) == 2
    assert float(moepp["ffn_experts_per_token_expected"]) == pytest.approx(1.2)
    assert float(moepp["ffn_flops_per_token"]) == pytest.approx(
        2 * float(moepp["ffn_experts_per_token"]) * 6 * 32 * 48
    )
    for row in rows.values():
        assert int(row["seeds"]) == 1
        assert int(row["training_tokens"]) == STEPS * 4 * 32
        assert float(row["speed_tokens_per_second"]) > 0
        assert float(row["speed_expert_forward_lower_quartile"]) <= float(row["speed_expert_forward"])
    assert "needs 2 seeds" in text
    runs = read_csv(report / "runs.csv")
    losses = {run["variant"]: float(run["final/loss"]) for run in runs}
    assert float(moepp["loss_difference"]) == pytest.approx(losses["moepp"] - losses["vanilla"])
    assert all(loss < 4 for loss in losses.values())  # from ln 320 = 5.8: they were trained
    assert float(moepp["training_flops"]) < float(vanilla["training_flops"])
    for words in (
        "moepp ablate --matrix=m.yaml",
        "commit",
        "torch",
        "| 1B: 12.5 |",
        "points, of nowhere",
        "small",
    ):
        assert words in text
    assert sum(path.stat().st_size for path in report.iterdir()) < 1e6
    for picture in ("curves.png", "differences.png"):
        assert f"({picture})" in text
        assert (report / picture).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_keep_their_weights_and_nothing_else(finished: Path) -> None:
    from moepp.training.checkpoint import load, read_checkpoint

    checkpoints = finished / "runs/m/moepp/seed0/checkpoints"
    (last,) = checkpoints.iterdir()
    assert "optimizer_states" not in read_checkpoint(last)
    assert load(last).model.moe_config.n_const == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.heavy
@pytest.mark.usefixtures("interruptible")
def test_interrupted_in_the_middle_it_ends_with_the_same_report(study: Path, command: list[str]) -> None:
    undisturbed = without_timings(study / "runs/m/report")
    run = study / "runs/m/moepp/seed0"
    for path in (run, study / "runs/m/report"):
        shutil.rmtree(path)
    others = {path: path.stat().st_mtime_ns for path in study.glob("runs/m/vanilla/*/result.json")}

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step-*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert main(command) == 130
    watcher.join()
    assert not (run / "result.json").exists()
    assert not (study / "runs/m/report").exists()
    assert 10 <= last_step(run) < STEPS

    assert main(command) == 0
    assert without_timings(study / "runs/m/report") == undisturbed
    log = (run / "output.log").read_text()
    assert log.count(f"step {1:>2}/{STEPS} ") == 1  # the second call did not begin at the first step
    assert log.count(f"step {STEPS}/{STEPS} ") == 1
    assert {path: path.stat().st_mtime_ns for path in others} == others


def last_step(folder: Path) -> int:
    return int(read_csv(folder / "metrics.csv")[-1]["step"])


def test_a_failing_run_is_reported_and_the_rest_goes_on(
    study: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {f"broken{n}": {"model": {"moe": {"n_const": n}}} for n in (3, 4)}
    write_matrix(study, MATRIX | {"variants": broken | MATRIX["variants"]})
    results = {path: path.stat().st_mtime_ns for path in study.glob("runs/m/*/seed0/result.json")}
    script = "import sys; print('begun'); print('the disk is', 'full\\n\\n'); sys.exit(3)"
    monkeypatch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", script])
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--jobs=1"])
    assert stopped.value.code == 1
    text = (study / "runs/m/report/report.md").read_text()
    for n in (3, 4):  # the second was tried after the first had failed
        assert f"- broken{n}/seed0: exit code 3: the disk is full\n" in text
    assert "| moepp | 1 |" in text
    assert "needs 2 seeds" in text
    assert "broken3/seed0: exit code 3: the disk is full" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results} == results


def test_a_study_whose_runs_all_fail_says_so(
    study: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepp.study.compare.runs.FIT", [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(SystemExit):
        main([*command, "--out=elsewhere"])
    text = (study / "elsewhere/report/report.md").read_text()
    assert "- moepp/seed0: exit code 3: it printed nothing\n" in text
    assert text.endswith("No run has finished.\n")


def test_changed_options_are_refused(study: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--model.optim.lr=0.02"]) == 2
    error = capsys.readouterr().err
    assert "runs/m/vanilla/seed0 was made with model.optim.lr=0.01, not 0.02" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("slip", "meant"), [("--quik", "quick"), ("--seed=1", "seeds"), ("--dryrun", "dry_run")])
def test_a_slip_is_not_left_to_the_runs(
    study: Path, command: list[str], capsys: pytest.CaptureFixture[str], slip: str, meant: str
) -> None:
    assert f"unrecognized arguments: {slip} (did you mean {meant}?)" in refused(capsys, *command, slip)


def test_dry_run_lists_the_costs_and_does_nothing(
    study: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(study.rglob("*"))
    assert main([*command, "--dry_run", "--seeds=2"]) == 0
    printed = capsys.readouterr().out
    assert "from a measured step of vanilla" in printed
    cells = next(line.split() for line in printed.splitlines() if "vanilla" in line)
    matrix = resolve(Path("m.yaml"), read_matrix(Path("m.yaml")), Path(MATRIX["base"]), command[3:], Path("out"))
    assert cells[1:3] == ["1", "1"]  # to run, finished
    assert f"{matrix.reference.training_flops():.3g}" in cells
    assert sorted(study.rglob("*")) == before


def test_a_second_study_in_the_folder_is_refused(
    study: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (study / "runs/m/report/report.md").stat().st_mtime_ns
    with locked(study / "runs/m"):
        assert main(command) == 2
    error = capsys.readouterr().err
    assert "out: runs/m is in use by another study" in error
    assert (study / "runs/m/report/report.md").stat().st_mtime_ns == before
    with locked(study / "runs/m"):
        pass  # free again


def test_a_run_that_outlives_its_study_keeps_the_folder(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        survivor = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]
        )
    with pytest.raises(InputError, match="or by a run that one started"), locked(tmp_path):
        pass
    survivor.communicate()
    with locked(tmp_path):
        pass


def test_each_job_gets_its_gpus_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    n_gpus(monkeypatch, 2)
    two = Workers(2, 1, visible_gpus(compare_matrix()), sys.stdin)
    assert [two.environment(1, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    two = Workers(2, 1, visible_gpus(compare_matrix()), sys.stdin)
    assert two.environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert Workers(2, 1, [], sys.stdin).environment(1, 0)["OMP_NUM_THREADS"] == "3"
    assert Workers(2, 3, [], sys.stdin).environment(3, 0)["OMP_NUM_THREADS"] == "1"


def test_a_run_of_several_devices_gets_as_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    n_gpus(monkeypatch, 5)
    matrix = compare_matrix("--trainer.devices=2")
    workers = Workers(2, matrix.devices, visible_gpus(matrix), sys.stdin)
    assert [workers.environment(2, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["0,1", "2,3"]
    assert workers.environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "2"  # a variant that takes fewer


def test_as_many_jobs_as_there_are_gpus_for(
    study: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_gpus(monkeypatch, 5)
    given: list[Workers] = []
    monkeypatch.setattr("moepp.study.compare.ablate.execute", lambda runs, workers: given.append(workers))
    monkeypatch.setattr("moepp.study.compare.report.write", lambda *args, **kwargs: 0)
    on_gpus = [option for option in command if not option.startswith(("--jobs", "--trainer.accelerator"))]
    assert main([*on_gpus, "--trainer.devices=2", "--out=elsewhere"]) == 0
    assert main([*on_gpus, "--trainer.devices=2", "--out=elsewhere", "--jobs=1"]) == 0
    assert [(workers.jobs, workers.devices) for workers in given] == [(2, 2), (1, 2)]


def test_more_devices_than_gpus_are_refused(
    study: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_gpus(monkeypatch, 2)
    options = [option for option in command if not option.startswith("--trainer.accelerator")]
    assert main([*options, "--trainer.devices=3", "--out=elsewhere"]) == 2
    error = capsys.readouterr().err
    assert "trainer.devices: 3 for a run, and there are 2 GPUs" in error
    assert error.count("\n") == 1
    assert not Path("elsewhere").exists()


def n_gpus(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_steps_done_reads_whole_lines_alone(tmp_path: Path) -> None:
    run = Run(compare_matrix().reference, 0, tmp_path)
    assert steps_done(run) == 0
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,5.0\n20,4.0\n30")
    assert steps_done(run) == 20


def compare_matrix(*overrides: str) -> Matrix:
    path = RECIPES / "compare.yaml"
    return resolve(path, read_matrix(path), RECIPES / "moepp.yaml", list(overrides), Path("out"))
