"""A checkpoint as a folder that transformers opens where there is no moepp: weights, code, tokenizer, model card.

Written without transformers, and read back by `moepp import`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import moepp.model
from moepp.model import InputError, count_parameters
from moepp.model.config import require
from moepp.model.hub import MODEL_TYPE, export_hub
from moepp.model.weights import read_json
from moepp.training.checkpoint import Loaded
from moepp.training.model_card import model_card

CODE = ("configuration_moepp.py", "modeling_moepp.py")  # in moepp/hf
ORIGIN = "moepp"  # in config.json: what else a checkpoint knows
TEXTS = ("data", "data_hash")


def export_hub_folder(loaded: Loaded, folder: Path, result: dict[str, Any] | None) -> None:
    """Write the folder. `result` is what the run ended with, None where these weights are not a run's last.

    Raises:
        OSError: no room, no permission.
    """
    model, meta = loaded.model, loaded.meta
    origin = {key: meta.get(key) for key in TEXTS}
    if loaded.tokenizer is not None:
        origin["post_processor"] = json.loads(meta["tokenizer"]).get("post_processor")
    special = special_tokens(loaded)
    export_hub(model, folder, **special, **{ORIGIN: origin})
    for name in CODE:  # by path: that room needs transformers
        shutil.copyfile(Path(moepp.model.__file__).parents[1] / "hf" / name, folder / name)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}  # as `moepp generate`
    length = {"max_length": model.config.context_length}  # max_new_tokens would overrule a caller's max_length
    write(folder / "generation_config.json", dumped(special | sampling | length) + "\n")
    if loaded.tokenizer is not None:
        write(folder / "tokenizer.json", tokenizer_json(loaded))
        write(folder / "tokenizer_config.json", dumped(tokenizer_config(loaded, special)) + "\n")
    parameters = count_parameters(model.config, model.moe_config)
    write(folder / "README.md", model_card(folder.resolve().name, loaded, parameters, result))


def read_origin(folder: Path) -> dict[str, Any]:
    """What a checkpoint knew, of the folder that it was exported to; nothing of other folders.

    Raises:
        InputError: config.json has something else there.
    """
    config = read_json(folder)
    origin = config.get(ORIGIN, {}) if config["model_type"] == MODEL_TYPE else {}
    if not isinstance(origin, dict) or not all(isinstance(origin.get(key, ""), str | None) for key in TEXTS):
        raise InputError(f"{folder / 'config.json'}: what it has as {ORIGIN!r} is from no export")
    return origin


def special_tokens(loaded: Loaded) -> dict[str, int]:
    """What begins, ends and fills up a text: all one token, with a mask that hides the last.

    Raises:
        InputError: it is no token.
    """
    if (end := loaded.end_of_text) is None:
        return {}
    rows, tokenizer = loaded.model.config.vocab_size, loaded.tokenizer
    known = 0 <= end < rows and (tokenizer is None or tokenizer.id_to_token(end) is not None)
    require(known, "end_of_text", end, "must be a token of the tokenizer and of the model")
    start = {"bos_token_id": end} if loaded.begins_with_end else {}
    return {**start, "eos_token_id": end, "pad_token_id": end}


def tokenizer_config(loaded: Loaded, special: dict[str, int]) -> dict[str, Any]:
    tokenizer: Any = loaded.tokenizer
    names = {key.removesuffix("_id"): tokenizer.id_to_token(i) for key, i in special.items()}
    return {
        "tokenizer_class": "TokenizersBackend",
        "model_max_length": loaded.model.config.context_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": loaded.begins_with_end,  # there "<|endoftext|>" in a text is text
        **names,
    }


def tokenizer_json(loaded: Loaded) -> str:
    """tokenizer.json, which puts before a text what the model wants there."""
    if not loaded.begins_with_end:
        return loaded.meta["tokenizer"]
    end, tokenizer = loaded.end_of_text, loaded.tokenizer
    token = tokenizer.id_to_token(end)  # type: ignore[arg-type, union-attr]
    before = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [before, first],
        "pair": [before, first, second],
        "special_tokens": {token: {"id": token, "ids": [end], "tokens": [token]}},
    }
    return with_post_processor(loaded.meta["tokenizer"], template)


def with_post_processor(tokenizer_json: str, post_processor: dict[str, Any] | None) -> str:
    return dumped(json.loads(tokenizer_json) | {"post_processor": post_processor})


def dumped(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)  # as tokenizers writes it


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
