"""The short form of `make soak`."""

from pathlib import Path

from tests.soak import soak


def test_killed_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    for trial in soak(kills=3, folder=tmp_path):
        assert all(trial.equal.values()), trial
