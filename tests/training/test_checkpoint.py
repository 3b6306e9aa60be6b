"""Checkpoint files: whole at every moment, checked on reading, the one before a damaged one is used."""

import errno
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.cli import main
from moepp.model import InputError
from moepp.system import files as whole_files
from moepp.training import checkpoint as files
from moepp.training.checkpoint import (
    newest_checkpoint,
    read_checkpoint,
    results_folder,
    step_checkpoints,
    step_path,
    write_checkpoint,
)
from moepp.training.saving import Checkpoints
from tests.conftest import assert_same, refused, tiny

RELEASED = Path(__file__).parents[1] / "model/reference/released_linear_gate"
CONTENT = {"moepp": {"version": "0"}, "state_dict": {"a": torch.arange(300.0), "b": torch.ones(7, 9)}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deeper" / "a.ckpt", CONTENT)
    back = read_checkpoint(tmp_path / "deeper" / "a.ckpt")
    assert back["moepp"] == CONTENT["moepp"]
    assert_same(back["state_dict"], CONTENT["state_dict"])
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["a.ckpt"]


def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """Harmless is one in the padding between entries or in a date."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    rng = random.Random(0)
    found = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            back = read_checkpoint(path)
        except InputError:
            found += 1
            continue
        assert_same(back["state_dict"], CONTENT["state_dict"])
        assert back["moepp"] == CONTENT["moepp"]
    assert found > 200


def test_one_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.ckpt"):
            read_checkpoint(path)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    """/dev/full accepts nothing, as a disk without room does."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, CONTENT)
    before = path.read_bytes()
    (tmp_path / "a.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device"):
        write_checkpoint(path, CONTENT)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_write_that_breaks_off_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, CONTENT)
    before = path.read_bytes()

    def cut_off(content: object, file: object) -> None:
        file.write(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(files.torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, CONTENT)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("before", ["file", "folder", "none"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_the_new_one_is_in_place_before_the_old_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """Removing a folder takes seconds, in which a kill may come."""
    old, new = tmp_path / "a.ckpt", tmp_path / "a.ckpt.tmp"
    for path, kind in ((old, before), (new, after)):
        if kind == "file":
            path.write_text(path.name)
        elif kind == "folder":
            path.mkdir()
            (path / "part").write_text(path.name)
    remove = whole_files.remove

    def removing(path: Path) -> None:
        if path.exists():
            assert (old / "part" if after == "folder" else old).read_text() == "a.ckpt.tmp"
        remove(path)

    monkeypatch.setattr(whole_files, "remove", removing)
    whole_files.put_in_place(old, new)
    assert (old / "part" if after == "folder" else old).read_text() == "a.ckpt.tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_file_in_the_place_of_a_folder_is_whole_before_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a sharded run goes on with one device, and a kill has left what an earlier one set aside."""
    path = tmp_path / "a.ckpt"
    for folder in (path, tmp_path / "a.ckpt.old.tmp"):
        folder.mkdir()
        (folder / "part").write_text("old")
    remove, removed = whole_files.remove, []

    def removing(old: Path) -> None:
        removed.append(path.is_file() and bool(read_checkpoint(path)))
        remove(old)

    monkeypatch.setattr(whole_files, "remove", removing)
    write_checkpoint(path, CONTENT)
    assert removed == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_stays_where_the_file_does_not_come_to_lie_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    path.mkdir()
    (path / "part").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        write_checkpoint(path, CONTENT)
    assert (path / "part").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_damaged_one_is_named_and_the_one_before_used(text_file: Path, workdir: Path, capsys) -> None:
    options = [*tiny(text_file), "--trainer.max_steps=4"]
    assert main(["fit", *options]) == 0
    whole, run = Path("runs/moepp/1").rename("whole"), Path("runs/moepp/2")
    assert main(["fit", *options, f"--trainer.default_root_dir={run}"]) == 0
    last = step_path(run, 4)
    os.truncate(last, last.stat().st_size // 2)
    capsys.readouterr()
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert f"{last} is damaged" in capsys.readouterr().err
    assert_same(*(read_checkpoint(step_path(folder, 4))["state_dict"] for folder in (run, whole)))
    for path in (run / "checkpoints").iterdir():
        os.truncate(path, 100)
    assert f"the checkpoints of {run} are all damaged" in refused(capsys, "fit", *options, "--ckpt_path=last")


def test_results_go_into_the_run_from_wherever_its_checkpoint_is_named(workdir: Path) -> None:
    path = step_path(workdir / "run", 4)
    path.parent.mkdir(parents=True)
    assert results_folder(path, "figures") == workdir / "run/figures"
    os.chdir(path.parent)
    assert results_folder(Path(path.name), "figures") == workdir / "run/figures"
    assert results_folder(workdir / "elsewhere/a.ckpt", "figures") == workdir / "elsewhere/figures"


def test_a_folder_of_checkpoints_is_none_and_the_best_in_it_is_named(workdir: Path) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    for folder in ("run", "run/checkpoints"):
        with pytest.raises(
            InputError, match=f"{folder} is a folder: name a file, such as run/checkpoints/best.ckpt"
        ):
            read_checkpoint(folder)


def test_only_numbers_are_steps(workdir: Path) -> None:
    path = step_path(workdir, 4)
    path.parent.mkdir()
    for name in (path.name, "step-²2.ckpt", "step-x.ckpt"):
        path.with_name(name).touch()
    assert step_checkpoints(workdir) == [path]


def test_a_recipes_name_is_no_pattern(workdir: Path) -> None:
    path = step_path(Path("runs/lr[3e-3]/1"), 4)
    path.parent.mkdir(parents=True)
    write_checkpoint(path, CONTENT)
    assert newest_checkpoint("lr[3e-3]") == newest_checkpoint() == path
    with pytest.raises(InputError, match="has no checkpoint"):
        newest_checkpoint("lr*")


def test_a_full_disk_ends_the_run_with_one_line(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The checkpoint from before stays, and the run can go on from it."""
    options = [*tiny(text_file), "--trainer.max_steps=6", "--trainer.default_root_dir=run"]
    full, begin = Path("run/checkpoints/step-00000004.ckpt.tmp"), Checkpoints.on_train_start

    def begin_and_fill_the_disk(self: Checkpoints, *args: Any) -> None:
        begin(self, *args)
        full.symlink_to("/dev/full")

    full.parent.mkdir(parents=True)
    full.with_stem("step-00000003.ckpt").write_text("cut off by a kill")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_start", begin_and_fill_the_disk)
        assert main(["fit", *options]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert "No space left on device" in message
    assert "step-00000004.ckpt" in message
    assert {path.name for path in full.parent.iterdir()} == {"step-00000002.ckpt", "best.ckpt"}
    good = step_path(Path("run"), 2)
    assert read_checkpoint(good)["global_step"] == 2
    assert main(["fit", *options, f"--ckpt_path={good}"]) == 0
    assert read_checkpoint(step_path(Path("run"), 6))["global_step"] == 6


LIMITED = """
import resource, signal, sys
from moepp.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_within_a_file_ends_the_run_with_one_line(text_file: Path, workdir: Path) -> None:
    """No file can grow beyond a limit, which a checkpoint reaches and metrics do not."""
    arguments = ["400000", "fit", *tiny(text_file), "--trainer.max_steps=4"]
    ended = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "File too large" in ended.stderr
    assert "step-00000002.ckpt" in ended.stderr
    assert not list(Path("runs/moepp/1/checkpoints").iterdir())


def test_an_imported_one_has_the_entries_of_a_runs(text_file: Path, workdir: Path) -> None:
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=1"]) == 0
    assert main(["import", str(RELEASED), "imported.ckpt"]) == 0
    of_a_run = read_checkpoint(step_path(Path("runs/moepp/1"), 1))["moepp"]
    assert read_checkpoint("imported.ckpt")["moepp"].keys() == of_a_run.keys()


def test_a_whole_one_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, CONTENT)
    os.utime(path, (1, 1))
    looks, testzip = [], zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: looks.append(1) or testzip(archive))
    for _ in range(3):
        read_checkpoint(path)
    assert len(looks) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is damaged"):
        read_checkpoint(path)


def test_they_carry_where_they_come_from(text_file: Path, workdir: Path) -> None:
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=2"]) == 0
    run = Path("runs/moepp/1")
    meta = read_checkpoint(step_path(run, 2))["moepp"]
    assert meta["config"] == (run / "config.yaml").read_text()
    assert {"moepp", "commit", "torch", "tokenizer_hash", "data_hash"} <= meta.keys()
