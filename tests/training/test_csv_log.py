from pathlib import Path

from moepp.training.csv_log import CSVLog
from tests.conftest import read_csv


def test_a_row_per_step_whole_at_every_moment(tmp_path: Path) -> None:
    log = CSVLog(tmp_path)
    log.log_metrics({"a": 1.0}, step=1)
    assert read_csv(tmp_path) == [{"step": "1", "a": "1.0"}]
    log.log_metrics({"a": 2.0}, step=2)
    log.log_metrics({"b": 3.0}, step=2)  # a new column, in the same row
    log.log_metrics({"a": 4.0, "b": 5.0}, step=3)
    log.log_metrics({"b": 6.0}, step=3)  # replaces the last row
    assert read_csv(tmp_path) == [
        {"step": "1", "a": "1.0", "b": ""},
        {"step": "2", "a": "2.0", "b": "3.0"},
        {"step": "3", "a": "4.0", "b": "6.0"},
    ]


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    log = CSVLog(tmp_path)
    for step in range(1, 6):
        log.log_metrics({"a": float(step)}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6")  # a crash in the middle of a row
    log = CSVLog(tmp_path, begun_step=3)
    log.log_metrics({"a": 40.0}, step=4)
    log.log_metrics({"a": 50.0}, step=5)
    assert [(row["step"], row["a"]) for row in read_csv(tmp_path)] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0"), ("5", "50.0"),
    ]  # fmt: skip


def test_a_step_logged_again_by_a_resumed_run_replaces_its_row_alone(tmp_path: Path) -> None:
    log = CSVLog(tmp_path)
    for step in range(1, 4):
        log.log_metrics({"a": float(step)}, step=step)
    CSVLog(tmp_path).log_metrics({"a": 30.0}, step=3)
    assert [row["a"] for row in read_csv(tmp_path)] == ["1.0", "2.0", "30.0"]


def test_a_row_cut_short_is_not_continued(tmp_path: Path) -> None:
    CSVLog(tmp_path).log_metrics({"a": 1.0, "b": 1.0}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.")
    log = CSVLog(tmp_path, begun_step=1)
    log.log_metrics({"a": 2.0, "b": 2.0}, step=2)
    assert [list(row.values()) for row in read_csv(tmp_path)] == [["1", "1.0", "1.0"], ["2", "2.0", "2.0"]]
