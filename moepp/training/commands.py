"""The small verbs: prepare, generate, import, export. Each function's signature is its command line."""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from moepp.model import InputError, export_released, load_released
from moepp.model import generate as generation
from moepp.text.prepare import prepare as prepare_text
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import end_of_text, load_tokenizer
from moepp.training.checkpoint import described, load, newest_checkpoint, write_checkpoint
from moepp.training.lightning_cli import OneLineParser


def run(verb: str, arguments: list[str]) -> None:
    auto_cli(VERBS[verb], args=arguments, parser_class=OneLineParser, prog=f"moepp {verb}", as_positional=True)


def prepare(
    path: str,
    vocab_size: int | None = None,
    val_fraction: float = 0.02,
    out_root: str = "data/prepared",
    tokenizer: str | None = None,
) -> None:
    """Turn text into a tokenizer and token files. A second call with the same text does nothing.

    Args:
        path: a corpus list (.yaml); .txt, .md or .jsonl (also .gz, .zst), or a folder of them; or hf:owner/name.
        vocab_size: size of the byte-level BPE vocabulary, padded to a multiple of 64; by default 8192.
        val_fraction: share of each domain's text held out for validation, in whole documents.
        out_root: where the folder of token files goes.
        tokenizer: the tokenizer.json of another model, to use instead of a vocabulary of the text's own.
    """
    from rich.console import Console

    folder = prepare_text(path, vocab_size, val_fraction, out_root, tokenizer=tokenizer)
    Console().print(TokenFiles.open(folder).describe())
    print(folder)


def generate(
    ckpt: str | None = None,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Write text.

    Args:
        ckpt: the checkpoint; by default the newest under runs/.
        prompt: what the text begins with.
        max_new_tokens: by default 200, or what is left of the model's context.
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        seed: of the sampling.
    """
    loaded = load(ckpt or newest_checkpoint())
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{ckpt}: has no tokenizer; import it with one (moepp import --help)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = loaded.meta.get("end_of_text", end_of_text(tokenizer))
    # an imported model wants before a text what its tokenizer puts there, one trained here the end of another
    imported = loaded.meta["data_hash"] is None and tokenizer.num_special_tokens_to_add(False) > 0
    before = [] if end is None or imported else [end]
    ids = [*before, *tokenizer.encode(prompt, add_special_tokens=imported).ids]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(200, model.config.context_length - len(ids)))
    whole = generation.generate(
        model.to(device),
        torch.tensor(ids, device=device),
        max_new_tokens,
        temperature,
        top_p,
        stop=end,
        seed=seed,
    )
    print(tokenizer.decode(whole.tolist()))


def import_(folder: str, ckpt: str, tokenizer: str | None = None) -> None:
    """Read a released (Hugging Face) folder into a checkpoint.

    Args:
        folder: the released folder.
        ckpt: the checkpoint to write.
        tokenizer: its tokenizer.json, by default the one in the folder; without any, text cannot be generated.
    """
    model = load_released(folder)
    path = Path(tokenizer) if tokenizer else Path(folder) / "tokenizer.json"
    if tokenizer and not path.is_file():
        raise InputError(f"tokenizer: {path} does not exist")
    text = end = None
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer: {path} is not UTF-8 ({error})") from error
        end = end_of_text(load_tokenizer(text, f"tokenizer: {path}"), path.parent)
    if Path(ckpt).exists():
        raise InputError(f"ckpt: {ckpt} exists already; name another file or remove it")
    meta = described(model.config, model.moe_config, text, end, f"what {folder} was trained on")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    write_checkpoint(ckpt, {"state_dict": state, "moepp": meta})
    print(ckpt)


def export(folder: str, ckpt: str | None = None) -> None:
    """Write a checkpoint as a released (Hugging Face) folder, with its tokenizer.

    Args:
        folder: the folder to write.
        ckpt: the checkpoint; by default the newest under runs/.
    """
    loaded = load(ckpt or newest_checkpoint())
    if Path(folder).exists():
        raise InputError(f"folder: {folder} exists already; name another or remove it")
    export_released(loaded.model, folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(str(Path(folder) / "tokenizer.json"))
    print(folder)


VERBS = {function.__name__.rstrip("_"): function for function in (prepare, generate, import_, export)}
