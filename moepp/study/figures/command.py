"""`moepp figures`: a checkpoint and held-out text → what the router does with it, in pictures and numbers."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moepp.model import InputError, Transformer
from moepp.study.figures.findings import FEWEST_PASSAGES, RESAMPLES, Bootstrap, Finding, findings
from moepp.study.figures.gallery import Looked, gallery, write_csv
from moepp.study.figures.page import number, page
from moepp.study.figures.parts_of_speech import CLASSES, NONE, PartsOfSpeech, open_tagger, token_texts
from moepp.study.figures.plots import save_small
from moepp.study.figures.routing_stats import RoutingStats, Scores
from moepp.study.style import STYLE
from moepp.text.held_out import HeldOut, TextOptions, open_held_out
from moepp.training.checkpoint import load, newest_checkpoint, read_checkpoint
from moepp.training.lightning_cli import OneLineParser

BATCH_TOKENS = 4096
PASSAGE = 200  # tokens of the text that is shown


@dataclass(frozen=True)
class Options:
    """Draw and count what the router does: figures 4 to 6 of the paper, its five findings, the pathway of tokens.

    Args:
        ckpt: the checkpoint; by default the newest under runs/.
        versus: another one, to compare routing scores with: the same model without gating residuals.
        data: the text.
        out: folder of the figures; by default `figures` in the checkpoint's run.
        tagger: lexicon, or spacy:MODEL (after pip install spacy).
        min_count: tokens that occur less often are left out of the figure by token.
    """

    ckpt: str | None = None
    versus: str | None = None
    data: TextOptions = TextOptions()
    out: str | None = None
    tagger: str = "lexicon"
    min_count: int = 20


def run(verb: str, arguments: list[str]) -> None:
    options = auto_cli(Options, args=arguments, parser_class=OneLineParser, prog=f"moepp {verb}")
    figures(options, shlex.join(["moepp", verb, *arguments]))


def figures(options: Options, command: str) -> None:
    """Write a PNG and a CSV for each figure, findings.csv, and index.html, which shows `command`.

    Raises:
        InputError: no such checkpoint or text, or they do not fit together.
    """
    if options.min_count < 2:
        raise InputError(f"min_count: must be at least 2, for an interval, got {options.min_count}")
    ckpt = Path(options.ckpt or newest_checkpoint())
    loaded = load(ckpt)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{ckpt}: has no tokenizer; import it with one (moepp import --help)")
    trained = read_checkpoint(ckpt)["moepp"]
    other = load_other(options.versus, trained["tokenizer"], model) if options.versus else None
    text = open_held_out(options.data, trained, tokenizer, model.config.context_length)
    texts_V = token_texts(tokenizer, model.config.vocab_size)
    missing: dict[str, str] = {}  # what is not drawn, and why
    try:
        parts_of_speech = PartsOfSpeech(texts_V, open_tagger(options.tagger))
    except InputError as error:
        if options.tagger != "lexicon":
            raise
        parts_of_speech, missing["parts of speech"] = None, str(error)  # there is no network

    stats, scores, passage = look(model, other, text, texts_V, parts_of_speech)
    bootstrap = Bootstrap(stats)
    names = [f"{run_name(ckpt)}, {residuals(model)}"]
    if other:
        names.append(f"{run_name(str(options.versus))}, {residuals(other)}")
    if len(set(names)) < len(names):
        names = [str(ckpt), f"versus {options.versus}"]
    looked = Looked(stats, bootstrap, dict(zip(names, scores, strict=True)), texts_V, passage, options.min_count)
    pictures, not_drawn = gallery(looked)
    missing = not_drawn | missing
    if other is None:
        missing["another checkpoint's routing scores"] = "name one, with or without gating residuals: --versus"
    found = findings(bootstrap)

    folder = Path(options.out) if options.out else run_folder(ckpt) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_csv(folder / f"{picture.stem}.csv", picture.rows)
        with plt.rc_context(STYLE):
            save_small(picture.draw(), folder / f"{picture.stem}.png")
    write_csv(folder / "findings.csv", [finding.row() for finding in found])
    n_tokens, n_domains = int(bootstrap.sums.n_D.sum()), len(bootstrap.sums.n_D)
    about = {
        "checkpoint": f"{ckpt}: {model.config.n_layers} layers, {experts(model)}",
        **({"versus": f"{options.versus}: {experts(other)}"} if other else {}),
        "text": f"{text.name}: {n_tokens:,} tokens of {n_domains} domain{'s' * (n_domains > 1)}",
        "command": command,
    }
    shown = [(picture.title, picture.seen, folder / f"{picture.stem}.png") for picture in pictures]
    html = page(about, found, shown, missing, notes(stats, bootstrap))
    (folder / "index.html").write_text(html, encoding="utf-8")
    summary(found, missing, folder)


def load_other(path: str, tokenizer_json: str, model: Transformer) -> Transformer:
    """The checkpoint to compare with; it must be able to read the same tokens."""
    other = load(path).model
    if read_checkpoint(path)["moepp"]["tokenizer"] != tokenizer_json:
        raise InputError(f"versus: {path} has another tokenizer, so its tokens are not the same")
    if other.config.context_length < model.config.context_length:
        raise InputError(
            f"versus: {path} reads {other.config.context_length} tokens at a time, fewer than the checkpoint's "
            f"{model.config.context_length}: swap the two"
        )
    return other


@torch.inference_mode()
def look(
    model: Transformer,
    other: Transformer | None,
    text: HeldOut,
    texts_V: list[str],
    parts_of_speech: PartsOfSpeech | None,
) -> tuple[RoutingStats, list[Scores], tuple[np.ndarray, np.ndarray]]:
    """Stream the text through once.

    Returns:
        the counts, the scores of each model, and the text's first tokens (S,) with their FFN counts (S, L).

    Raises:
        InputError: less text than a sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [model.to(device), *([other.to(device)] if other else [])]
    seq_len, moe, n_layers = model.config.context_length, model.moe_config, model.config.n_layers
    stats = RoutingStats(moe, n_layers, len(CLASSES), model.config.vocab_size)
    scores = [Scores(m.config.n_layers, min(2, m.moe_config.n_experts)) for m in models]
    passage: tuple[np.ndarray, np.ndarray] | None = None
    bytes_V = np.array([len(token.encode()) for token in texts_V])
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns) as bars:
        bar = bars.add_task("reading text", total=text.size)
        for batch in batches(text.windows(), max(1, BATCH_TOKENS // seq_len)):
            lengths = np.array([len(tokens) for _, tokens in batch])
            valid_BS = np.arange(seq_len) < lengths[:, None]
            tokens_BS, classes_BS = np.zeros(valid_BS.shape, np.int64), np.full(valid_BS.shape, NONE)
            for b, (_, tokens_S) in enumerate(batch):  # padding comes last, where no token can see it
                tokens_BS[b, : len(tokens_S)] = tokens_S
                if parts_of_speech:
                    classes_BS[b, : len(tokens_S)] = parts_of_speech(tokens_S)
            for m, its_scores in zip(models, scores, strict=True):
                _, routings = m.hidden(torch.from_numpy(tokens_BS).to(device))
                top_TLR = torch.stack(
                    [routing.probs.topk(its_scores.low.shape[1]).values for routing in routings], 1
                )
                its_scores.add(top_TLR.cpu().numpy()[valid_BS.ravel()])
                if m is model:
                    experts_TLK = torch.stack([routing.experts for routing in routings], 1).cpu().numpy()
            experts_BSLK = experts_TLK.reshape(*valid_BS.shape, n_layers, moe.top_k)
            stats.add([domain for domain, _ in batch], tokens_BS, classes_BS, valid_BS, experts_BSLK)
            if passage is None:
                first = slice(min(lengths[0], PASSAGE))
                passage = tokens_BS[0, first], (experts_BSLK[0, first] < moe.n_ffn).sum(-1)
            bars.advance(bar, int(bytes_V[tokens_BS[valid_BS]].sum()))
    if passage is None or scores[0].n < seq_len:
        raise InputError(
            f"{text.name} has {scores[0].n} tokens, fewer than one sequence of {seq_len}: give more text"
        )
    return stats, scores, passage


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def notes(stats: RoutingStats, bootstrap: Bootstrap) -> list[str]:
    length = stats.passages.windows
    lines = [
        f"Intervals: 95 %, basic bootstrap over passages of {length} sequence{'s' * (length > 1)}, drawn anew "
        f"within each domain {RESAMPLES:,} times (seeded); of single tokens, 1.96 standard errors. They speak "
        "of more text like this, not of the same model trained from another seed. A claim holds (yes) where the "
        "whole interval is above the number in the fourth column, and does not (no) where it is below. For "
        "differences between domains it is what shuffled domains reach (97.5 %), or the least that counts.",
    ]
    if bootstrap.too_short:
        lines.insert(
            0,
            f"No intervals, so no verdicts: {', '.join(bootstrap.too_short)} has fewer than {FEWEST_PASSAGES} "
            "passages. Give more text, or join domains (--data.labels).",
        )
    return lines


def summary(found: list[Finding], missing: dict[str, str], folder: Path) -> None:
    table = Table("", "finding", "measured [95 %]", "holds here", box=None, pad_edge=False)
    for finding in found:
        table.add_row(str(finding.number), finding.claim, number(finding).replace("[", r"\["), finding.holds)
    console = Console()
    console.print(table)
    for what, why in missing.items():
        console.print(f"not drawn: {what}: {why}", markup=False)
    print(folder / "index.html")


def experts(model: Transformer) -> str:
    moe = model.moe_config
    counts = {kind: where.stop - where.start for kind, where in moe.kinds.items()}
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    return f"top {moe.top_k} of {kinds} experts, {residuals(model)}"


def residuals(model: Transformer) -> str:
    return f"{'with' if model.moe_config.gating_residual else 'without'} gating residuals"


def run_name(ckpt: str | Path) -> str:
    """The last two folders of the run that a checkpoint belongs to."""
    return "/".join(run_folder(ckpt).parts[-2:])


def run_folder(ckpt: str | Path) -> Path:
    folder = Path(ckpt).absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder
