"""`moepp figures`: a checkpoint and held-out text → what the router does with it, in pictures and numbers."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli
from tokenizers import Tokenizer

from moepp.model import InputError, Transformer
from moepp.study.figures.compute_curve import read_at_budgets
from moepp.study.figures.findings import Bootstrap, findings
from moepp.study.figures.page import publish
from moepp.study.figures.parts_of_speech import PartsOfSpeech, fetch_lexicon, token_texts
from moepp.study.figures.read_text import read_text
from moepp.study.figures.routing_stats import RoutingCounts
from moepp.text.held_out import HeldOut, TextOptions, held_out_text, open_held_out
from moepp.training.arguments import OneLineParser
from moepp.training.checkpoint import Loaded, load, load_with_tokenizer, newest_checkpoint, results_folder

TASK_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Options:
    """Draw and count what the router does: figures 4 to 6 of the paper, its five findings, the pathway of tokens.

    Args:
        ckpt: the checkpoint; by default the newest under runs/.
        versus: another one, to compare routing scores with: the same model without gating residuals.
        data: the text; its path may also name a task of lm-eval.
        include_path: a folder of more tasks.
        out: folder of the figures; by default `figures` in the checkpoint's run.
    """

    ckpt: str | None = None
    versus: str | None = None
    data: TextOptions = TextOptions()
    include_path: str | None = None
    out: str | None = None


def run(verb: str, arguments: list[str]) -> None:
    """Write a PNG and a CSV for each figure, findings.csv, and index.html.

    Raises:
        InputError: no such checkpoint or text, or they do not fit together.
    """
    options = auto_cli(Options, args=arguments, parser_class=OneLineParser, prog=f"moepp {verb}")
    ckpt = Path(options.ckpt or newest_checkpoint())
    loaded, tokenizer = load_with_tokenizer(ckpt)
    model = loaded.model
    models = {str(ckpt): model}
    about = {"checkpoint": f"{ckpt}: {model.config.n_layers} layers, {experts(model)}"}
    if options.versus:
        other = load(options.versus)
        if other.meta["tokenizer"] != loaded.meta["tokenizer"]:
            raise InputError(f"versus: {options.versus} has another tokenizer, so its tokens are not the same")
        models[options.versus] = other.model
        about["versus"] = f"{options.versus}: {experts(other.model)}"
    seq_len = min(each.config.context_length for each in models.values())
    text = open_text(options, loaded, tokenizer, seq_len)
    texts_V = token_texts(tokenizer, model.config.vocab_size)
    parts_of_speech, untagged = None, {}
    try:
        parts_of_speech = PartsOfSpeech(texts_V, fetch_lexicon())
    except InputError as error:
        untagged["parts_of_speech"] = str(error)  # there is no network

    counts = RoutingCounts(model.moe_config, model.config.n_layers, texts_V)
    read_text(text, seq_len, counts, models, parts_of_speech)
    counts.at_budgets = read_at_budgets(text, int(counts.token_n.sum()), seq_len, model)
    bootstrap = Bootstrap(counts)
    folder = Path(options.out) if options.out else results_folder(ckpt, "figures")
    folder.mkdir(parents=True, exist_ok=True)
    n_tokens, n_domains = counts.token_n.sum(), len(counts.domains)
    about["text"] = f"{text.name}: {n_tokens:,} tokens of {n_domains} domain{'s' * (n_domains > 1)}"
    about["command"] = shlex.join(["moepp", verb, *arguments])
    publish(folder, bootstrap, findings(bootstrap), untagged, title="Inside the router", about=about)


def open_text(options: Options, loaded: Loaded, tokenizer: Tokenizer, seq_len: int) -> HeldOut:
    """The text that is asked for; where no file has its name, that of the task of this name.

    Raises:
        InputError: there is neither.
    """
    path = options.data.path
    if not path or path.startswith("hf:") or Path(path).exists() or not TASK_NAME.fullmatch(path):
        return open_held_out(options.data, loaded.meta, tokenizer, seq_len)
    try:
        from moepp.study.tasks.open import task_text

        source = task_text(path, options.include_path)
    except ModuleNotFoundError as error:
        message = f"{path} does not exist; where it is a task of lm-eval: pip install 'moepp[eval]'"
        raise InputError(message) from error
    except InputError as error:
        raise InputError(f"{path} does not exist, and as a task: {error}") from error
    return held_out_text(source, path, tokenizer, loaded.end_of_text, seq_len)


def experts(model: Transformer) -> str:
    moe = model.moe_config
    kinds = [f"{where.stop - where.start} {kind}" for kind, where in moe.kinds.items() if where.stop > where.start]
    residuals = "with" if moe.gating_residual else "without"
    return f"top {moe.top_k} of {', '.join(kinds)} experts, {residuals} gating residuals"
