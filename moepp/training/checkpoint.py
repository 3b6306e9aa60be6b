"""Checkpoints: what moepp adds to Lightning's, and reading them back without running what is in them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.training.tokens import load_tokenizer


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's content, its tensors memory-mapped. `weights_only`: no file from elsewhere can run code.

    Raises:
        InputError: missing, unreadable, or not written by moepp.
    """
    if not Path(path).is_file():
        raise InputError(f"ckpt_path: {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is not a whole checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("moepp"), dict):
        raise InputError(f"{path}: was not written by moepp")
    return checkpoint


def require_state(path: str | Path, *keys: str) -> None:
    """Raises InputError unless the checkpoint has all of `keys`: one that was imported, or belongs to a finished
    study, holds weights alone."""
    checkpoint = read_checkpoint(path)
    if missing := [key for key in keys if key not in checkpoint]:
        raise InputError(f"ckpt_path: {path} has no {missing[0]}: it was not kept to be used this way")


def load_model(path: str | Path) -> tuple[Transformer, Tokenizer | None]:
    """The model, ready to evaluate, and its tokenizer (None after an import without one).

    Raises:
        InputError: missing, unreadable, or not written by moepp.
    """
    checkpoint = read_checkpoint(path)
    meta = checkpoint["moepp"]
    try:
        model = Transformer(TransformerConfig(**meta["transformer"]), MoEConfig(**meta["moe"]))
        state = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        tokenizer = load_tokenizer(meta["tokenizer"]) if meta["tokenizer"] else None
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{path}: its weights do not fit its config ({str(error).splitlines()[0]})") from error
    return model.eval(), tokenizer


def newest_checkpoint(recipe: str = "*") -> Path:
    """The last written runs/<recipe>/<n>/checkpoints/last.ckpt."""
    found = list(Path("runs").glob(f"{recipe}/*/checkpoints/last.ckpt"))
    if not found:
        raise InputError(f"ckpt_path: runs/{recipe} has no checkpoint; train first (make train), or name one")
    return max(found, key=lambda path: path.stat().st_mtime)
