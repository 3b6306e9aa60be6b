"""The small verbs: prepare, generate, import, convert, export. Each function's signature is its command line."""

from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from moepp.model import (
    InputError,
    Transformer,
    add_zero_computation,
    export_released,
    load_foreign,
    load_hub,
    load_released,
    upcycle,
)
from moepp.model import generate as generation
from moepp.model.config import require
from moepp.model.hub import MODEL_TYPE
from moepp.model.weights import read_json
from moepp.text.prepare import prepare as prepare_text
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import end_of_text, load_tokenizer, read_tokenizer, vocabulary_size
from moepp.training.arguments import OneLineParser
from moepp.training.checkpoint import (
    checkpoint_of,
    load,
    load_with_tokenizer,
    newest_checkpoint,
    write_checkpoint,
)
from moepp.training.hub_folder import export_hub_folder, read_origin, with_post_processor
from moepp.training.run_folder import result_of


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
        path: a corpus list (.yaml); .txt, .md or .jsonl (also .gz, .zst), or a folder of them; hf:owner/name; or
            litdata:<folder or bucket>, with data sets of token ids train/ and val/, and tokenizer.json.
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
    ffn_budget: float | None = None,
) -> None:
    """Write text.

    Args:
        ckpt: the checkpoint; by default the newest under runs/.
        prompt: what the text begins with.
        max_new_tokens: by default 200, or what is left of the model's context.
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        seed: of the sampling.
        ffn_budget: FFN experts per token, of a model trained with a budget; by default that one.
    """
    loaded, tokenizer = load_with_tokenizer(ckpt or newest_checkpoint())
    model = loaded.model
    if ffn_budget is not None:
        model.set_ffn_budget(ffn_budget)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = loaded.encode(prompt)
    if not ids and loaded.end_of_text is not None:
        ids = [loaded.end_of_text]  # something has to stand there
    if max_new_tokens is None:
        max_new_tokens = max(1, min(200, model.config.context_length - len(ids)))
    whole = generation.generate(
        model.to(device),
        torch.tensor(ids, device=device),
        max_new_tokens,
        temperature,
        top_p,
        stop=loaded.end_of_text,
        seed=seed,
    )
    print(tokenizer.decode(whole.tolist()))


def import_(folder: str, ckpt: str, tokenizer: str | None = None) -> None:
    """Read a Hugging Face folder into a checkpoint: Mixtral, Qwen3-MoE, OLMoE, Llama, or MoE++ as we export it.

    Args:
        folder: the folder, with its config.json and its weights.
        ckpt: the checkpoint to write.
        tokenizer: its tokenizer.json, by default the one in the folder; without any, text cannot be generated.
    """
    readers = {"MoE++": load_released, MODEL_TYPE: load_hub}
    model = readers.get(str(read_json(Path(folder))["model_type"]), load_foreign)(folder)
    path = Path(tokenizer) if tokenizer else Path(folder) / "tokenizer.json"
    text = end = None
    if tokenizer or path.is_file():
        text, read = read_tokenizer(path)
        end = end_of_text(read, path.parent)
        size, rows = vocabulary_size(read), model.config.vocab_size
        require(size <= rows, f"tokenizer: {path}", f"{size} tokens", f"must fit the model's vocab_size={rows}")
    origin = read_origin(Path(folder))
    if text is not None and tokenizer is None and "post_processor" in origin:
        text = with_post_processor(text, origin["post_processor"])
        load_tokenizer(text, f"tokenizer: {path}")
    data = origin.get("data") or f"what {folder} was trained on"
    write_model(ckpt, model, tokenizer_json=text, end_of_text=end, data=data, data_hash=origin.get("data_hash"))


def convert(
    ckpt: str,
    out: str,
    n_zero: int | None = None,
    n_copy: int = 0,
    n_const: int = 0,
    ffn_per_token: float | None = None,
    n_ffn: int | None = None,
    top_k: int | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> None:
    """Make another model of a trained one, with the same logits: zero-computation experts, or experts at all.

    The new experts are not chosen before `moepp fit --model.init_from=OUT` lets them in (--model.convert.*).

    Args:
        ckpt: the checkpoint of a vanilla MoE, or of a dense model.
        out: the checkpoint to write.
        n_zero: zero experts to add; by default one fewer than a token takes experts (one at least), so that none
            is left without any FFN expert; with n_ffn none.
        n_copy: copy experts to add; the residual stream of a trained model has no room for what they add.
        n_const: constant experts to add.
        ffn_per_token: FFN experts that a token shall take at balance, which sets tau; by default two thirds.
        n_ffn: for a dense model: FFN experts to make of its FFN.
        top_k: and how many of them a token takes, by default 2.
        noise: spread of the new rows of the router, in that of the old rows.
        seed: of the noise, and of the router that n_ffn makes.
    """
    loaded = load(ckpt)
    model = loaded.model
    if n_ffn is not None:
        model = upcycle(model, n_ffn, 2 if top_k is None else top_k, seed)
    else:
        require(top_k is None, "top_k", top_k, "goes with n_ffn, of a dense model")
    if n_ffn is None or n_zero or n_copy or n_const:
        model = add_zero_computation(model, n_zero, n_copy, n_const, ffn_per_token, noise, seed)
    else:
        require(ffn_per_token is None, "ffn_per_token", ffn_per_token, "needs experts to be added")
    write_model(out, model, **loaded.origin)


def write_model(path: str, model: Transformer, **origin: Any) -> None:
    """Write a checkpoint of weights alone, and print where it is; `origin` is as for `checkpoint_of`.

    Raises:
        InputError: there is one already.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists already; name another file or remove it")
    write_checkpoint(path, checkpoint_of(model, **origin))
    print(path)


def export(folder: str, ckpt: str | None = None, format: Literal["released", "hf"] = "released") -> None:
    """Write a checkpoint as a Hugging Face folder, with its tokenizer.

    Args:
        folder: the folder to write.
        ckpt: the checkpoint; by default the newest under runs/.
        format: released is the authors' own, for models of their shape; hf holds any, has a model card, and opens
            in transformers without moepp (AutoModelForCausalLM, trust_remote_code=True).
    """
    path = Path(ckpt or newest_checkpoint())
    loaded = load(path)
    if Path(folder).exists():
        raise InputError(f"folder: {folder} exists already; name another or remove it")
    if format == "hf":
        export_hub_folder(loaded, Path(folder), result_of(path))
    else:
        export_released(loaded.model, folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(str(Path(folder) / "tokenizer.json"))
    print(folder)


VERBS = {function.__name__.rstrip("_"): function for function in (prepare, generate, import_, convert, export)}
