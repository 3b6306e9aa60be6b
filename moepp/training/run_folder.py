"""The folder of a run, claimed by the first of its processes, whoever started them; its options and its log."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_only

from moepp.model import InputError
from moepp.system.files import differences
from moepp.training.checkpoint import read_rest, results_folder, step_checkpoints


class RunFolder(L.Callback):
    """The trainer's `default_root_dir`: the one that is asked for, or a new runs/<recipe>/<n>.

    The first process claims it, and mkdir is the claim: two runs never share a folder. The other processes of the
    run, whether Lightning, torchrun or SLURM has started them, are told where it is as soon as they can talk.

    Args:
        recipe: names the folder of a new run.
        asked_for: --trainer.default_root_dir.
        begun: the checkpoint that the run goes on from.

    Raises:
        InputError: the folder that is asked for holds another run.
    """

    def __init__(self, recipe: str, asked_for: str | None, begun: str | None) -> None:
        self.path, self.is_new = Path(asked_for or "runs"), False
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            if asked_for is None:
                self.claim_next(Path("runs") / recipe)
            else:
                self.claim(begun)

    def claim_next(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        n = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
        while not self.is_new:
            n += 1
            self.path = parent / str(n)
            with suppress(FileExistsError):
                self.path.mkdir()
                self.is_new = True

    def claim(self, begun: str | None) -> None:
        held = step_checkpoints(self.path)
        if held and (begun is None or Path(begun).resolve().parent != held[0].resolve().parent):
            raise InputError(
                f"trainer.default_root_dir: {self.path} holds a run; go on with it "
                f"(--ckpt_path={held[0]}), name another folder, or remove it"
            )
        self.is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        root: str = trainer.strategy.broadcast(str(self.path))
        trainer._default_root_dir = root  # type: ignore[attr-defined]
        self.path = Path(trainer.default_root_dir)

    def forget(self) -> None:
        """Leave nothing behind of a run that never took a step."""
        if self.is_new and not (self.path / "metrics.csv").exists() and not step_checkpoints(self.path):
            shutil.rmtree(self.path)

    def save_config(self, trainer: L.Trainer, text: str) -> None:
        """Keep the resolved options as config.yaml; as config.2.yaml and so on where a resumed run has others."""
        if not trainer.is_global_zero:
            return
        before = newest_config(self.path)
        if before is None:
            (self.path / "config.yaml").write_text(text)
        elif changes := list(differences(yaml.safe_load(before.read_text()), yaml.safe_load(text))):
            path = self.path / f"config.{config_number(before) + 1}.yaml"
            path.write_text(text)
            named = ", ".join(f"{key}={new} (was {old})" for key, old, new in changes)
            say(trainer, f"goes on with other options, now in {path}: {named}")


def result_of(checkpoint: Path) -> dict[str, Any] | None:
    """The result.json of the run that a checkpoint lies in, None where there is none of these very weights."""
    path = results_folder(checkpoint, "result.json")
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return result if result["step"] == read_rest(checkpoint).get("global_step") else None


def newest_config(run_dir: Path) -> Path | None:
    """config.yaml, or the config.<n>.yaml of the last time that the run went on with other options."""
    return max(filter(is_config, run_dir.glob("config*.yaml")), key=config_number, default=None)


def recipe_name(path: Path) -> str:
    """What the runs of a recipe are called; of a run's own config.yaml, in runs/<name>/<n>/, as that run was."""
    run_dir = path.absolute().parent
    return run_dir.parent.name if is_config(path) and run_dir.name.isdecimal() else path.stem


def is_config(path: Path) -> bool:
    return re.fullmatch(r"config(\.\d+)?\.yaml", path.name, re.A) is not None


def config_number(path: Path) -> int:
    """2 of config.2.yaml, 1 of config.yaml."""
    return int(path.suffixes[0][1:]) if len(path.suffixes) == 2 else 1


def say(trainer: L.Trainer, line: str) -> None:
    """One line for the person watching (above the progress bar, where there is one) and for train.log."""
    if trainer.is_global_zero:
        print(line, flush=True)
        with (Path(trainer.default_root_dir) / "train.log").open("a") as log:
            log.write(line + "\n")
