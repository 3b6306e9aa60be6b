"""Checkpoint files: written whole, checked on reading, and never able to run code.

A checkpoint is what torch.save writes: a zip archive whose entries each carry a CRC-32, so that damage is found.
"""

import glob
import os
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from tokenizers import Tokenizer

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.model.config import Configs, require
from moepp.system.files import differences, replacing, sha256_of
from moepp.system.machine import provenance
from moepp.text.tokenizer import end_of_text, load_tokenizer
from moepp.training import shards


def write_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` so that `path` is whole at every moment.

    Raises:
        OSError: no room, no permission; what stood at `path` still stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # where the disk fills up, torch's zip writer stumbles over its own position
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's content, its tensors memory-mapped. `weights_only`: no file from elsewhere can run code.

    Raises:
        InputError: missing, damaged, or not written by moepp.
    """
    path = Path(path)
    if path.is_dir() and path.suffix != ".ckpt":
        file = path / "best.ckpt" if path.name == "checkpoints" else path / "checkpoints/best.ckpt"
        raise InputError(f"checkpoint: {path} is a folder: name a file, such as {file}")
    if not path.exists():
        raise InputError(f"checkpoint: {path} does not exist")
    if (damage := find_damage(path)) is not None:
        raise InputError(f"{path}: is damaged, or no checkpoint ({damage})")
    file = path / shards.REST if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if path.is_dir():
            shards.put_back(checkpoint, shards.read_whole(path))
    except Exception as error:  # zip, pickle and torch each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is not a whole checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("moepp"), dict):
        raise InputError(f"{path}: was not written by moepp")
    return checkpoint


def read_rest(path: str | Path) -> dict[str, Any]:
    """The same without the tensors of a folder's shards, which may be many.

    Raises:
        InputError: as `read_checkpoint`, but for damage to shards.
    """
    return read_checkpoint(Path(path, shards.REST) if shards.is_folder(path) else path)


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the archive by its own checksums; None where nothing is.

    All of it is read, so a file that was found whole is not looked at again in this process, unless it is so young
    that its time would not tell it from one that was put in its place.
    """
    path = Path(path)
    if path.is_dir():
        return find_damage(path / shards.REST) or shards.find_damage(path)
    try:
        stat = os.stat(path)
        version = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if version in FOUND_WHOLE:
            return None
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except Exception as error:  # of a damaged directory zipfile raises this and that
        return str(error) or type(error).__name__
    if entry is not None:
        return f"checksum of {entry}"
    if time.time() - stat.st_mtime > 1:
        FOUND_WHOLE.add(version)
    return None


FOUND_WHOLE: set[tuple[str, int, int, int]] = set()  # path, inode, size, time


class CheckpointFiles(TorchCheckpointIO):
    """How the trainer writes and reads checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path)


@contextmanager
def naming_checkpoint(path: str | None, use: str, begun: Callable[[], bool]) -> Iterator[None]:
    """Lightning restores what a checkpoint holds part by part, and each fails in its own way on a wrong one.

    Raises:
        InputError: before the work has begun, and not in the model's own computation: the checkpoint holds what no
            run of ours has written.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        within = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        computing = within & {"training_step", "validation_step", "backward"}
        if path is None or begun() or computing or isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{path}: cannot be {use}, what it holds is not a run's state ({type(error).__name__}: {error})"
        ) from error


def described(
    transformer: TransformerConfig,
    moe: MoEConfig,
    tokenizer_json: str | None,
    end_of_text: int | None,
    data: str,
    data_hash: str | None = None,
    config: str = "",
) -> dict[str, Any]:
    """The entry `moepp` of a checkpoint: all that is needed to build the model, and to tell what it came from.

    Args:
        transformer: sizes of the model.
        moe: its experts, router and balance.
        tokenizer_json: None where nobody knows the tokenizer.
        end_of_text: the token that ends a text, None where nobody knows it.
        data: what it was trained on, for people.
        data_hash: the same of token files; None where it was trained elsewhere.
        config: every option of its run, as YAML.
    """
    return {
        **provenance(),
        "config": config,
        "transformer": asdict(transformer),
        "moe": asdict(moe),
        "tokenizer": tokenizer_json,
        "tokenizer_hash": sha256_of(tokenizer_json or ""),
        "end_of_text": end_of_text,
        "data_hash": data_hash,
        "data": data,
    }


def configs_in(meta: dict[str, Any]) -> Configs:
    """What `described` was given. An older checkpoint has the default of a field that came later."""
    return TransformerConfig(**meta["transformer"]), MoEConfig(**meta["moe"])


def differing(before: Configs, after: Configs) -> Iterator[tuple[str, Any, Any]]:
    """(option, its value in `before`, in `after`)."""
    old, new = ({"transformer": asdict(transformer), "moe": asdict(moe)} for transformer, moe in (before, after))
    return differences(old, new, "model")


def checkpoint_of(model: Transformer, **origin: Any) -> dict[str, Any]:
    """A checkpoint of weights alone; `origin` is what `described` takes beside the configurations."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": state, "moepp": described(model.config, model.moe_config, **origin)}


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds for those who do not train on: `meta` is its entry `moepp`."""

    model: Transformer  # ready to evaluate
    tokenizer: Tokenizer | None  # None after an import without one
    meta: dict[str, Any]

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text; None where nobody knows it."""
        read = None if self.tokenizer is None else end_of_text(self.tokenizer)
        return self.meta.get("end_of_text", read)

    @property
    def begins_with_end(self) -> bool:
        """Whether the end of another text is to stand before a text, as in training here. An imported model wants
        there what its tokenizer puts there, and nothing if that is nothing."""
        return self.end_of_text is not None and self.meta.get("data_hash") is not None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, and before them what the model wants there. There has to be a tokenizer."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(text, add_special_tokens=not self.begins_with_end).ids
        end = self.end_of_text
        return [end, *ids] if end is not None and self.begins_with_end else ids

    @property
    def origin(self) -> dict[str, Any]:
        """For `checkpoint_of`, of another model that is made from this one."""
        kept = {key: self.meta.get(key) for key in ("end_of_text", "data", "data_hash")}
        return {"tokenizer_json": self.meta["tokenizer"], **kept}


def load(path: str | Path) -> Loaded:
    """The model and its tokenizer.

    Raises:
        InputError: missing, damaged, or not written by moepp.
    """
    checkpoint = read_checkpoint(path)
    meta = checkpoint["moepp"]
    try:
        model = Transformer(*configs_in(meta))
        state = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        own = model.state_dict()
        # an older checkpoint may not have these; routers have the biases that came of them
        budget = {name: value for name, value in own.items() if name.startswith("budget.")}
        model.load_state_dict({name: (budget | state)[name] for name in own})
        tokenizer = load_tokenizer(meta["tokenizer"], f"{path}: its tokenizer") if meta["tokenizer"] else None
        for key, kind in {"data": str, "data_hash": str, "config": str, "end_of_text": int}.items():
            # an older checkpoint may not have one
            require(
                isinstance(meta.get(key), kind | None), f"{path}: {key}", meta.get(key), f"must be {kind.__name__}"
            )
    except InputError:
        raise
    except Exception as error:  # of a wrong content each part raises its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: its weights do not fit its config ({reason})") from error
    return Loaded(model.eval(), tokenizer, meta)


def load_with_tokenizer(path: str | Path) -> tuple[Loaded, Tokenizer]:
    """The same of a model that is to read or write text.

    Raises:
        InputError: as `load`, or there is no tokenizer.
    """
    loaded = load(path)
    if loaded.tokenizer is None:
        raise InputError(f"{path}: has no tokenizer; import it with one (moepp import --help)")
    return loaded, loaded.tokenizer


# ---- the checkpoints of a run ------------------------------------------------------------------------------


def results_folder(checkpoint: Path, name: str) -> Path:
    """Where what was found out about a checkpoint goes: into its run."""
    checkpoint = checkpoint.absolute()
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run_dir / name


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int:
    """The optimizer steps behind a step-<n>.ckpt."""
    return int(path.stem.removeprefix("step-"))


def step_checkpoints(run_dir: Path) -> list[Path]:
    """The run's step-<n>.ckpt, the latest first."""
    found = (run_dir / "checkpoints").glob("step-*.ckpt")
    return sorted((path for path in found if path.stem[5:].isdecimal()), key=step_of, reverse=True)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The run's last whole checkpoint, None if it has none. Damaged ones after it are named and passed over."""
    damaged: list[str] = []
    for path in step_checkpoints(run_dir):
        if (damage := find_damage(path)) is None:
            for other in damaged:
                print(f"moepp: {other}: taking {path.name} instead", file=sys.stderr)
            return path
        damaged.append(f"{path} is damaged ({damage})")
    return None


def newest_checkpoint(recipe: str | None = None) -> Path:
    """The last whole checkpoint of the run under runs/<recipe>/, or of any, that wrote one last.

    Raises:
        InputError: no run has a checkpoint, or the run's are all damaged.
    """
    run_dirs = Path("runs").glob(f"{glob.escape(recipe)}/*" if recipe else "*/*")
    written = [path for run_dir in run_dirs for path in step_checkpoints(run_dir)]
    if not written:
        where = f"runs/{recipe or '*'}"
        raise InputError(f"ckpt_path: {where} has no checkpoint; train first (make train), or name one")
    run_dir = max(written, key=lambda path: path.stat().st_mtime_ns).parent.parent
    if (last := last_checkpoint(run_dir)) is None:
        raise InputError(f"ckpt_path: the checkpoints of {run_dir} are all damaged")
    return last
